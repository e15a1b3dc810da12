"""Greedy answers of Phi-3.5-mini's shapes on one GPU: ours against transformers.

    python benchmarks/gpu/generation.py          # one GPU, some minutes
    python benchmarks/gpu/generation.py --toy    # correctness only, writes nothing

Random weights, random prompts of many short and a few long ones. Ours sorts them into batches of
like length; `generate` takes them as they come, 32 at a time; continuous batching is transformers'
own. The peers get bfloat16 weights, ours float32 weights under autocast, as exams compute after
training. Parity first: the same answers, in float32 all of them. The floor of a decoding step is
reading the weights in bfloat16 and the keys and values of the batch once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import measuring
from measuring import Options

RESULTS = "gpu_generation.jsonl"
ARRIVING = 32
"""Prompts that `generate` takes at a time."""
Answers = list[str]


def make_prompts(options: Options) -> list[list[int]]:
    count, middle = (7, 12) if options.toy else (128, 300)
    return measuring.random_ids(measuring.random_lengths(count, median=middle, longest=8 * middle))


def ours(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> Answers:
    from mediphi import engine
    from mediphi.config.schema import Hardware
    from mediphi.generation import answer

    precision = "bf16-mixed" if measuring.device() == "cuda" else "32-true"
    device = engine.resolve(Hardware(precision=precision))
    return answer(model, tokenizer, prompts, max_new_tokens=new_tokens, device=device)


def greedy(model: Any, tokenizer: Any, new_tokens: int) -> Any:
    from transformers import GenerationConfig

    from mediphi.backbone import eos_id
    from mediphi.generation import stop_ids

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stop_ids(model, tokenizer)),
        pad_token_id=eos_id(tokenizer),
    )


def in_arrival_order(
    model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int
) -> Answers:
    import torch

    config, found = greedy(model, tokenizer, new_tokens), []
    for start in range(0, len(prompts), ARRIVING):
        own = prompts[start : start + ARRIVING]
        longest = max(map(len, own))
        pads = torch.tensor([longest - len(ids) for ids in own])
        rows = [[config.pad_token_id] * (longest - len(ids)) + ids for ids in own]
        mask = (torch.arange(longest) >= pads[:, None]).long().to(model.device)
        ids = torch.tensor(rows, device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=config)
        found += texts(tokenizer, out[:, longest:].tolist(), config.eos_token_id)
    return found


def continuously(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> Answers:
    import torch

    config = greedy(model, tokenizer, new_tokens)
    with torch.inference_mode():
        out = model.generate_batch(prompts, generation_config=config)
    by_request = [out[name].generated_tokens for name in sorted(out, key=request_number)]
    return texts(tokenizer, by_request, config.eos_token_id)


def request_number(name: str) -> int:
    return int(name.rpartition("_")[2])


def texts(tokenizer: Any, answers: Sequence[Sequence[int]], stops: list[int]) -> Answers:
    """Up to the first stop token, without special tokens."""
    found = []
    for ids in answers:
        end = next((i for i, one in enumerate(ids) if one in stops), len(ids))
        found.append(str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True)))
    return found


def all_sides(options: Options) -> dict[str, Callable[..., Answers]]:
    """Each with its model."""
    import torch

    from mediphi.backbone import load_tokenizer

    tokenizer = load_tokenizer(options.folder)
    exact = measuring.random_model(options.folder).eval()
    found = {"ours": partial(ours, exact, tokenizer)}
    if measuring.device() == "cpu":
        return {**found, "generate, arrival order": partial(in_arrival_order, exact, tokenizer)}
    rounded = measuring.random_model(options.folder).eval().to(torch.bfloat16)
    found["generate, arrival order"] = partial(in_arrival_order, rounded, tokenizer)
    if hasattr(rounded, "generate_batch"):
        paged = measuring.random_model(options.folder, implementation="paged|sdpa").eval()
        paged = paged.to(torch.bfloat16)
        found["continuous batching"] = partial(continuously, paged, tokenizer)
    return found


def check_parity(answers: dict[str, Answers]) -> dict[str, float]:
    """The share of answers that are ours.

    Raises:
        AssertionError: not all, in float32.
    """
    expected = answers.get("ours", [])
    shares = {}
    for name, own in answers.items():
        same = [a == b for a, b in zip(own, expected, strict=True)]
        shares[name] = round(sum(same) / len(same), 3)
        assert all(same) or measuring.device() == "cuda", f"{name}: other answers"
    return shares


def floor_seconds(options: Options, prompts: list[list[int]], new_tokens: int) -> float:
    """Of decoding in our batches: weights and keys and values over the memory's bandwidth."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mediphi.backbone import original_positions
    from mediphi.generation import _batches

    config = AutoConfig.from_pretrained(options.folder)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    lengths = [len(prompt) for prompt in prompts]
    batches = _batches(
        lengths,
        max_new_tokens=new_tokens,
        tokens_per_pass=8192,
        boundary=original_positions(config),
    )
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    elements = 0.0
    for places in batches:
        seen = sum(lengths[place] + new_tokens / 2 for place in places)
        elements += new_tokens * (weights + per_token * seen)
    return 2 * elements / measuring.device_bandwidth(64 if options.toy else 4096)


def figures(options: Options) -> Iterator[dict[str, Any]]:
    new_tokens, prompts = 8 if options.toy else 64, make_prompts(options)
    calls = {name: partial(side, prompts, new_tokens) for name, side in all_sides(options).items()}
    answers, failures = {}, {}
    for name, call in list(calls.items()):
        if not options.deadline.leaves():
            failures[name] = options.deadline.told
            del calls[name]
            continue
        try:
            answers[name] = call()
        except Exception as error:  # a peer's; ours has to run
            if name == "ours":
                raise
            failures[name] = f"{type(error).__name__}: {error}"[:400]
            del calls[name]
    parity = check_parity(answers)
    deadline = options.deadline
    costs = measuring.in_turns(calls, toy=options.toy, deadline=deadline, repeat=1)
    floor = floor_seconds(options, prompts, new_tokens)
    line = {"figure": "greedy generation", "data": f"{len(prompts)} prompts, {new_tokens} tokens"}
    for name, measured in costs.items():
        if not measured:
            failures[name] = deadline.told
            continue
        seconds = median(one.seconds for one in measured)
        yield {
            **line,
            "side": name,
            **measuring.seconds_ratio(costs["ours"], measured),
            "new_tokens_per_s": round(len(prompts) * new_tokens / seconds, 1),
            "share_of_floor": round(floor / seconds, 4),
            "peak_mib": round(measured[-1].mib),
            "same_answers": parity[name],
            "prompt_tokens": sum(map(len, prompts)),
        }
    for name, failure in failures.items():
        yield {**line, "side": name, "failure": failure}


if __name__ == "__main__":
    measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)

"""Greedy answers of Phi-3.5-mini's shapes on one GPU: ours against transformers.

    python benchmarks/gpu/generation.py          # one GPU, some minutes
    python benchmarks/gpu/generation.py --toy    # correctness only, writes nothing

Random weights, random prompts of many short and a few long ones. Ours sorts them into batches of
like length; `generate` takes them as they come, 32 at a time; continuous batching is transformers'
own. The peers get bfloat16 weights, ours float32 weights under autocast, as exams compute after
training. The floor of a decoding step is reading the weights in bfloat16 and the keys and values of
the batch once.

Parity comes first, in float32 on every device: each side answers the first prompts exactly as
`generate` answers each alone; prompts where two tokens tie for the best are left out. A peer that
does not has no figures, and its line says why. What is timed on a GPU is bfloat16, where rounding
decides between close tokens: `same_answers` is the share that is then equal to ours, no condition.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import measuring
from measuring import Options

RESULTS = "gpu_generation.jsonl"
ARRIVING = 32
"""Prompts that `generate` takes at a time."""
CHECKED, CHECKED_TOKENS = 8, 16
"""The prompts that all sides answer in float32 first, and how long."""
TIE = 1e-3
"""Logits as close as this may change places in another batch, in float32 too."""
Answers = list[str]


def make_prompts(options: Options) -> list[list[int]]:
    count, middle = (7, 12) if options.toy else (128, 300)
    return measuring.random_ids(measuring.random_lengths(count, median=middle, longest=8 * middle))


class Asked(NamedTuple):
    """What a side is asked; `half`: for speed, in bfloat16, else exactly."""

    prompts: list[list[int]]
    new_tokens: int
    half: bool


def ours(model: Any, tokenizer: Any, asked: Asked) -> Answers:
    from mediphi import engine
    from mediphi.config.schema import Hardware
    from mediphi.generation import answer

    device = engine.resolve(Hardware(precision="bf16-mixed" if asked.half else "32-true"))
    return answer(model, tokenizer, asked.prompts, max_new_tokens=asked.new_tokens, device=device)


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


def in_arrival_order(model: Any, tokenizer: Any, asked: Asked) -> Answers:
    import torch

    config, found = greedy(model, tokenizer, asked.new_tokens), []
    for start in range(0, len(asked.prompts), ARRIVING):
        own = asked.prompts[start : start + ARRIVING]
        longest = max(map(len, own))
        pads = torch.tensor([longest - len(ids) for ids in own])
        rows = [[config.pad_token_id] * (longest - len(ids)) + ids for ids in own]
        mask = (torch.arange(longest) >= pads[:, None]).long().to(model.device)
        ids = torch.tensor(rows, device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=config)
        found += texts(tokenizer, out[:, longest:].tolist(), config.eos_token_id)
    return found


def continuously(model: Any, tokenizer: Any, asked: Asked) -> Answers:
    """In float32 without flash-attn, to which transformers would go over by itself."""
    from transformers import ContinuousBatchingConfig

    config = greedy(model, tokenizer, asked.new_tokens)
    own = ContinuousBatchingConfig(auto_switch_to_flash=asked.half)
    # Not in inference mode: its threads, which are not, write to tensors made here.
    out = model.generate_batch(
        asked.prompts, generation_config=config, continuous_batching_config=own
    )
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


SIDES: dict[str, Callable[[Any, Any, Asked], Answers]] = {
    "ours": ours,
    "generate, arrival order": in_arrival_order,
    "continuous batching": continuously,
}


# ---------------------------------------------------------------------------------- parity
def alone(model: Any, tokenizer: Any, asked: Asked) -> tuple[Asked, Answers]:
    """The prompts that have one answer, and this: of `generate`, each prompt by itself.

    Raises:
        ValueError: there is none.
    """
    import torch

    config, kept, answers = greedy(model, tokenizer, asked.new_tokens), [], []
    config.return_dict_in_generate = config.output_logits = True
    for prompt in asked.prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=ids.new_ones(ids.shape), generation_config=config
            )
        first, second = torch.cat(out.logits).float().topk(2).values.unbind(1)
        if float((first - second).min()) > TIE:
            kept.append(prompt)
            answers += texts(
                tokenizer, out.sequences[:, len(prompt) :].tolist(), config.eos_token_id
            )
    if not kept:
        raise ValueError("every prompt has a tie, so that no answer can be compared")
    return asked._replace(prompts=kept), answers


def prepared(name: str, tokenizer: Any, options: Options) -> Callable[[Asked], Answers]:
    """A side with a model of its own, which has given the right answers in float32.

    Raises:
        ValueError: it has given others.
    """
    import torch

    model = measuring.random_model(options.folder).eval()
    first = Asked(make_prompts(options)[:CHECKED], CHECKED_TOKENS, half=False)
    sample, expected = alone(model, tokenizer, first)
    found = SIDES[name](model, tokenizer, sample)
    same = [a == b for a, b in zip(found, expected, strict=True)]
    if not all(same):
        raise ValueError(f"no parity: {same.count(False)} of {len(same)} answers in float32 differ")
    if measuring.device() == "cuda" and name != "ours":
        for weight in model.parameters():  # not the rotary buffers, which nobody rounds
            weight.data = weight.data.to(torch.bfloat16)
    return partial(SIDES[name], model, tokenizer)


def share_of_equal(found: Answers, expected: Answers) -> float:
    return round(sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected), 3)


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
    from mediphi.backbone import load_tokenizer

    prompts, new_tokens = make_prompts(options), 8 if options.toy else 64
    asked = Asked(prompts, new_tokens, half=measuring.device() == "cuda")
    tokenizer = load_tokenizer(options.folder)
    calls, answers, failures = {}, {}, {}
    for name in SIDES:
        if name == "continuous batching" and measuring.device() == "cpu":
            continue
        if not options.deadline.leaves():
            failures[name] = options.deadline.told
            continue
        try:
            call = partial(prepared(name, tokenizer, options), asked)
            answers[name] = call()
            calls[name] = call
        except Exception as error:  # a peer's; ours has to run
            if name == "ours":
                raise
            failures[name] = f"{type(error).__name__}: {error}"[:400]
    shares = {name: share_of_equal(own, answers["ours"]) for name, own in answers.items()}
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
            "same_answers": shares[name],
            "prompt_tokens": sum(map(len, prompts)),
        }
    for name, failure in failures.items():
        yield {**line, "side": name, "failure": failure}


if __name__ == "__main__":
    measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)

"""Greedy answers of a model to prompts, in left-padded batches that change no answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StaticCache

from mediphi.backbone import STOP_TOKENS, BackboneSpec, build_model, eos_id, original_positions
from mediphi.engine import Device
from mediphi.errors import UserError

Prompt = Sequence[int]

PREALLOCATES = {"cuda": True, "cpu": False}
"""Whether keys and values are written into a cache of full size; one that grows is copied for every
token."""


def answer(
    model: PreTrainedModel | BackboneSpec,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    device: Device,
    tokens_per_pass: int = 8192,
) -> list[str]:
    """Answer every prompt greedily; the texts come in the order of the prompts.

    Each answer is the one that its prompt would get alone, up to the rounding of another batch
    size: so exactly in float32 but for ties, nearly under bf16 autocast. Uses transformers' own
    attention and caches. A model in training is left as it was; a `BackboneSpec` is built first.

    Args:
        prompts: token ids of each, not empty.
        max_new_tokens: longest answer; an answer ends before its first stop token.
        device: where to compute, and whether with autocast.
        tokens_per_pass: bounds prompts, padding and answers of a batch; one alone may be longer.

    Returns:
        The answers without special tokens.

    Raises:
        UserError: a prompt and its answer may exceed the model's positions.
        ValueError: an empty prompt.
    """
    if isinstance(model, BackboneSpec):
        model = build_model(model)
        model.to(device.type)  # type: ignore[arg-type]
    _refuse_too_long(prompts, max_new_tokens, model.config)
    stops = stop_ids(model, tokenizer)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=eos_id(tokenizer),
        use_cache=True,
        disable_compile=True,  # it would compile the decoding step anew for every shape of a batch
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.precision == "bf16-mixed")
    batches = _batches(
        [len(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        tokens_per_pass=tokens_per_pass,
        boundary=original_positions(model.config),
    )
    answers = [""] * len(prompts)
    with _answering(model, greedy), autocast:
        for places in batches:
            written = _generate(model, [prompts[place] for place in places], greedy)
            for place, ids in zip(places, written, strict=True):
                answers[place] = str(tokenizer.decode(_until(stops, ids), skip_special_tokens=True))
    return answers


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """What ends an answer: the model's own stop ids, and the chat format's, which a model with
    random weights has not been told of."""
    own = getattr(model.generation_config, "eos_token_id", None)
    known = own if isinstance(own, list) else [] if own is None else [own]
    return {*known, *(tokenizer.get_vocab()[token] for token in STOP_TOKENS)}


@contextmanager
def _answering(model: PreTrainedModel, greedy: GenerationConfig) -> Iterator[None]:
    """Eval mode, attention that takes a padding mask, no gradients; then everything as it was.

    Layers compiled for training run uncompiled: a cache that grows would compile them anew.

    The model's own generation config goes aside, too: `generate` would add what it says, such as a
    penalty on repetitions.
    """
    implementation, training = model.config._attn_implementation, model.training
    own = model.generation_config
    model.eval().set_attn_implementation("sdpa")
    model.generation_config = greedy
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.generation_config = own
        model.set_attn_implementation(implementation)  # type: ignore[arg-type]
        model.train(training)


def _generate(
    model: PreTrainedModel, prompts: Sequence[Prompt], greedy: GenerationConfig
) -> list[list[int]]:
    """The ids that follow each prompt, padded at their end."""
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[greedy.pad_token_id] * n + list(p) for n, p in zip(pads, prompts, strict=True)]
    mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
    inputs: dict[str, Any] = {
        "inputs": torch.tensor(rows, device=model.device),
        "attention_mask": mask.long().to(model.device),
    }
    if PREALLOCATES[model.device.type]:
        size = longest + greedy.max_new_tokens
        inputs["past_key_values"] = StaticCache(config=model.config, max_cache_len=size)
    generate: Any = model.generate
    out = generate(**inputs, generation_config=greedy)
    return out[:, longest:].tolist()


def _batches(
    lengths: Sequence[int], *, max_new_tokens: int, tokens_per_pass: int, boundary: int | None
) -> Iterator[list[int]]:
    """Places of prompts of similar length, longest first, so that too large a batch fails at once.

    LongRoPE takes its factors by the longest row of a batch. Prompts beyond the boundary, and
    those that stay below it with their answers, keep apart; one that crosses it while it is being
    answered shares a batch with equally long ones only, which cross at the same token.
    """

    def rope_factors(place: int) -> str | int:
        length = lengths[place]
        if boundary is None or length + max_new_tokens <= boundary:
            return "short"
        return "long" if length > boundary else length

    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for _, alike in groupby(longest_first, key=rope_factors):
        batch: list[int] = []
        for place in alike:
            width = lengths[batch[0] if batch else place] + max_new_tokens
            if batch and (len(batch) + 1) * width > tokens_per_pass:
                yield batch
                batch = []
            batch.append(place)
        yield batch


def _until(stops: set[int], ids: Sequence[int]) -> list[int]:
    end = next((place for place, one in enumerate(ids) if one in stops), len(ids))
    return list(ids[:end])


def _refuse_too_long(prompts: Sequence[Prompt], max_new_tokens: int, config: Any) -> None:
    longest = max((len(prompt) for prompt in prompts), default=0)
    limit = config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} exceed the "
            f"model's {limit} positions: lower stage.max_length or stage.exam.max_new_tokens"
        )
    if not all(prompts):
        raise ValueError("an empty prompt cannot be answered")

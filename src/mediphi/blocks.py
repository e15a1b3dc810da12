"""Sequences of a packed row as padded blocks: what PyTorch's SDPA takes, by indices on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from mediphi.batches import send


class Block(NamedTuple):
    """Sequences of similar length, padded to the longest of them.

    `rows` and `keys` are indices into the packed row: whose outputs are wanted, and what they look
    at. Padding repeats the row's token 0, which is harmless: it stands behind the real keys, where
    no real query looks. `real` marks the `rows` that are not padding. Where queries and keys are
    the same tokens `mask` is None and attention causal; elsewhere True marks what a query sees.
    """

    rows: Int64[Tensor, "sequences longest"]
    real: Int64[Tensor, " real_positions"]
    keys: Int64[Tensor, "sequences longest_keys"]
    mask: Bool[Tensor, "sequences 1 longest longest_keys"] | None = None


@dataclass(slots=True)  # not frozen: torch.compile looks into those
class Blocks:
    """All blocks of a row end to end, worked out once for all layers.

    `rows` and `keys` are indices into the row, `ways_back` of each of its tokens into `rows`. A
    compiled layer hands this on without a look inside: other sequences compile nothing anew.
    """

    rows: Int64[Tensor, " padded"]
    keys: Int64[Tensor, " padded_keys"]
    ways_back: Int64[Tensor, " tokens"]
    row_shapes: list[torch.Size]
    key_shapes: list[torch.Size]
    masks: list[Tensor | None]

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> "Blocks":
        rows, keys = [b.rows for b in blocks], [b.keys for b in blocks]
        flat = torch.cat([r.flatten() for r in rows])
        sizes = torch.tensor([0, *(r.numel() for r in rows)]).cumsum(0)
        real = torch.cat([b.real + size for b, size in zip(blocks, sizes, strict=False)])
        ways_back = torch.empty_like(real).index_copy_(0, flat[real], real)
        return cls(
            rows=flat,
            keys=torch.cat([k.flatten() for k in keys]),
            ways_back=ways_back,
            row_shapes=[r.shape for r in rows],
            key_shapes=[k.shape for k in keys],
            masks=[b.mask for b in blocks],
        )

    def to(self, device: torch.device) -> "Blocks":
        names = ("rows", "keys", "ways_back")
        moved: Any = {name: send(getattr(self, name), device) for name in names}
        masks = [None if mask is None else send(mask, device) for mask in self.masks]
        return replace(self, **moved, masks=masks)


def length_blocks(cu_seqlens: Tensor, *, growth: float = 1.15) -> list[Block]:
    """Group sequences so that padding within a block stays below `growth`; on the CPU."""
    bounds = cu_seqlens.long()
    return _causal_blocks(bounds[:-1], bounds.diff(), growth)


def shared_prompt_blocks(
    cu_parts: Int32[Tensor, " parts_plus_1"], *, num_answers: int = 2, growth: float = 1.15
) -> list[Block]:
    """Prompts with their first answers as causal blocks, then the other answers; on the CPU.

    Padding of queries and of keys within a block stays below `growth`.
    """
    bounds = prompt_bounds(cu_parts, num_answers)
    blocks = _causal_blocks(bounds[:, 0], bounds[:, 2] - bounds[:, 0], growth)
    answers, lengths = bounds[:, 2:-1].flatten(), bounds[:, 2:].diff(dim=1).flatten()
    prompts = bounds[:, 0].repeat_interleave(num_answers - 1)
    prompt_lengths = bounds[:, :2].diff(dim=1)[:, 0].repeat_interleave(num_answers - 1)
    for group in _similar(lengths, growth):
        for alike in _similar((prompt_lengths + lengths)[group], growth):
            own = group[alike]
            where = prompts[own], answers[own]
            blocks.append(_answer_block(*where, prompt_lengths[own], lengths[own]))
    return blocks


def _answer_block(
    prompts: Int64[Tensor, " sequences"],
    answers: Int64[Tensor, " sequences"],
    prompt_lengths: Int64[Tensor, " sequences"],
    lengths: Int64[Tensor, " sequences"],
) -> Block:
    """Answers as queries, over the keys of their prompts and their own."""
    rows, real = _padded(answers, lengths)
    before = prompt_lengths[:, None]
    offsets = torch.arange(int((prompt_lengths + lengths).max()))
    places = torch.where(offsets < before, prompts[:, None], answers[:, None] - before) + offsets
    keys = torch.where(offsets < before + lengths[:, None], places, 0)
    visible = offsets <= before[:, None] + torch.arange(rows.shape[1])[:, None]
    return Block(rows, real, keys, mask=visible[:, None])


def _causal_blocks(starts: Tensor, lengths: Tensor, growth: float) -> list[Block]:
    blocks = []
    for group in _similar(lengths, growth):
        rows, real = _padded(starts[group], lengths[group])
        blocks.append(Block(rows, real, keys=rows))
    return blocks


def _similar(lengths: Int64[Tensor, " n"], growth: float) -> list[Int64[Tensor, " group"]]:
    """Indices of lengths that differ by less than `growth`, longest group first."""
    order = torch.argsort(lengths, descending=True, stable=True)
    lengths = lengths[order]
    groups, first = [], 0
    while first < len(lengths):
        last = int((lengths * growth >= lengths[first]).sum())
        groups.append(order[first:last])
        first = last
    return groups


def _padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Places of sequences, `[sequences, longest]`, and which of them (flat) are no padding."""
    offsets = torch.arange(int(lengths.max()))
    real = offsets < lengths[:, None]
    return torch.where(real, starts[:, None] + offsets, 0), real.flatten().nonzero().squeeze(1)


def prompt_bounds(
    cu_parts: Int32[Tensor, " parts_plus_1"], num_answers: int
) -> Int64[Tensor, "prompts answers_plus_2"]:
    """Where each prompt and each of its answers starts, and where the last of them ends."""
    return cu_parts.long().unfold(0, num_answers + 2, num_answers + 1)

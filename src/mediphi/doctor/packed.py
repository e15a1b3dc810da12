"""A packed row against its sequences one at a time: what both proofs of attention compare."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mediphi import attention
from mediphi.batches import Batch, PreferenceBatch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference allowed, as a share of the norm, by the dtype of attention."""


class Comparison(NamedTuple):
    """Largest difference over the sequences, as a share of the norm of what is right.

    `without` is the same where attention runs over the whole row: the control, without which a
    small `difference` would say nothing.
    """

    difference: float
    without: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance

    @property
    def can_tell(self) -> bool:
        """Whether a row without boundaries would have been found."""
        return self.without > 3 * max(self.tolerance, self.difference)


def kernel_dtype(kernel: attention.Kernel) -> torch.dtype:
    """Of the comparison: float32 where the kernel can, else bf16 by autocast."""
    return torch.float32 if kernel == "sdpa" else torch.bfloat16


def compare(model: Any, batch: Batch, kernel: attention.Kernel) -> Comparison:
    """Hidden states of a packed row, by `kernel`, against transformers' own attention on each
    sequence alone; the prompt of a pair belongs to both of its answers.

    `model` is a causal LM in eval mode on the batch's device; its attention is `kernel`'s when
    this returns. Float32 where the kernel can, else under bf16 autocast.
    """
    dtype = kernel_dtype(kernel)
    packed = _run(model, attention.IMPLEMENTATIONS[kernel], dtype)
    alone = _run(model, "sdpa", dtype)
    ours = packed(batch.input_ids, batch.position_ids, **attention.boundaries(batch, kernel))
    open_row = without_boundaries(batch)
    leaky = packed(batch.input_ids, batch.position_ids, **attention.boundaries(open_row, kernel))
    differences, controls = [], []
    for places in sequences(batch):
        places = places.to(batch.input_ids.device)
        ids = batch.input_ids[:, places]
        right = alone(ids, torch.arange(len(places), device=ids.device)[None])
        differences.append(_share(ours[places], right))
        controls.append(_share(leaky[places], right))
    model.set_attn_implementation(attention.IMPLEMENTATIONS[kernel])
    return Comparison(max(differences), max(controls), TOLERANCE[dtype])


def sequences(batch: Batch) -> list[Tensor]:
    """Places in the row of every sequence, as the model should see it alone."""
    bounds = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
    runs = [torch.arange(start, stop) for start, stop in pairwise(bounds)]
    if not (isinstance(batch, PreferenceBatch) and batch.shares_prompt):
        return runs
    found = []
    for prompt, chosen, rejected in zip(runs[0::3], runs[1::3], runs[2::3], strict=True):
        found += [torch.cat([prompt, chosen]), torch.cat([prompt, rejected])]
    return found


def without_boundaries(batch: Any) -> Any:
    """The same row as one sequence: what attention would do that ignores boundaries."""
    length = batch.num_tokens
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=batch.input_ids.device)
    open_row = {"lengths": (length,), "max_seqlen": length, "cu_seqlens": cu_seqlens}
    if isinstance(batch, PreferenceBatch):
        open_row["shares_prompt"] = False
    return replace(batch, **open_row)


def _run(model: Any, implementation: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A forward pass with this attention: ids and positions -> hidden states `[tokens, hidden]`."""

    def run(ids: Tensor, positions: Tensor, **boundaries: Any) -> Tensor:
        model.set_attn_implementation(implementation)
        halved = dtype == torch.bfloat16
        with torch.no_grad(), torch.autocast(ids.device.type, dtype, enabled=halved):
            decoder = model.get_decoder()
            out = decoder(input_ids=ids, position_ids=positions, use_cache=False, **boundaries)
        return out.last_hidden_state[0].float()

    return run


def _share(ours: Tensor, right: Tensor) -> float:
    return float((ours - right).norm() / right.norm())

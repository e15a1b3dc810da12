"""Sums of deltas: task arithmetic, TIES, DARE, Breadcrumbs.

All are one formula: base + lambda * sum_i weight_i * sparse(model_i - base), where TIES' methods
sum only the deltas whose sign is the elected one (Yadav et al. 2023, algorithm 1). Additions and
products come one by one in mergekit's order, so that float32 results are the same to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mediphi.merge import pieces
from mediphi.merge.pieces import Flat, Operands, Scratch, longest, spans
from mediphi.merge.sparsity import Kept
from mediphi.merge.storage import Target

SMALLEST_DIVISOR = 1e-8
"""Sums of weights below are not divided by, as in mergekit."""


class Sum(NamedTuple):
    """How sparse deltas become one.

    Attributes:
        election: whether signs are elected, and whether the weights have a say in it.
        normalize: divide by the sum of the weights, with an election of those that agree.
        factor: lambda.
    """

    election: Literal["none", "weighted", "unweighted"] = "none"
    normalize: bool = False
    factor: float = 1.0


Mixer = Callable[[slice, Tensor | None], Tensor]
"""Gives the merged delta of a piece, from its slice and the float32 base there."""


def add_deltas(
    operands: Operands, kept: Sequence[Kept], how: Sum, *, out: Target, unit: int = 1
) -> None:
    """Writes base + the merged delta.

    Args:
        kept: one for every model.
        out: of the base's shape; rounded once.
        unit: pieces hold multiples of so many elements.
    """
    flat = Flat(operands)
    piece = pieces.length_on(flat.device)
    length = longest(flat.size, piece, unit)
    scratch = Scratch(1, length, flat.device)
    mix = (_plain if how.election == "none" else _elected)(flat, kept, how, length)
    for span in spans(flat.size, piece, unit):
        base = flat.read_base(span, *scratch.take(span))
        delta = mix(span, None if flat.deltas else base)
        if how.factor != 1:
            delta.mul_(how.factor)
        out.write(span, delta.add_(base))


def _plain(flat: Flat, kept: Sequence[Kept], how: Sum, length: int) -> Mixer:
    """The sum of weighted deltas; its piece is overwritten by the next one."""
    scratch = Scratch(3, length, flat.device)
    divisor = float(torch.tensor([part.weight for part in kept]).sum())
    divides = how.normalize and abs(divisor) >= SMALLEST_DIVISOR

    def mix(span: slice, base: Tensor | None) -> Tensor:
        total, buffer, spare = scratch.take(span)
        for number, part in enumerate(kept):
            delta = _sparse(flat, number, span, base, part, (buffer, spare))
            if number == 0:
                torch.mul(delta, part.weight, out=total)
            elif part.weight == 1:
                total.add_(delta)
            else:
                total.add_(torch.mul(delta, part.weight, out=buffer))
        return total.div_(divisor) if divides else total

    return mix


def _elected(flat: Flat, kept: Sequence[Kept], how: Sum, length: int) -> Mixer:
    """The sum of the deltas that have the sign of all deltas' sum; a sum of zero counts as plus."""
    scratch = Scratch(4 + len(kept), length, flat.device)
    early = [part.weight if how.election == "weighted" else 1.0 for part in kept]
    late = [1.0 if how.election == "weighted" else part.weight for part in kept]

    def mix(span: slice, base: Tensor | None) -> Tensor:
        total, sign, divisor, spare, *deltas = scratch.take(span)
        total.zero_()
        for number, part in enumerate(kept):
            delta = _sparse(flat, number, span, base, part, (deltas[number], spare))
            torch.mul(delta, early[number], out=deltas[number])
            total.add_(deltas[number])
        torch.sign(total, out=sign).add_(0.5).sign_()
        total.zero_()
        divisor.zero_()
        for delta, weight, part in zip(deltas, late, kept, strict=True):
            delta.mul_(sign).clamp_(min=0)  # 0 where the signs differ
            if how.normalize:
                divisor.add_(torch.sign(delta, out=spare), alpha=part.weight)
            total.add_(delta if weight == 1 else delta.mul_(weight))
        if how.normalize:
            total.div_(_without_zeros(divisor, spare))
        return total.mul_(sign)

    return mix


def _sparse(
    flat: Flat,
    model: int,
    span: slice,
    base: Tensor | None,
    part: Kept,
    room: tuple[Tensor, Tensor],
) -> Tensor:
    """What is kept of a piece of a delta, scaled; in the first buffer of `room` or read-only."""
    buffer, spare = room
    delta = flat.read_delta(model, span, base, buffer)
    if part.sparsity is not None:
        delta = part.sparsity.keep(delta, span.start, buffer, spare)
    return delta if part.scale == 1 else torch.mul(delta, part.scale, out=buffer)


def _without_zeros(divisor: Tensor, spare: Tensor) -> Tensor:
    """In place, 1 instead of 0; sign and product, for comparing is five times slower."""
    torch.sign(divisor, out=spare).abs_().neg_().add_(1)
    return divisor.add_(spare)

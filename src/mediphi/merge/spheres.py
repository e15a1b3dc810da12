"""Weighted means and interpolation on the sphere: linear, slerp, multislerp, Karcher, model stock.

Each result is a linear combination of the models. Where its coefficients depend on angles, one pass
takes the Gram matrix of all dot products, the coefficients follow from it in float64, and a second
pass combines.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediphi.errors import MergeError
from mediphi.merge import pieces
from mediphi.merge.pieces import BLOCK, Flat, Operands, Scratch, longest, spans
from mediphi.merge.storage import Target

Floats = NDArray[np.float64]

PARALLEL = 0.9995
"""Above this cosine interpolation is linear; below its negative it is undefined."""
TINY = 1e-8
"""Norms up to this count as zero, as in mergekit."""
CANCELLED = math.sqrt((1 - PARALLEL) / 2)
"""Length of the mean of two unit vectors at the cosine -PARALLEL."""


class Vectors(NamedTuple):
    """Tensors as vectors from an origin: the base (float32 deltas), or None (the models)."""

    flat: Flat
    from_base: bool

    def read(self, number: int, span: slice, base: Tensor | None, buffer: Tensor) -> Tensor:
        """A piece in float32, possibly read-only."""
        if self.from_base:
            return self.flat.read_delta(number, span, base, buffer)
        return self.flat.models[number].read(span, buffer)

    def origin(self, span: slice, buffer: Tensor) -> Tensor | None:
        """A piece of the base in float32, where the vectors start from it."""
        return self.flat.read_base(span, buffer) if self.from_base else None


def from_origin(operands: Operands) -> Vectors:
    """The models themselves."""
    return Vectors(Flat(operands), False)


def from_base(operands: Operands) -> Vectors:
    """The models' deltas, or the models where there is no base."""
    return Vectors(Flat(operands), operands.deltas or operands.base is not None)


def gram(vectors: Vectors) -> Floats:
    """Dot products [vectors, vectors] in float64.

    Products are summed in float32 over blocks of 2**15 elements, their totals are exact: neither
    pieces nor threads matter.
    """
    flat = vectors.flat
    count, piece = len(flat.models), pieces.length_on(flat.device)
    scratch = Scratch(count + 2, longest(flat.size, piece, BLOCK), flat.device)
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    sums: list[list[Tensor]] = [[] for _ in pairs]
    for span in spans(flat.size, piece, BLOCK):
        first, product, *buffers = scratch.take(span)
        base = vectors.origin(span, first)
        read = [vectors.read(i, span, base, buffers[i]) for i in range(count)]
        for (i, j), own in zip(pairs, sums, strict=True):
            own += _sums_of_blocks(torch.mul(read[i], read[j], out=product))
    if flat.size == 0:
        return np.zeros((count, count))
    table = torch.stack([torch.cat(own) for own in sums]).double().cpu().numpy()
    if not np.isfinite(table).all():
        raise MergeError("the dot products overflow float32; look for huge or infinite values")
    result = np.zeros((count, count))
    for (i, j), row in zip(pairs, table, strict=True):
        result[i, j] = result[j, i] = math.fsum(row)
    return result


def _sums_of_blocks(values: Tensor) -> list[Tensor]:
    """Of BLOCK elements each, the last one perhaps of fewer; [blocks] in one or two pieces."""
    whole = len(values) // BLOCK * BLOCK
    rest = values[whole:]
    sums = [values[:whole].view(-1, BLOCK).sum(dim=1)] if whole else []
    return [*sums, rest.sum().view(1)] if len(rest) else sums


def combine(
    vectors: Vectors, coefficients: Sequence[float], out: Target, *, divisor: float = 1.0
) -> None:
    """Writes origin + sum_i coefficient_i * vector_i / divisor, rounded once."""
    flat = vectors.flat
    piece = pieces.length_on(flat.device)
    scratch = Scratch(3, longest(flat.size, piece), flat.device)
    for span in spans(flat.size, piece):
        total, buffer, room = scratch.take(span)
        base = vectors.origin(span, room)
        for number, coefficient in enumerate(coefficients):
            read = vectors.read(number, span, base, buffer)
            if number == 0:
                torch.mul(read, coefficient, out=total)
            else:
                total.add_(read, alpha=coefficient)
        if divisor != 1:
            total.div_(divisor)
        out.write(span, total if base is None else total.add_(base))


def weighted_mean(
    operands: Operands, weights: Sequence[float], *, normalize: bool, out: Target
) -> None:
    """sum_i weight_i * model_i, divided by the sum of the weights if asked."""
    divisor = float(torch.tensor(weights).sum()) if normalize else 1.0
    if divisor == 0:
        raise MergeError(
            f"the weights {tuple(weights)} sum to 0, which nothing can be divided by; "
            "change them or set normalize=false"
        )
    combine(from_origin(operands), weights, out, divisor=divisor)


def slerp(operands: Operands, t: float, *, out: Target) -> None:
    """Interpolates from the base (t = 0) to the model (t = 1) along the arc between them.

    Shoemake 1985: sin((1 - t) theta) / sin theta and sin(t theta) / sin theta, theta the angle of
    the two tensors as vectors; linear where they are nearly parallel. Raises MergeError where they
    are nearly opposite: no arc is the shortest.
    """
    if operands.base is None:
        raise MergeError("slerp interpolates from a base; name one")
    vectors = from_origin(Operands(None, (operands.base, *operands.models)))
    products = gram(vectors)
    norms = np.sqrt(products.diagonal())
    norms[norms <= TINY] = 1.0
    cosine = float(np.clip(products[0, 1] / norms.prod(), -1, 1))
    refuse_opposite(cosine, "the model and the base")
    if cosine > PARALLEL:
        shares = (1 - t, t)
    else:
        angle = math.acos(cosine)
        shares = tuple(math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    combine(vectors, shares, out)


def multislerp(
    operands: Operands, weights: Sequence[float], *, normalize: bool, out: Target
) -> None:
    """Barycentre of the directions in the tangent space at their weighted mean, times the weighted
    mean norm (Goddard 2025); from the base where there is one.

    Raises MergeError where the weighted directions cancel.
    """
    vectors = from_base(operands)
    if len(operands.models) == 1:
        return combine(vectors, [1.0], out)
    shares = np.asarray(weights, dtype=np.float64)
    if normalize:
        if shares.sum() == 0:
            raise MergeError(f"the weights {tuple(weights)} sum to 0; change them")
        shares = shares / shares.sum()
    products = gram(vectors)
    norms = np.sqrt(products.diagonal())
    units = products / np.outer(norms + TINY, norms + TINY)
    if not units.any():
        return combine(vectors, [0.0] * len(norms), out)
    length = _length(shares, units)
    if length < CANCELLED * np.abs(shares).sum():
        raise MergeError(
            "the models' directions cancel: their mean on the sphere is undefined; "
            "change the weights or use linear"
        )
    mean = shares / length
    tangent = shares - (shares @ units @ mean) * mean
    step = _length(tangent, units) + TINY
    result = mean * math.cos(step) + tangent * (math.sin(step) / step)
    scale = float(norms @ shares) / (norms + TINY)
    combine(vectors, (result * scale).tolist(), out)
    return None


def karcher(operands: Operands, *, max_iter: int, tol: float, out: Target) -> None:
    """The point on the sphere with the least squared angles to all models, times their mean norm,
    by steps in the tangent space (Karcher 1977, doi 10.1002/cpa.3160300502).

    Raises MergeError where a model lies opposite the mean.
    """
    vectors = from_origin(operands)
    count = len(operands.models)
    if count == 1:
        return combine(vectors, [1.0], out)
    products = gram(vectors)
    norms = np.sqrt(products.diagonal())
    valid = np.flatnonzero(norms > tol)
    coefficients = np.zeros(count)
    if len(valid):
        units = products[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        mean = _karcher_mean(units, max_iter, tol)
        coefficients[valid] = mean * norms.mean() / norms[valid]
    combine(vectors, coefficients.tolist(), out)
    return None


def _karcher_mean(units: Floats, max_iter: int, tol: float) -> Floats:
    """Coefficients of the mean of unit vectors, from their cosines [vectors, vectors]."""
    share = 1 / len(units)
    mean = np.full(len(units), share)
    length = _length(mean, units)
    mean = np.eye(len(units))[0] if length < tol else mean / length
    for _ in range(max_iter):
        cosines = np.clip(units @ mean, -1, 1)
        refuse_opposite(float(cosines.min()), "a model and the mean of all")
        angles = np.arccos(cosines)
        far = angles >= tol
        pull = np.where(far, share * angles / np.where(far, np.sin(angles), 1), 0)
        tangent = pull - (pull @ cosines) * mean
        step = _length(tangent, units)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean /= _length(mean, units)
    return mean


def _length(coefficients: Floats, units: Floats) -> float:
    """Length of a combination of vectors, from their dot products."""
    return math.sqrt(max(0.0, float(coefficients @ units @ coefficients)))


def refuse_opposite(cosine: float, who: str) -> None:
    """Raises MergeError below a cosine of -0.9995."""
    if cosine < -PARALLEL:
        raise MergeError(
            f"{who} point in opposite directions (cosine {cosine:.5f}, allowed from -{PARALLEL}); "
            "interpolation on a sphere is undefined there, use linear"
        )

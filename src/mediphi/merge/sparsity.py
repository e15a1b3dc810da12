"""What a sparse method keeps of each delta, and the size it gives to the rest.

Sources: TIES' trimming (Yadav et al. 2023, section 3), DARE's dropping (Yu et al. 2024, eq. 1),
Breadcrumbs' masks (Davari & Belilovsky 2024, section 3); counts as mergekit 0.1.5 rounds them.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mediphi.merge.pieces import BLOCK, Flat, Scratch, longest, spans
from mediphi.merge.windows import END, Ranks, Window, inner_ranks

RANDOM_BLOCK = 1 << 15
"""Elements that share a stream of random numbers."""
NOTHING = Window(END, END)
SMALLEST_NORM = 1e-7
"""Deltas whose sum of magnitudes is below are not rescaled, as in mergekit."""


class Sparsity(Protocol):
    """Decides which elements of a delta are kept."""

    def keep(self, delta: Tensor, start: int, out: Tensor, spare: Tensor) -> Tensor:
        """Writes the piece [elements] that begins at element `start` into `out`, zeros instead of
        what is dropped; `spare` is overwritten. Returns `out`."""
        ...


class Kept(NamedTuple):
    """One model's part: `sparsity` None keeps all, `scale` multiplies what is kept."""

    weight: float
    sparsity: Sparsity | None = None
    scale: float = 1.0


def trimmed_ranks(density: float, size: int) -> tuple[int, int]:
    """TIES: first rank kept, and one behind the last: the int(density * size) largest.

    Of a positive density at least one is kept.
    """
    count = max(1, int(density * size)) if density > 0 else 0
    return size - count, size


def crumb_ranks(density: float, gamma: float, size: int) -> tuple[int, int]:
    """Breadcrumbs: first rank kept, and one behind the last.

    The int(gamma * size) largest go first, then as many of the smallest as the density asks for;
    where these are too few, fewer of the largest go.
    """
    count = int(density * size)
    first = max(0, size - count - int(gamma * size))
    return first, first + count


class RowCrumbs(NamedTuple):
    """Breadcrumbs as in its paper: the same in every row by itself. Pieces must be whole rows."""

    density: float
    gamma: float
    width: int

    def keep(self, delta: Tensor, start: int, out: Tensor, spare: Tensor) -> Tensor:
        first, last = crumb_ranks(self.density, self.gamma, self.width)
        magnitudes = torch.abs(delta, out=spare).view(-1, self.width)
        ordered = _sorted_rows(magnitudes)
        kept = _not_before(magnitudes, ordered, first)
        kept &= ~_not_before(magnitudes, ordered, last)
        return torch.mul(delta, kept.view(-1), out=out)


def _sorted_rows(magnitudes: Tensor) -> Tensor:
    if magnitudes.device.type == "cpu":
        return torch.from_numpy(np.sort(magnitudes.numpy(), axis=1))  # much faster than torch's
    return torch.sort(magnitudes, dim=1).values


def _not_before(magnitudes: Tensor, ordered: Tensor, rank: int) -> Tensor:
    """Bool [rows, width]: elements of at least this rank within their row."""
    width = magnitudes.shape[1]
    if rank <= 0 or rank >= width:
        return torch.full_like(magnitudes, rank <= 0, dtype=torch.bool)
    edge = ordered[:, rank, None]
    ties_before = rank - (magnitudes < edge).sum(dim=1, keepdim=True)
    ties = magnitudes == edge
    return (magnitudes > edge) | (ties & (ties.cumsum(dim=1) > ties_before))


class RandomSparsity(NamedTuple):
    """DARE: every element is kept with a probability of `density`, by itself.

    The stream of a block of elements is seeded by (seed, model, block), so that the mask depends
    neither on pieces nor on threads.
    """

    density: float
    seed: int
    model: int

    def keep(self, delta: Tensor, start: int, out: Tensor, spare: Tensor) -> Tensor:
        stop = start + delta.numel()
        blocks = range(start // RANDOM_BLOCK, -(-stop // RANDOM_BLOCK))
        first = start - blocks.start * RANDOM_BLOCK
        kept = np.concatenate([self._block(block) for block in blocks])[first:][: stop - start]
        if delta.device.type == "cpu":
            with np.errstate(invalid="ignore"):  # infinity becomes NaN, which the engine notices
                np.multiply(delta.numpy(), kept, out=out.numpy())  # torch takes three times as long
            return out
        return torch.mul(delta, torch.from_numpy(kept).to(delta.device), out=out)

    def _block(self, number: int) -> np.ndarray:
        """Bool [RANDOM_BLOCK]."""
        stream = np.random.SFC64([self.seed, self.model, number])
        drawn = stream.random_raw(RANDOM_BLOCK // 2).astype("<u8", copy=False).view("<u4")
        return drawn < np.uint32(min(round(self.density * 2**32), 2**32 - 1))


def with_kept_size(flat: Flat, model: int, kept: Kept, unit: int) -> Kept:
    """The part scaled so that its sum of magnitudes is that of the whole delta, as in mergekit.

    Block sums are float32, their total is exact, so that neither pieces nor threads matter.
    """
    if kept.sparsity is None:
        return kept
    whole, left = [], []
    scratch = Scratch(4, longest(flat.size, BLOCK, unit), flat.device)
    for span in spans(flat.size, BLOCK, unit):
        room, buffer, out, spare = scratch.take(span)
        base = None if flat.deltas else flat.read_base(span, room)
        delta = flat.read_delta(model, span, base, buffer)
        whole.append(torch.abs(delta, out=spare).sum())
        left.append(kept.sparsity.keep(delta, span.start, out, spare).abs_().sum())
    sums = [torch.tensor(math.fsum(torch.stack(part).tolist())) for part in (whole, left)]
    if min(sums) < SMALLEST_NORM:
        return kept
    return kept._replace(scale=float(sums[0] / sums[1]))


class Sparsifier(NamedTuple):
    """Makes the sparsity of each model.

    Attributes:
        values: the method's parameters, of those per model one for each.
        size: elements of the tensor.
        row_width: elements of a row, where rows are cut by themselves.
    """

    method: str
    values: dict[str, list[float]]
    seed: int
    ranks: Ranks
    size: int
    row_width: int | None = None

    def of(self, model: int) -> Sparsity | None:
        """None: all is kept, as always from density 1 on, whatever gamma."""
        if self.method == "task_arithmetic" or self.values["density"][model] >= 1:
            return None
        density = self.values["density"][model]
        if density <= 0:
            return NOTHING
        if self.method.startswith("dare"):
            return RandomSparsity(density, self.seed, model)
        if self.row_width is not None:
            return RowCrumbs(density, self.values["gamma"][model], self.row_width)
        return self.ranks.window(model, *self._ranks_of(model))

    def _ranks_of(self, model: int) -> tuple[int, int]:
        density = self.values["density"][model]
        if self.method == "ties":
            return trimmed_ranks(density, self.size)
        return crumb_ranks(density, self.values["gamma"][model], self.size)

    def cuts(self) -> list[tuple[int, int]]:
        """(model, rank) of every cut that `of` will ask `ranks` for."""
        by_rank = self.method in ("ties", "breadcrumbs", "breadcrumbs_ties")
        if not by_rank or self.row_width is not None:
            return []
        return [
            (model, rank)
            for model, density in enumerate(self.values["density"])
            if 0 < density < 1
            for rank in inner_ranks(*self._ranks_of(model), self.size)
        ]

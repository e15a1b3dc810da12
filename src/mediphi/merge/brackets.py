"""The magnitude of a rank, found exactly without sorting.

As in Floyd & Rivest 1975 (doi 10.1145/360680.360691), a random sample gives a narrow bracket; one
pass counts what lies below it and gathers the few elements within. A miss is noticed and mended by
a further pass.
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
from mediphi.merge.pieces import Flat, Scratch, longest, spans
from mediphi.merge.windows import NOT_FINITE, Cut, Floats, nth_of

Mask = NDArray[np.bool_]
SPREAD = 2.5
"""Half the width of the first bracket, in standard deviations of the sampled rank."""
WORTH_COUNTING = 0.1
"""Ties at an end of a bracket are counted at once when they are this part of half its width."""


class Magnitudes:
    """|delta| of every model, made piece by piece in float32."""

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self.size = flat.size
        self.device = flat.device
        self._scratch = Scratch(2, longest(self.size, pieces.PIECE), self.device)
        self._sampled_base: Tensor | None = None

    def piece(self, model: int, span: slice, base: Tensor | None) -> Floats:
        """A piece, overwritten by the next one; `base` is that of the same slice."""
        delta, _ = self._scratch.take(span)
        return self._magnitudes(model, span, base, delta).numpy()

    def base(self, span: slice) -> Tensor | None:
        """A piece of the base, overwritten by the next one; None where it is not needed."""
        return (
            None if self._flat.deltas else self._flat.read_base(span, self._scratch.take(span)[1])
        )

    def whole(self, model: int) -> Tensor:
        """All of a model's, on its device."""
        everything = slice(0, self.size)
        delta, buffer = (torch.empty(self.size, device=self.device) for _ in range(2))
        base = None if self._flat.deltas else self._flat.read_base(everything, buffer)
        return self._magnitudes(model, everything, base, delta)

    def _magnitudes(self, model: int, span: slice, base: Tensor | None, out: Tensor) -> Tensor:
        return torch.abs(self._flat.read_delta(model, span, base, out), out=out)

    def sample(self, model: int) -> Floats:
        """Sorted magnitudes at evenly spaced places, the same for every model."""
        step = _prime_from(round(self.size ** (1 / 3)))
        values = self._flat.models[model].every(step)
        if not self._flat.deltas and self._flat.base is not None:
            if self._sampled_base is None:
                self._sampled_base = self._flat.base.every(step)
            values -= self._sampled_base
        return np.sort(values.abs_().numpy())


def _prime_from(number: int) -> int:
    """The first prime from a number on: evenly spaced, it falls into every row and column alike."""
    while number > 2 and any(number % other == 0 for other in range(2, math.isqrt(number) + 1)):
        number += 1
    return max(2, number)


def by_brackets(
    magnitudes: Magnitudes, cuts: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Cut]:
    """The cuts at some ranks of some models, all sought in the same passes over the data."""
    samples = {model: magnitudes.sample(model) for model, _ in cuts}
    searches = [_Search(model, rank, samples[model], magnitudes.size) for model, rank in cuts]
    while unfinished := [search for search in searches if search.found is None]:
        for search in unfinished:
            search.begin()
        gathered = _gather(magnitudes, unfinished)
        for search in unfinished:
            search.conclude(magnitudes, gathered[search.model])
    return {(s.model, s.rank): s.found for s in searches if s.found is not None}


class _Gathered(NamedTuple):
    """Elements from within any bracket, in the order of their indices."""

    values: Floats
    places: NDArray[np.int64]


def _gather(magnitudes: Magnitudes, searches: "list[_Search]") -> dict[int, _Gathered]:
    """One pass: every search counts; what lies within a model's brackets is gathered at once."""
    masks = np.empty((4, longest(magnitudes.size, pieces.PIECE)), dtype=bool)
    models = {search.model: [s for s in searches if s.model == search.model] for search in searches}
    values: dict[int, list[Floats]] = {model: [] for model in models}
    places: dict[int, list[NDArray[np.int64]]] = {model: [] for model in models}
    for span in spans(magnitudes.size, pieces.PIECE):
        base = magnitudes.base(span)
        within, other, *room = masks[:, : span.stop - span.start]
        for model, (first, *others) in models.items():
            piece = magnitudes.piece(model, span, base)
            first.count(piece, within, room)
            for search in others:
                search.count(piece, other, room)
                np.logical_or(within, other, out=within)
            found = np.flatnonzero(within)
            values[model].append(piece[found])
            found += span.start
            places[model].append(found)
    return {
        model: _Gathered(np.concatenate(values[model]), np.concatenate(places[model]))
        for model in models
    }


class _Search:
    """The search for one rank within a bracket of magnitudes, low to high.

    Elements equal to an end of the bracket are counted, not gathered: there may be millions. They
    are counted where the sample holds many of the kind, and where low = high; the counts stand
    piece by piece, to find an element by its number among its equals.
    """

    def __init__(self, model: int, rank: int, sample: Floats, size: int) -> None:
        self.model, self.rank = model, rank
        self.found: Cut | None = None
        self._sample = sample
        self._centre = rank * len(sample) / size
        share = rank / size
        self._reach = 2 + SPREAD * math.sqrt(len(sample) * share * (1 - share))
        self._floor, self._ceiling = np.float32(-1), np.float32(np.inf)  # the answer lies between
        self._low, self._high = self._bracket()

    def _bracket(self) -> tuple[np.float32, np.float32]:
        """Magnitudes around the rank in the sample, within what is known."""
        first = math.floor(self._centre - self._reach)
        last = math.ceil(self._centre + self._reach)
        low = self._sample[first] if first >= 0 else self._floor
        high = self._sample[last] if last < len(self._sample) else self._ceiling
        low = low if self._floor < low < self._ceiling else self._floor
        tried = high <= self._floor or not low <= high < self._ceiling
        return low, self._ceiling if tried else high

    def begin(self) -> None:
        """Makes ready for a pass over the pieces."""
        single = self._low == self._high
        self._ties = [single or self._repeats(end) for end in (self._low, self._high)]
        self._below = 0
        self._at_low: list[int] = []
        self._at_high: list[int] = []

    def _repeats(self, value: np.float32) -> bool:
        """Whether a good part of the sampled bracket equals a magnitude."""
        first = np.searchsorted(self._sample, value)
        last = np.searchsorted(self._sample, value, side="right")
        overlap = min(last, self._centre + self._reach) - max(first, self._centre - self._reach)
        return bool(overlap > self._reach * WORTH_COUNTING)

    def count(self, piece: Floats, inside: Mask, room: list[Mask]) -> None:
        """Counts in a piece of magnitudes, and marks the elements of the bracket `inside`.

        `room` holds masks [elements] to overwrite.
        """
        to_low, below = room
        np.less_equal(piece, self._low, out=to_low)
        count = up_to_low = int(np.count_nonzero(to_low))
        if self._ties[0]:
            np.less(piece, self._low, out=below)
            count = int(np.count_nonzero(below))
            self._at_low.append(up_to_low - count)
        self._below += count
        if self._low == self._high:
            inside[:] = False
            return
        if self._high == np.inf:
            np.logical_not(to_low, out=inside)
            return
        if self._ties[1]:
            np.less_equal(piece, self._high, out=below)
            up_to_high = int(np.count_nonzero(below))
        np.less(piece, self._high, out=below)
        if self._ties[1]:
            self._at_high.append(up_to_high - int(np.count_nonzero(below)))
        np.not_equal(below, to_low, out=inside)

    def conclude(self, magnitudes: Magnitudes, gathered: _Gathered) -> None:
        """Takes the answer from what was counted, or chooses the next bracket."""
        mine = (gathered.values > self._low) & (gathered.values < self._high)
        nth = self.rank - self._below
        groups = (sum(self._at_low), int(np.count_nonzero(mine)), sum(self._at_high))
        if nth < 0:
            self._aim(self._low, below=True)
        elif nth < groups[0]:
            self.found = self._tied(magnitudes, nth, self._low, self._at_low)
        elif nth < groups[0] + groups[1]:
            self.found = nth_of(gathered.values[mine], gathered.places[mine], nth - groups[0])
        elif nth < sum(groups):
            nth -= groups[0] + groups[1]
            self.found = self._tied(magnitudes, nth, self._high, self._at_high)
        else:
            self._aim(self._high, below=False)

    def _aim(self, end: np.float32, *, below: bool) -> None:
        """The answer lies beyond an end of the bracket, or on it where its ties went uncounted."""
        if not 0 <= end < np.inf:
            raise MergeError(NOT_FINITE)
        if not self._ties[0 if below else 1]:
            self._low = self._high = end
            return
        if below:
            self._ceiling = end
        else:
            self._floor = end
        self._reach *= 4
        self._low, self._high = self._bracket()

    def _tied(self, magnitudes: Magnitudes, nth: int, value: np.float32, counts: list[int]) -> Cut:
        """The nth of the elements equal to a value; its piece is read again."""
        ends = np.cumsum(counts)
        number = int(np.searchsorted(ends, nth, side="right"))
        span = list(spans(magnitudes.size, pieces.PIECE))[number]
        nth -= int(ends[number]) - counts[number]
        equal = magnitudes.piece(self.model, span, magnitudes.base(span)) == value
        return Cut(float(value), span.start + int(np.flatnonzero(equal)[nth]))

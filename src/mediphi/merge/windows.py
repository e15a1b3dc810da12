"""What is kept of a delta: a window of ranks of magnitude.

Elements are ranked by (magnitude, index), so that equal magnitudes, which bfloat16 models have by
the thousand, are cut at an exact count.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediphi.errors import MergeError

Floats = NDArray[np.float32]

NOT_FINITE = "a delta holds NaN or infinity; look for them in the models"


class Cut(NamedTuple):
    """The element of a rank: those of smaller (magnitude, index) lie before it."""

    magnitude: float
    index: int


START = Cut(0.0, 0)
END = Cut(math.inf, 0)


class Window(NamedTuple):
    """The kept elements of one delta: from `first` on, up to but without `last`."""

    first: Cut
    last: Cut

    def keep(self, delta: Tensor, start: int, out: Tensor, spare: Tensor) -> Tensor:
        """The piece of a delta with what is not kept set to zero.

        Args:
            delta: float32 [elements], the piece that begins at element `start`.
            out, spare: float32 [elements], overwritten; `out` may be `delta`.

        Returns:
            `out`.
        """
        stop = start + delta.numel()
        inner = [cut.index for cut in self if start < cut.index < stop]
        if not inner:
            self._keep(delta, start, out, spare)
            return out
        for low, high in pairwise(sorted({start, stop, *inner})):
            part = slice(low - start, high - start)
            self._keep(delta[part], low, out[part], spare[part])
        return out

    def _keep(self, delta: Tensor, start: int, out: Tensor, spare: Tensor) -> None:
        """The same for a piece on whose elements each cut treats ties alike."""
        if self.last.magnitude < math.inf:
            above = self.last.magnitude
            above = above if start < self.last.index else before(above)
            torch.hardshrink(delta, above, out=spare)
        below = self.first.magnitude
        torch.hardshrink(delta, before(below) if start >= self.first.index else below, out=out)
        if self.last.magnitude < math.inf:
            out.sub_(spare)  # x - x or x - 0, both exact


class Ranks(Protocol):
    """Knows where the magnitudes of deltas are cut."""

    def window(self, model: int, first: int, last: int) -> Window:
        """Elements of rank first..last-1, in ascending order of (magnitude, index)."""
        ...


@lru_cache(maxsize=1024)  # asked for every piece
def before(magnitude: float) -> float:
    """The float32 just below; 0 of 0: no delta of zero matters."""
    return float(np.nextafter(np.float32(magnitude), np.float32(0)))


def window_of(first: int, last: int, size: int, found: dict[int, Cut]) -> Window:
    """A window from the cuts at the ranks that need one; `found` holds these."""
    if first >= last:
        return Window(END, END)
    return Window(START if first <= 0 else found[first], END if last >= size else found[last])


def inner_ranks(first: int, last: int, size: int) -> list[int]:
    """The ranks of a window at which a magnitude must be found."""
    return [rank for rank in (first, last) if first < last and 0 < rank < size]


def cuts_of_whole(magnitudes: Floats, ranks: list[int]) -> dict[int, Cut]:
    """The cuts at some ranks of magnitudes [elements] held in memory."""
    ordered = np.sort(magnitudes)
    found = {}
    for rank in ranks:
        value = ordered[rank]
        refuse_nan(float(value))
        nth = rank - int(np.searchsorted(ordered, value))
        found[rank] = Cut(float(value), int(np.flatnonzero(magnitudes == value)[nth]))
    return found


def nth_of(values: Floats, places: NDArray[np.int64], nth: int) -> Cut:
    """The nth, by (magnitude, index), of some magnitudes at ascending indices."""
    value = np.partition(values, nth)[nth]
    nth -= int(np.count_nonzero(values < value))
    return Cut(float(value), int(places[np.flatnonzero(values == value)[nth]]))


def by_sorting(magnitudes: Tensor, ranks: list[int]) -> dict[int, Cut]:
    """The cuts at some ranks of magnitudes [elements] on any device."""
    ordered = torch.sort(magnitudes).values
    found = {}
    for rank in ranks:
        refuse_nan(float(ordered[rank]))
        nth = rank - int(torch.count_nonzero(magnitudes < ordered[rank]))
        place = torch.nonzero(magnitudes == ordered[rank])[nth]
        found[rank] = Cut(float(ordered[rank]), int(place))
    return found


def refuse_nan(magnitude: float) -> None:
    """NaN has no rank.

    Raises:
        MergeError: it is NaN.
    """
    if math.isnan(magnitude):
        raise MergeError(NOT_FINITE)

"""Order statistics of deltas, taken once and asked hundreds of times.

A search merges the same tensors at ever new densities. Here every element is filed once under a
bucket of similar magnitudes; the cut at a rank then costs a look at one bucket. The files take 2.1
bytes an element.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediphi.merge.selection import WHOLE
from mediphi.merge.windows import Cut, Floats, Window, cuts_of_whole, inner_ranks, nth_of, window_of

CHUNK = 1 << 16
"""Elements filed together: places within fit 16 bits."""
BUCKETS = 1 << 10
"""Buckets asked for; heavily tied magnitudes get buckets of their own on top."""
_KEYS = 1 << 16
_SHIFT = np.uint32(15)  # sign gone, exponent and 8 bits of the mantissa stay: bfloat16 and one bit


class Delta(NamedTuple):
    """A float32 difference of two tensors, made where it is looked at.

    Attributes:
        model, base: on the CPU, contiguous, of one size; they must not change. Without a base the
            model is the difference.
    """

    model: Tensor
    base: Tensor | None = None

    def whole(self) -> Floats:
        """All of it [elements]."""
        model = self.model.detach().view(-1).float()
        return (model if self.base is None else model - self.base.detach().view(-1)).numpy()

    def at(self, places: NDArray[np.int64]) -> Floats:
        """Some elements [places]."""
        chosen = torch.from_numpy(places)
        found = self.model.detach().view(-1)[chosen].float()
        if self.base is not None:
            found -= self.base.detach().view(-1)[chosen]
        return found.numpy()


class OrderStatistics:
    """Ranks of the magnitudes of some deltas, all of one size; a `Ranks` for `merge_tensor`."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self._size = deltas[0].model.numel()
        self._filed = [_file(delta) for delta in deltas]

    def window(self, model: int, first: int, last: int) -> Window:
        filed = self._filed[model]
        found = {rank: filed.cut(rank) for rank in inner_ranks(first, last, self._size)}
        return window_of(first, last, self._size, found)


class _Whole(NamedTuple):
    """A small delta: its magnitudes are sorted anew for every cut."""

    delta: Delta

    def cut(self, rank: int) -> Cut:
        return cuts_of_whole(np.abs(self.delta.whole()), [rank])[rank]


class _Filed(NamedTuple):
    """A large delta.

    Attributes:
        places: uint16 [elements], within each chunk by bucket, then by index.
        edges: int32 [chunks, buckets + 1], where each bucket begins in each chunk's places.
        ends: int64 [buckets], elements in this and all lower buckets.
        lows, highs: float32 [buckets], smallest and largest magnitude of each.
    """

    delta: Delta
    places: NDArray[np.uint16]
    edges: NDArray[np.int32]
    ends: NDArray[np.int64]
    lows: Floats
    highs: Floats

    def cut(self, rank: int) -> Cut:
        bucket = int(np.searchsorted(self.ends, rank, side="right"))
        counts = self.edges[:, bucket + 1] - self.edges[:, bucket]
        nth = rank - int(self.ends[bucket]) + int(counts.sum())
        if self.lows[bucket] == self.highs[bucket]:
            ends = np.cumsum(counts)
            chunk = int(np.searchsorted(ends, nth, side="right"))
            nth -= int(ends[chunk] - counts[chunk])
            return Cut(float(self.lows[bucket]), int(self._members(chunk, bucket)[nth]))
        members = [self._members(chunk, bucket) for chunk in np.flatnonzero(counts).tolist()]
        indices = np.concatenate(members)
        return nth_of(np.abs(self.delta.at(indices)), indices, nth)

    def _members(self, chunk: int, bucket: int) -> NDArray[np.int64]:
        """Indices of the elements of a bucket in a chunk, ascending."""
        start = chunk * CHUNK
        first, last = self.edges[chunk, bucket], self.edges[chunk, bucket + 1]
        return self.places[start + first : start + last].astype(np.int64) + start


def _file(delta: Delta) -> _Whole | _Filed:
    """Files the elements of a delta."""
    if delta.model.numel() <= WHOLE:
        return _Whole(delta)
    values = delta.whole()
    chunks = [values[start : start + CHUNK] for start in range(0, values.size, CHUNK)]
    buckets = _buckets(chunks)
    number = buckets.number
    places = np.empty(values.size, np.uint16)
    edges = np.empty((len(chunks), number + 1), np.int32)
    lows = np.full(number, np.inf, np.float32)
    highs = np.full(number, -1, np.float32)
    for row, chunk in enumerate(chunks):
        magnitudes = torch.abs(torch.from_numpy(chunk)).numpy()
        codes = buckets.of(magnitudes)
        order = np.argsort(codes, kind="stable")
        edges[row] = np.concatenate(([0], np.cumsum(np.bincount(codes, minlength=number))))
        places[row * CHUNK : row * CHUNK + chunk.size] = order
        present = np.flatnonzero(np.diff(edges[row]))
        ordered = magnitudes[order]
        starts = edges[row, present]
        lows[present] = np.minimum(lows[present], np.minimum.reduceat(ordered, starts))
        highs[present] = np.maximum(highs[present], np.maximum.reduceat(ordered, starts))
    ends = np.cumsum((edges[:, 1:] - edges[:, :-1]).sum(axis=0, dtype=np.int64))
    return _Filed(delta, places, edges, ends, lows, highs)


class _Buckets(NamedTuple):
    """Maps magnitudes to buckets, in order.

    Attributes:
        first: uint16 [keys], the bucket of a key.
        common: float32 [keys], the magnitude that is most of a heavy key: smaller ones go to the
            key's first bucket, itself to the next, larger ones to the third; elsewhere infinite.
    """

    first: NDArray[np.uint16]
    common: Floats
    number: int

    def of(self, magnitudes: Floats) -> NDArray[np.uint16]:
        keys = _keys(magnitudes)
        common = self.common[keys]
        codes = self.first[keys]
        codes += magnitudes >= common
        codes += magnitudes > common
        return codes


def _keys(magnitudes: Floats) -> NDArray[np.uint32]:
    """The upper half of each magnitude's bits, which orders as the magnitude does."""
    return magnitudes.view(np.uint32) >> _SHIFT


def _buckets(chunks: Sequence[Floats]) -> _Buckets:
    """Buckets of about equally many elements, with heavy keys in buckets of their own."""
    counts = np.zeros(_KEYS, np.int64)
    for chunk in chunks:
        counts += np.bincount(_keys(np.abs(chunk)), minlength=_KEYS)
    size = int(counts.sum())
    even = (np.cumsum(counts) - counts) * BUCKETS // size
    heavy = counts * BUCKETS > size
    steps = np.zeros(_KEYS, np.int64)
    steps[1:] = (even[1:] != even[:-1]) | heavy[1:] | heavy[:-1]
    steps[1:] += 2 * heavy[:-1]
    first = np.cumsum(steps)
    return _Buckets(
        first.astype(np.uint16),
        np.where(heavy, _common(chunks), np.float32(np.inf)),
        int(first[-1]) + 1 + 2 * int(heavy[-1]),
    )


def _common(chunks: Sequence[Floats]) -> Floats:
    """The most frequent magnitude of every key in a sample; float32 [keys]."""
    sample = np.abs(np.concatenate([chunk[:: len(chunks)] for chunk in chunks]))
    values, counts = np.unique(sample, return_counts=True)
    order = np.argsort(counts, kind="stable")
    common = np.full(_KEYS, np.inf, np.float32)
    common[_keys(values[order])] = values[order]  # the last one assigned, the most frequent, stays
    return common

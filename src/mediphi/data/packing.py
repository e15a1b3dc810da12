"""Best-fit-decreasing packing as an index: no token is copied, none is dropped.

Lengths are integers up to the capacity, so whole groups are placed at once: all items of one length
against all bins of one remaining space. The number of numpy operations then depends on the number
of distinct lengths, not of documents. Best-fit packing: Ding et al. 2024, arXiv 2404.10830.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Packing(NamedTuple):
    """Which chunks of which sequences share a row.

    Attributes:
        sequence: int64 `[chunks]`, index of the sequence that a chunk belongs to, row by row.
        start: int64 `[chunks]`, where the chunk starts inside its sequence.
        length: int64 `[chunks]`, tokens of the chunk, at most `capacity`.
        row_ends: int64 `[rows + 1]`, row `r` holds the chunks `row_ends[r]:row_ends[r + 1]`.
        is_long: bool `[rows]`, rows whose chunks are longer than the LongRoPE boundary.
        capacity: tokens that a row may hold.
    """

    sequence: Ints
    start: Ints
    length: Ints
    row_ends: Ints
    is_long: NDArray[np.bool_]
    capacity: int

    @property
    def num_rows(self) -> int:
        return len(self.row_ends) - 1

    @property
    def row_tokens(self) -> Ints:
        """Tokens of every row, int64 `[rows]`."""
        ends = np.concatenate([[0], np.cumsum(self.length)])
        return np.diff(ends[self.row_ends])

    @property
    def fill(self) -> float:
        """Share of the rows' capacity that holds tokens."""
        return int(self.length.sum()) / max(1, self.num_rows * self.capacity)


def pack(
    lengths: Ints, *, capacity: int, long_above: int | None = None, reach: Ints | None = None
) -> Packing:
    """Pack sequences into rows of `capacity` tokens by best-fit-decreasing.

    Sequences longer than `capacity` are split, not cut. Chunks longer than `long_above` get rows of
    their own kind, because LongRoPE picks its factors for the whole micro-batch.

    Args:
        lengths: int64 `[sequences]`, tokens of each sequence, at least 1.
        capacity: tokens of a row, at least 3.
        long_above: `original_max_position_embeddings` of a LongRoPE model; None: one kind of row.
        reach: int64 `[sequences]`, positions that the model sees of a sequence that is not split,
            where they are not as many as its tokens.

    Raises:
        ValueError: a length below 1 or a capacity below 3.
    """
    sequence, start, length = _split(np.asarray(lengths, dtype=np.int64), capacity)
    seen = length if reach is None else np.minimum(reach[sequence], length)
    is_long = seen > (capacity if long_above is None else long_above)
    row = np.empty(len(length), dtype=np.int64)
    num_short = _place(row, length, np.flatnonzero(~is_long), capacity, first_row=0)
    num_rows = _place(row, length, np.flatnonzero(is_long), capacity, first_row=num_short)
    order = _argsort(row)
    row_ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))])
    return Packing(
        sequence=sequence[order],
        start=start[order],
        length=length[order],
        row_ends=row_ends.astype(np.int64),
        is_long=np.arange(num_rows) >= num_short,
        capacity=capacity,
    )


def _split(lengths: Ints, capacity: int) -> tuple[Ints, Ints, Ints]:
    """Sequence, start and length of every chunk. No chunk has one token unless its sequence has.

    A lone last token would have no target, so the chunk before it lends it one.
    """
    if capacity < 3 or (len(lengths) and lengths.min() < 1):
        raise ValueError(f"capacity {capacity} is below 3 or a length is below 1")
    counts = -(-lengths // capacity)
    if len(lengths) == int(counts.sum()):
        return np.arange(len(lengths)), np.zeros_like(lengths), lengths
    sequence = np.repeat(np.arange(len(lengths)), counts)
    ends = np.cumsum(counts)
    start = (np.arange(len(sequence)) - np.repeat(ends - counts, counts)) * capacity
    start[ends[(lengths % capacity == 1) & (counts > 1)] - 1] -= 1
    stop = np.append(start[1:], 0)
    stop[ends - 1] = lengths
    return sequence, start, stop - start


def _place(row: Ints, length: Ints, chosen: Ints, capacity: int, *, first_row: int) -> int:
    """Write the row of every chosen chunk into `row`; return the first free row number."""
    if not len(chosen):
        return first_row
    order = chosen[_argsort(capacity - length[chosen])]
    falling = length[order]
    edges = np.flatnonzero(np.diff(falling)) + 1
    runs = zip(
        falling[np.append(0, edges)].tolist(),
        np.append(0, edges).tolist(),
        np.append(edges, len(falling)).tolist(),
        strict=True,
    )
    spaces = _Spaces(capacity, first_row)
    placed = np.empty(len(order), dtype=np.int64)
    for size, begin, end in runs:
        spaces.fill(placed[begin:end], size)
    row[order] = placed
    return spaces.next_row


class _Spaces:
    """Rows grouped by the space they have left, with the smallest sufficient space at hand."""

    def __init__(self, capacity: int, first_row: int) -> None:
        self.capacity = capacity
        self.next_row = first_row
        self.rows: dict[int, list[Ints]] = {}
        self.spaces = 0  # bit s is set when some row has s tokens left

    def fill(self, placed: Ints, size: int) -> None:
        """Best fit for `len(placed)` equal items of `size` tokens; their rows go to `placed`.

        A row that took one still has the smallest sufficient space, so it takes the next as well:
        every row of the group takes `space // size` before the next larger space is touched.
        """
        done, wanted = 0, len(placed)
        while done < wanted:
            space = self._smallest(size)
            each = space // size
            needed = -(-(wanted - done) // each)
            rows = self._take(space, needed)
            part = np.repeat(rows, each)[: wanted - done] if each > 1 else rows
            placed[done : done + len(part)] = part
            done += len(part)
            last = len(part) - each * (len(rows) - 1)
            if last == each:
                self._give(space - each * size, rows)
            else:
                self._give(space - each * size, rows[:-1])
                self._give(space - last * size, rows[-1:])

    def _smallest(self, size: int) -> int:
        fitting = self.spaces >> size
        if not fitting:
            return self.capacity
        return size + (fitting & -fitting).bit_length() - 1

    def _take(self, space: int, wanted: int) -> Ints:
        """Up to `wanted` rows with exactly this space; new ones when it is the whole capacity."""
        if space == self.capacity:
            self.next_row += wanted
            return np.arange(self.next_row - wanted, self.next_row)
        groups = self.rows.pop(space)
        rows = groups[0] if len(groups) == 1 else np.concatenate(groups)
        if len(rows) > wanted:
            self.rows[space] = [rows[wanted:]]
        else:
            self.spaces ^= 1 << space
        return rows[:wanted]

    def _give(self, space: int, rows: Ints) -> None:
        if not space or not len(rows):
            return
        if space in self.rows:
            self.rows[space].append(rows)
        else:
            self.rows[space] = [rows]
            self.spaces |= 1 << space


def expand(starts: Ints, lengths: Ints) -> Ints:
    """Numbers of all ranges `starts[i] : starts[i] + lengths[i]`, end to end: int64 `[sum]`."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _argsort(values: Ints) -> Ints:
    """Stable order of non-negative integers; numpy's radix sort wants 16-bit keys."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    high = values >> 16
    if not high.any():
        return order
    return order[np.argsort(high[order].astype(np.uint16), kind="stable")]

"""Reading tensors piece by piece, in float32.

A merge never holds a float32 copy of a whole tensor: it goes through it in pieces that fit a cache.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from mediphi.merge.storage import StoredTensor, bytes_of

PIECE = 1 << 18
"""Elements worked on at once. It steers speed alone: no result depends on it."""

DEVICE_PIECE = 1 << 24
"""The same on a GPU, where a kernel must be worth its start."""
BLOCK = 1 << 15
"""Elements summed in float32 before sums go on in float64. Results depend on it, so it is no
setting; torch sums this many on one thread, in one order."""


class Operands(NamedTuple):
    """One tensor of every model.

    Attributes:
        base: float32, bfloat16 or float16, any shape; None where a method needs none.
        models: tensors of the same shape, in the order of the weights.
        deltas: whether `models` are float32 differences from the base instead.
    """

    base: Tensor | StoredTensor | None
    models: tuple[Tensor | StoredTensor, ...]
    deltas: bool = False

    @property
    def size(self) -> int:
        """Elements of one tensor."""
        return self.models[0].numel()


def length_on(device: torch.device) -> int:
    """Elements worked on at once there."""
    return PIECE if device.type == "cpu" else DEVICE_PIECE


def spans(size: int, length: int, unit: int = 1) -> Iterator[slice]:
    """Consecutive slices over `size` elements: of about `length`, each a multiple of `unit`."""
    length = max(1, length // unit) * unit
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def longest(size: int, length: int, unit: int = 1) -> int:
    """Length of the longest slice that `spans` yields."""
    return min(size, max(1, length // unit) * unit)


class _Spare(threading.local):
    """Buffers that nobody uses, by length: memory given back would be cleared again."""

    def __init__(self) -> None:
        self.buffers: defaultdict[int, list[Tensor]] = defaultdict(list)


_spare = _Spare()


class Scratch:
    """Float32 buffers, handed out cut to the length of a piece; nothing of them outlives it.

    Those on the CPU that are as long as a whole piece wait for the thread's next tensor.
    """

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        self._length = length
        self._buffers: tuple[Tensor, ...] = ()
        waiting = _spare.buffers[length] if self._waits(device) else []
        found = [waiting.pop() for _ in range(min(count, len(waiting)))]
        made = [torch.empty(length, device=device) for _ in range(count - len(found))]
        self._buffers = (*found, *made)

    def _waits(self, device: torch.device) -> bool:
        return self._length == PIECE and device.type == "cpu"

    def __del__(self) -> None:
        if self._buffers and self._waits(self._buffers[0].device):
            _spare.buffers[self._length] += self._buffers

    def take(self, span: slice) -> tuple[Tensor, ...]:
        """All buffers, as long as the slice."""
        length = span.stop - span.start
        if length == self._length:
            return self._buffers
        return tuple(buffer[:length] for buffer in self._buffers)


class Room:
    """Where pieces wait as they are stored. All vectors share one, which so stays in the cache."""

    def __init__(self) -> None:
        self._for: tuple[int, torch.dtype] | None = None
        self._room: tuple[Tensor, memoryview]

    def take(self, length: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """Elements, and the same as bytes; overwritten by the next piece."""
        if self._for != (length, dtype):
            self._for = length, dtype
            elements = torch.empty(length, dtype=dtype)
            self._room = elements, bytes_of(elements)
        return self._room


class Vector:
    """A tensor read piece by piece as float32 [elements]."""

    def __init__(self, tensor: Tensor | StoredTensor, room: Room) -> None:
        stored = isinstance(tensor, StoredTensor)
        self.device = torch.device("cpu") if stored else tensor.device
        self._source = tensor if stored else tensor.reshape(-1)
        self._is_float32 = tensor.dtype is torch.float32
        self._room = room

    def read(self, span: slice, buffer: Tensor) -> Tensor:
        """A piece: a read-only view, or written into the buffer."""
        source = self._source
        if self._is_float32:
            if not isinstance(source, StoredTensor):
                return source[span]
            source.read_into(bytes_of(buffer), span.start)
            return buffer
        if self.device.type != "cpu":
            return buffer.copy_(source[span])
        room, in_bytes = self._room.take(span.stop - span.start, self._source.dtype)
        if isinstance(source, StoredTensor):
            source.read_into(in_bytes, span.start)
        else:  # bytes are copied from memory at twice the speed at which torch converts from it
            in_bytes[:] = bytes_of(source[span])
        return buffer.copy_(room)

    def every(self, step: int) -> Float32[Tensor, " elements"]:
        """A copy of the elements 0, step, 2 * step, ..."""
        source = self._source
        if not isinstance(source, StoredTensor):
            return source[::step].to(torch.float32, copy=True)
        found = []
        for span in spans(source.numel(), PIECE):
            room, in_bytes = self._room.take(span.stop - span.start, self._source.dtype)
            source.read_into(in_bytes, span.start)
            found.append(room[-span.start % step :: step].to(torch.float32, copy=True))
        return torch.cat(found)


class Flat:
    """Operands seen as vectors; what it returns is float32 and read-only."""

    def __init__(self, operands: Operands) -> None:
        room = Room()
        self.base = None if operands.base is None else Vector(operands.base, room)
        self.models = [Vector(model, room) for model in operands.models]
        self.deltas = operands.deltas
        self.size = operands.size
        self.device = self.models[0].device

    def read_base(self, span: slice, buffer: Tensor) -> Tensor:
        """A piece of the base; zeros without one."""
        return buffer.zero_() if self.base is None else self.base.read(span, buffer)

    def read_delta(self, model: int, span: slice, base: Tensor | None, buffer: Tensor) -> Tensor:
        """A piece of model - base.

        Args:
            base: the same piece of the base; None where the deltas are given.
            buffer: where it is written unless the deltas are given.
        """
        piece = self.models[model].read(span, buffer)
        return piece if base is None else torch.sub(piece, base, out=buffer)

"""Reading tensors piece by piece, in float32.

A merge never holds a float32 copy of a whole tensor: it goes through it in pieces that fit a cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 16
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

    base: Tensor | None
    models: tuple[Tensor, ...]
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


class Scratch:
    """Float32 buffers, allocated once and handed out cut to the length of a piece."""

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        self._length = length
        self._buffers = tuple(torch.empty(length, device=device) for _ in range(count))

    def take(self, span: slice) -> tuple[Tensor, ...]:
        """All buffers, as long as the slice."""
        length = span.stop - span.start
        if length == self._length:
            return self._buffers
        return tuple(buffer[:length] for buffer in self._buffers)


class Vector:
    """A tensor read piece by piece as float32 [elements]."""

    def __init__(self, tensor: Tensor) -> None:
        self.flat = tensor.reshape(-1)
        on_cpu = self.flat.device.type == "cpu"
        halved = self.flat.element_size() == 2
        self._raw = self.flat.view(torch.int16).numpy() if on_cpu and halved else None
        self._room = self.flat[:0]

    def read(self, span: slice, buffer: Tensor) -> Tensor:
        """A piece: a read-only view, or written into the buffer.

        Half-precision pieces are copied before they are converted: numpy copies from memory at
        twice the speed at which torch converts from it.
        """
        if self.flat.dtype is torch.float32:
            return self.flat[span]
        if self._raw is None:
            return buffer.copy_(self.flat[span])
        if len(buffer) != len(self._room):
            self._room = torch.empty(len(buffer), dtype=self.flat.dtype)
            self._room_raw = self._room.view(torch.int16).numpy()
        np.copyto(self._room_raw, self._raw[span])
        return buffer.copy_(self._room)


class Flat:
    """Operands seen as vectors; what it returns is float32 and read-only."""

    def __init__(self, operands: Operands) -> None:
        self.base = None if operands.base is None else Vector(operands.base)
        self.models = [Vector(model) for model in operands.models]
        self.deltas = operands.deltas
        self.size = operands.size
        self.device = operands.models[0].device

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

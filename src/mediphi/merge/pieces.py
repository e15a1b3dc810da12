"""Reading tensors piece by piece, in float32.

A merge never holds a float32 copy of a whole tensor: it goes through it in pieces that fit a cache.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
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

    def __init__(self, tensor: Tensor | StoredTensor) -> None:
        stored = isinstance(tensor, StoredTensor)
        self.device = torch.device("cpu") if stored else tensor.device
        self._source = tensor if stored else tensor.reshape(-1)
        self._room = torch.empty(0, dtype=tensor.dtype)

    def read(self, span: slice, buffer: Tensor) -> Tensor:
        """A piece: a read-only view, or written into the buffer."""
        source = self._source
        if isinstance(source, StoredTensor):
            if source.dtype is torch.float32:
                return source.read_into(buffer, span.start)
            return buffer.copy_(source.read_into(self._room_for(buffer), span.start))
        if source.dtype is torch.float32:
            return source[span]
        if self.device.type != "cpu":
            return buffer.copy_(source[span])
        # Bytes are copied from memory at twice the speed at which torch converts from it.
        room = self._room_for(buffer)
        bytes_of(room)[:] = bytes_of(source[span])
        return buffer.copy_(room)

    def _room_for(self, buffer: Tensor) -> Tensor:
        if len(buffer) != len(self._room):
            self._room = torch.empty(len(buffer), dtype=self._source.dtype)
        return self._room

    def at(self, places: Int64[Tensor, " places"]) -> Float32[Tensor, " places"]:
        """The elements at ascending places."""
        source = self._source
        if not isinstance(source, StoredTensor):
            return source[places].float()
        size = source.numel()
        room = torch.empty(longest(size, PIECE), dtype=source.dtype)
        bounds = [0, *np.searchsorted(places.numpy(), [s.stop for s in spans(size, PIECE)])]
        found = [
            source.read_into(room[: span.stop - span.start], span.start)[own - span.start].float()
            for span, own in zip(
                spans(size, PIECE), (places[i:j] for i, j in pairwise(bounds)), strict=True
            )
        ]
        return torch.cat(found)


class Flat:
    """Operands seen as vectors; what it returns is float32 and read-only."""

    def __init__(self, operands: Operands) -> None:
        self.base = None if operands.base is None else Vector(operands.base)
        self.models = [Vector(model) for model in operands.models]
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

"""Tensors in files, read and written by pieces: plain reads and writes of the kernel's cache.

Mapped memory would do with one copy less, but each of its pages costs a fault, and what is written
to it on a full disk ends the process.
"""

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mediphi.errors import ArtifactError


class ReadOnlyFile:
    """An open file; closed once nobody holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class StoredTensor:
    """A tensor in a file; threads may read it together.

    Args:
        start: its first byte in the file.
    """

    def __init__(
        self, file: ReadOnlyFile, *, start: int, dtype: torch.dtype, shape: Sequence[int]
    ) -> None:
        self.dtype, self.shape = dtype, torch.Size(shape)
        self._file, self._start = file, start

    def numel(self) -> int:
        return self.shape.numel()

    def read_into(self, room: memoryview, first: int) -> None:
        """Fill `room`, bytes, with what begins at element `first`.

        Raises:
            ArtifactError: the file ends before, or cannot be read.
        """
        try:
            count = os.preadv(self._file.handle, [room], self._start + first * self.dtype.itemsize)
        except OSError as error:
            raise ArtifactError(f"{self._file.path}: not readable ({error.strerror})") from None
        if count != len(room):
            raise ArtifactError(f"{self._file.path}: it has become shorter while it was read")


class Target(ABC):
    """Where a merged tensor goes, piece by piece from its beginning."""

    dtype: torch.dtype
    shape: torch.Size

    @abstractmethod
    def write(self, span: slice, piece: Tensor) -> None:
        """Write the elements of a slice, rounded to `dtype`."""


class InMemory(Target):
    """A contiguous tensor as a target."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._flat = tensor.view(-1)

    def write(self, span: slice, piece: Tensor) -> None:
        self._flat[span].copy_(piece)


class InFile(Target):
    """A place in a file that is open for writing.

    Attributes:
        checksum: CRC-32 of the bytes written so far.
        is_finite: whether all numbers written so far are.
    """

    def __init__(
        self, handle: int, *, start: int, dtype: torch.dtype, shape: Sequence[int]
    ) -> None:
        self.dtype, self.shape = dtype, torch.Size(shape)
        self.checksum, self.is_finite = 0, True
        self._handle, self._position, self._written = handle, start, 0
        self._room = torch.empty(0, dtype=dtype)

    def write(self, span: slice, piece: Tensor) -> None:
        if span.start != self._written:  # the checksum is of bytes in their order
            raise ValueError(f"the piece at {span.start} does not follow {self._written} elements")
        self._written += len(piece)
        if len(piece) != len(self._room):
            self._room = torch.empty(len(piece), dtype=self.dtype)
        room = self._room.copy_(piece)
        self.is_finite = self.is_finite and is_finite(room)
        written = bytes_of(room)
        self.checksum = zlib.crc32(written, self.checksum)
        while len(written):
            count = os.pwrite(self._handle, written, self._position)
            self._position, written = self._position + count, written[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor [elements], shared."""
    return tensor.view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are. One pass without a copy: NaN goes through minimum and maximum."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())

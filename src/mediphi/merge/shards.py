"""Safetensors shards of bounded size, written in any order and continued after a kill.

Where every tensor will lie is known before the first is written. A journal says which are written,
with a checksum; what it says is believed only if the bytes agree.
"""

import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from mediphi.artifacts import preflight_space, room_for, write_atomic
from mediphi.merge.checkpoints import DTYPES, WHOLE_DTYPES
from mediphi.merge.storage import InFile

JOURNAL = "journal.jsonl"
PARTIAL = "shard-{}.partial"
ALIGNMENT = 64
"""Bytes; of a file's first tensor. Larger dtypes come first, so that all are aligned."""
READ_BYTES = 2**20
SYNC_EVERY = 2**28
"""Bytes; what a power cut may cost. A kill costs nothing but the tensors in hand."""

_CODES = {dtype: code for code, dtype in (DTYPES | WHOLE_DTYPES).items()}


class Slot(NamedTuple):
    """Where a tensor will lie.

    Attributes:
        start: first byte, from the beginning of the file.
    """

    shard: int
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shard(NamedTuple):
    """One file: what it begins with, and its size in bytes."""

    header: bytes
    size: int
    names: tuple[str, ...]


class Layout(NamedTuple):
    """Where everything will lie."""

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]

    @property
    def num_bytes(self) -> int:
        return sum(slot.size for slot in self.slots.values())

    def file_names(self) -> list[str]:
        """As Hugging Face names them."""
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def plan(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, max_shard_bytes: int
) -> Layout:
    """Fill shards with tensors in their order; one that is larger than a shard has its own."""
    groups: list[dict[str, int]] = [{}]
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if groups[-1] and sum(groups[-1].values()) + size > max_shard_bytes:
            groups.append({})
        groups[-1][name] = size
    shards, slots = [], {}
    for number, group in enumerate(groups):
        names = sorted(group, key=lambda name: -tensors[name][0].itemsize)  # stable
        offsets, end = {}, 0
        for name in names:
            offsets[name], end = end, end + group[name]
        header = _header({n: (*tensors[n], offsets[n], offsets[n] + group[n]) for n in names})
        shards.append(Shard(header, len(header) + end, tuple(names)))
        slots |= {n: Slot(number, len(header) + offsets[n], group[n], *tensors[n]) for n in names}
    return Layout(tuple(shards), {name: slots[name] for name in tensors})


def _header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...], int, int]]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, start, end) in entries.items():
        place = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        content[name] = place
    raw = json.dumps(content, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


class PartialShards:
    """Shards being written in `scratch`, under names that nobody takes for a model's.

    Methods may be called by several threads, each for its own tensors.
    """

    def __init__(self, scratch: Path, layout: Layout, *, job_hash: str) -> None:
        """Open or make the files; what another job left in `scratch` is thrown away.

        Raises:
            MachineError: the disk is full; nothing has been computed yet.
        """
        self.layout = layout
        self.paths = shard_paths(scratch, layout)
        self._journal = scratch / JOURNAL
        self._lock = threading.Lock()
        self._unsynced = 0
        checksums = _read_journal(self._journal, job_hash)
        if checksums is None:
            for path in (self._journal, *scratch.glob(PARTIAL.format("*"))):
                path.unlink(missing_ok=True)
        self._checksums = checksums or {}
        scratch.mkdir(parents=True, exist_ok=True)
        preflight_space(scratch, layout.num_bytes)
        lines = [{"job": job_hash}, *(_line(*entry) for entry in self._checksums.items())]
        # Anew: an unfinished last line would swallow the next.
        write_atomic(self._journal, "".join(json.dumps(line) + "\n" for line in lines))
        with room_for(scratch, layout.num_bytes):
            self._files = [_reserved(*pair) for pair in zip(self.paths, layout.shards, strict=True)]

    def place(self, name: str) -> InFile:
        """Where the tensor is to be written."""
        slot = self.layout.slots[name]
        handle = self._files[slot.shard].fileno()
        return InFile(handle, start=slot.start, dtype=slot.dtype, shape=slot.shape)

    def holds(self, name: str) -> bool:
        """Whether an earlier attempt wrote the tensor, and its bytes are still the same."""
        return name in self._checksums and self._checksums[name] == self._checksum(name)

    def seal(self, name: str, checksum: int) -> None:
        """Note that the tensor is written, and the CRC-32 of its bytes."""
        line = json.dumps(_line(name, checksum)) + "\n"
        with self._lock:
            with self._journal.open("ab", buffering=0) as journal:
                journal.write(line.encode())
            self._unsynced += self.layout.slots[name].size
            due = self._unsynced >= SYNC_EVERY
            if due:
                self._unsynced = 0
        if due:
            self.sync()

    def sync(self) -> None:
        """Make durable what is written."""
        for file in self._files:
            os.fsync(file.fileno())
        with self._journal.open("rb") as journal:
            os.fsync(journal.fileno())

    def close(self) -> None:
        """Nothing can be written any more."""
        for file in self._files:
            file.close()

    def _checksum(self, name: str) -> int:
        slot = self.layout.slots[name]
        checksum = 0
        for start in range(slot.start, slot.start + slot.size, READ_BYTES):
            count = min(READ_BYTES, slot.start + slot.size - start)
            raw = os.pread(self._files[slot.shard].fileno(), count, start)
            checksum = zlib.crc32(raw, checksum)
        return checksum


def shard_paths(scratch: Path, layout: Layout) -> list[Path]:
    """Where the shards are until they are published."""
    return [scratch / PARTIAL.format(number) for number in range(len(layout.shards))]


def is_of(scratch: Path, job_hash: str) -> bool:
    """Whether the journal in `scratch` is that of this job."""
    return _read_journal(scratch / JOURNAL, job_hash) is not None


def _reserved(path: Path, shard: Shard) -> BinaryIO:
    """The file, open for writing, its room reserved: a full disk shows before any work is done."""
    file = path.open("r+b" if path.exists() else "w+b", buffering=0)
    try:
        os.truncate(file.fileno(), shard.size)
        os.posix_fallocate(file.fileno(), 0, shard.size)
        file.write(shard.header)
    except BaseException:
        file.close()
        raise
    return file


def _read_journal(path: Path, job_hash: str) -> dict[str, int] | None:
    """Checksums by tensor; None: no journal, or that of another job.

    Damaged lines say nothing: their tensors are made anew.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return None
    entries = [_entry(line) for line in lines]
    if not entries or entries[0].get("job") != job_hash:
        return None
    return {e["tensor"]: e["crc32"] for e in entries[1:] if {"tensor", "crc32"} <= e.keys()}


def _line(name: str, checksum: int) -> dict[str, str | int]:
    return {"tensor": name, "crc32": checksum}


def _entry(line: bytes) -> dict:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}

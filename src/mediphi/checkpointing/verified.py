"""Which checkpoints need not be hashed again: this process has, and nobody touched them since."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """What the file system notes anew whenever a file is written or replaced."""

    size: int
    inode: int
    modified_ns: int
    changed_ns: int


_verified: dict[Path, dict[str, Stamp]] = {}


def stamps(checkpoint: Path) -> dict[str, Stamp]:
    """Of every file in the folder; empty where there is none."""
    found = {path.name: path.stat() for path in checkpoint.glob("*")}
    return {n: Stamp(s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for n, s in found.items()}


def remember(checkpoint: Path, found: Mapping[str, Stamp]) -> None:
    """The files were right when they had these stamps, taken before they were read."""
    _verified[checkpoint] = dict(found)


def is_unchanged(checkpoint: Path) -> bool:
    """Whether this process knows the files to be right and all stamps are as they were."""
    return checkpoint in _verified and _verified[checkpoint] == stamps(checkpoint)


def forget(checkpoint: Path) -> None:
    """It is gone, or another has its name."""
    _verified.pop(checkpoint, None)

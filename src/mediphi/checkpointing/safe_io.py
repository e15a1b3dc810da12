"""Resumable states that a kill, a full disk or a flipped bit cannot turn into a wrong model.

A checkpoint is a folder `step-00000120/` with `state.pt`, the slices of weights and optimizer
moments of every rank (`slices.py`), and `manifest.json`. It is staged beside its place on the same
file system, synced, and renamed: either all of it is there or none. Lightning's own writer stages
in `$TMPDIR` and copies from there, which is not atomic.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from mediphi.checkpointing.slices import slice_file
from mediphi.checkpointing.verified import forget, is_unchanged, remember, stamps
from mediphi.errors import ArtifactError, MachineError
from mediphi.process_group import is_rank_zero, together

STATE, MANIFEST, POINTER = "state.pt", "manifest.json", "last"
FORMAT = 2
STEP_FOLDER = re.compile(r"step-(\d{8,})")
STAGING = re.compile(r"\.step-\d{8,}\.(partial|removed)")
READ_BYTES = 1 << 22


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of optimizer step `step` goes."""
    return folder / f"step-{step:08d}"


class SafeCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints, made atomic and checked."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to the folder `path` and point `last` at it; all ranks together.

        Args:
            checkpoint: of rank 0; the other ranks' is not written.
            storage_options: this rank's slices, from tensor names to what `torch.save` takes.

        Raises:
            MachineError: a disk is full or cannot be written; nothing is left behind.
        """
        target = Path(path)
        staging = target.with_name(f".{target.name}.partial")
        own: dict[str, Any] = {} if storage_options is None else {slice_file(): storage_options}
        try:
            together(lambda: _make_folder(staging) if is_rank_zero() else None)
            if is_rank_zero():
                own[STATE] = checkpoint
            written = together(lambda: {n: _write(part, staging / n) for n, part in own.items()})
            files = {name: file for of_rank in written for name, file in of_rank.items()}
            together(lambda: _finish(files, checkpoint, staging, target))
        except OSError as error:
            if is_rank_zero():
                shutil.rmtree(staging, ignore_errors=True)
            raise _disk_error(error, target, [checkpoint, storage_options]) from None

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify the hash, then unpickle tensors and plain values only.

        Raises:
            ArtifactError: damaged or missing; the message names the last good checkpoint.
        """
        folder = Path(path)
        refuse_damaged(folder)
        return torch.load(folder / STATE, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Take the folder away; a kill half-way leaves a staging name, never half a checkpoint."""
        folder = Path(path)
        forget(folder)
        if folder.exists():
            doomed = folder.with_name(f".{folder.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest step first; valid or not."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if STEP_FOLDER.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, from the folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, verified; None where there is none.

    Raises:
        ArtifactError: the newest one is damaged; the message names the last good one.
    """
    found = checkpoints_in(folder)
    if not found:
        return None
    refuse_damaged(found[-1])
    return found[-1]


def refuse_damaged(checkpoint: Path) -> None:
    """Raise ArtifactError, naming file and remedy, unless `checkpoint` is what was written."""
    reason = damage(checkpoint)
    if reason is None:
        return
    older = [p for p in checkpoints_in(checkpoint.parent) if step_of(p) < _step_or_end(checkpoint)]
    good = next((p for p in reversed(older) if damage(p) is None), None)
    if good:
        remedy = f"the last good one is {good.name}: delete {checkpoint.name} to go on from it"
    else:
        remedy = f"there is no other good one: delete {checkpoint.name} to start this phase again"
    raise ArtifactError(f"checkpoint {checkpoint} is damaged ({reason}); {remedy}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written."""
    try:
        before = stamps(checkpoint)
        text = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if text != _manifest_bytes(manifest):
            return f"{MANIFEST}: its own sha256 differs"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')}, not {FORMAT}"
    if manifest["step"] != step_of(checkpoint):
        return f"{MANIFEST} is of step {manifest['step']}"
    faults = (_file_damage(checkpoint / n, file) for n, file in manifest["files"].items())
    found = next((fault for fault in faults if fault is not None), None)
    if found is None:
        remember(checkpoint, before)
    return found


def _file_damage(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {expected['size']}"
    return None if file_sha256(path) == expected["sha256"] else f"{path.name}: sha256 differs"


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read once in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def retain(folder: Path, keep: int) -> None:
    """Delete checkpoints older than the newest `keep` valid ones.

    Damaged ones do not count and, if newer than those kept, stay for the user to see. What this
    process has written or verified is not read again unless its files have changed.
    """
    io_ = SafeCheckpointIO()
    valid = 0
    for checkpoint in reversed(checkpoints_in(folder)):
        if valid >= keep:
            io_.remove_checkpoint(checkpoint)
        elif is_unchanged(checkpoint) or damage(checkpoint) is None:
            valid += 1


def remove_checkpoints(folder: Path) -> None:
    """Delete all states of a phase whose model is exported, and the pointer to the newest."""
    (folder / POINTER).unlink(missing_ok=True)
    for checkpoint in checkpoints_in(folder):
        SafeCheckpointIO().remove_checkpoint(checkpoint)
    remove_staging(folder)


def remove_staging(folder: Path) -> None:
    """Clear away what a killed run left half-written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if STAGING.fullmatch(path.name):
            shutil.rmtree(path)


class _HashedFile(io.RawIOBase):
    """Hashes what passes; keeps the first OSError, which torch turns into a RuntimeError."""

    def __init__(self, path: Path) -> None:
        self.raw = path.open("xb", buffering=0)
        self.sha256, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._write_all(view)
            except OSError as error:
                self.error = error
                raise
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        rest = view
        while rest:
            rest = rest[self.raw.write(rest) or 0 :]
        self.sha256.update(view)
        self.size += len(view)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _make_folder(staging: Path) -> None:
    staging.parent.mkdir(parents=True, exist_ok=True)
    remove_staging(staging.parent)
    staging.mkdir()


def _write(content: Any, path: Path) -> dict[str, Any]:
    """One file of a checkpoint, synced; its entry in the manifest."""
    with _HashedFile(path) as file:
        try:
            torch.save(content, file)  # type: ignore[arg-type]
        except RuntimeError:
            if file.error is not None:
                raise file.error from None
            raise
        os.fsync(file.raw.fileno())
    return {"size": file.size, "sha256": file.sha256.hexdigest()}


def _finish(files: dict[str, Any], checkpoint: dict[str, Any], staging: Path, target: Path) -> None:
    """Vouch for what all ranks have written, and move it to its place."""
    if not is_rank_zero():
        return
    manifest = {
        "format": FORMAT,
        "step": checkpoint["global_step"],
        "files": files,
        "versions": {
            "torch": str(torch.__version__),
            "lightning": checkpoint.get("pytorch-lightning_version"),
        },
    }
    _write_synced(staging / MANIFEST, _manifest_bytes(manifest))
    _sync_folder(staging)
    _replace_folder(staging, target)
    found = stamps(target)
    if all(name in found and found[name].size == file["size"] for name, file in files.items()):
        remember(target, found)  # hashed while it was written
    _write_synced(target.parent / POINTER, f"{target.name}\n".encode())


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The file that a manifest must be, byte for byte, with a hash of its own text inside."""
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": own}, indent=1) + "\n").encode()


def _replace_folder(staging: Path, target: Path) -> None:
    """Rename into place; an old folder of that name steps aside first and goes last."""
    doomed = target.with_name(f".{target.name}.removed")
    if target.exists():
        target.rename(doomed)
    staging.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.partial")
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, target: Path, content: Any) -> MachineError:
    needed, place = _tensor_bytes(content), target.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "no space" if full else (error.strerror or "cannot write")
    return MachineError(
        f"{what} for checkpoint {target}: needs about {needed / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB are free; earlier checkpoints are intact, free space and run again"
    )


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _step_or_end(checkpoint: Path) -> int:
    return step_of(checkpoint) if STEP_FOLDER.fullmatch(checkpoint.name) else 1 << 62

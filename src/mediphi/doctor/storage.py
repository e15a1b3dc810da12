"""Disks: where runs, cache and temporary files go, and whether such places do what we ask."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mediphi.artifacts import free_space, locked, write_atomic
from mediphi.artifacts.files import RESERVE
from mediphi.doctor.case import Case, Unknown
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.errors import ArtifactError, UserError

GB = 1e9
LITTLE = 1e9
"""Free bytes below which a disk is called small."""
SHARED_MEMORY = Path("/dev/shm")
LOCK = """
import sys
from pathlib import Path
from mediphi.artifacts import locked
from mediphi.errors import ArtifactError
try:
    with locked(Path(sys.argv[1])):
        sys.exit(3)
except ArtifactError:
    sys.exit(0)
"""
"""A second process at a folder that is held."""


def runs_folder(case: Case) -> Iterator[Finding]:
    """Atomic files, locks between processes, and room for a run."""
    folder = Path(case.config.paths.runs).absolute()
    try:
        with _inside(folder) as inside:
            write_atomic(inside / "probe", b"probe")
            with locked(inside):
                command = [sys.executable, "-c", LOCK, str(inside)]
                second = subprocess.run(command, capture_output=True, timeout=120, check=False)
    except (OSError, UserError) as error:
        yield failure(
            "runs folder",
            f"{folder}: {_reason(error)}",
            remedy="paths.runs=FOLDER or MEDIPHI_RUNS: a folder that you may write to",
        )
        return
    if second.returncode:
        yield failure(
            "runs folder",
            f"{folder}: two processes can hold one run directory: the file system has no locks",
            remedy="paths.runs on a local disk, or mount the share with locks",
        )
    else:
        yield ok("runs folder", f"{folder}: can be written, synced, renamed and locked")
    yield _room(case, folder)


def _room(case: Case, folder: Path) -> Finding:
    try:
        needed = int(RESERVE * case.budget().disk_bytes)
    except Unknown:  # the model has its own line
        needed = 0
    free = free_space(folder)
    estimate = f", a run takes about {needed / GB:.2f} GB" if needed else ""
    text = f"{free / GB:.1f} GB free{estimate}"
    if free < max(needed, LITTLE):
        return warning("runs folder", text, remedy="make room, or paths.runs on another disk")
    return ok("runs folder", text)


def cache_folder(case: Case) -> Iterator[Finding]:
    folder = Path(case.config.paths.cache).absolute()
    try:
        with _inside(folder) as inside:
            write_atomic(inside / "probe", b"probe")
    except (OSError, UserError) as error:
        remedy = "paths.cache=FOLDER or MEDIPHI_CACHE: a folder that you may write to"
        yield failure("cache folder", f"{folder}: {_reason(error)}", remedy=remedy)
        return
    free = free_space(folder)
    text = f"{folder}: can be written, {free / GB:.1f} GB free"
    if free < LITTLE:
        remedy = (
            "make room, or paths.cache on another disk; tokenised text takes 2 to 4 bytes a token"
        )
        yield warning("cache folder", text, remedy=remedy)
    else:
        yield ok("cache folder", text)


def temporary_files(case: Case) -> Iterator[Finding]:
    """Python goes elsewhere in silence where `TMPDIR` cannot be written."""
    wanted, folder = os.environ.get("TMPDIR"), Path(tempfile.gettempdir())
    if wanted and Path(wanted).absolute() != folder.absolute():
        yield warning(
            "temporary files",
            f"TMPDIR={wanted} cannot be written, so {folder} is taken",
            remedy="set TMPDIR to a folder that you may write to",
        )
    free = free_space(folder)
    runs = Path(case.config.paths.runs).absolute()
    nearest = next(path for path in (runs, *runs.parents) if path.exists())
    elsewhere = folder.stat().st_dev != nearest.stat().st_dev
    text = f"{folder}: {free / GB:.1f} GB free"
    if elsewhere:
        text += ", another file system than the runs (checkpoints are made beside the run)"
    if free < LITTLE:
        remedy = "set TMPDIR to a larger disk: compilers and libraries write there"
        yield warning("temporary files", text, remedy=remedy)
    else:
        yield ok("temporary files", text)
    if case.config.hardware.devices > 1 and SHARED_MEMORY.is_dir():
        yield from _shared_memory()


def _shared_memory() -> Iterator[Finding]:
    """NCCL's processes exchange through it; containers have 64 MB."""
    total = shutil.disk_usage(SHARED_MEMORY).total
    text = f"{SHARED_MEMORY}: {total / GB:.2f} GB of shared memory"
    if total < LITTLE:
        remedy = "start the container with --shm-size=8g or --ipc=host"
        yield warning("temporary files", text, remedy=remedy)
    else:
        yield ok("temporary files", text)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`; folders that had to be made are gone afterwards."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
            yield Path(name)
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # somebody uses it by now
                one.rmdir()


def _reason(error: Exception) -> str:
    if isinstance(error, ArtifactError):
        return "cannot be locked by the one process that has it"
    return getattr(error, "strerror", None) or str(error)

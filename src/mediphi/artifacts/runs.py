"""The life of a run directory: fresh, resumed or finished, and never two writers."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mediphi.artifacts.files import remove_litter, sync_folder, write_atomic
from mediphi.artifacts.lock import LOCK_NAME, locked
from mediphi.artifacts.manifest import MANIFEST, verify
from mediphi.errors import ArtifactError, MachineError, UserError

CONFIG = "config.yaml"
DISCARDED = ".discarded-config.yaml"
"""The config's name from the moment that a run is given up until the last of its files is gone."""

CHECKPOINTS = "checkpoints"
HASH_LINE = "# config_hash: "
JOB_LINE = "# job: "
Outcome = Literal["fresh", "resume", "finished"]
OnExisting = Literal["resume", "overwrite", "refuse"]


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory that this process holds.

    Attributes:
        path: the directory.
        outcome: `fresh`: nothing but the config is there; `resume`: an earlier attempt's files
            are; `finished`: a verified artifact, nothing is left to do.
    """

    path: Path
    outcome: Outcome


@contextlib.contextmanager
def open_run(
    path: Path,
    *,
    config_yaml: str,
    config_hash: str,
    on_existing: OnExisting,
    job: str | None = None,
) -> Iterator[RunDirectory]:
    """Hold `path` for one run, until the block ends. In a distributed run: rank 0 only.

    Args:
        config_yaml: the resolved config, kept as `config.yaml`.
        config_hash: of what decides the result; another one under the same name is refused.
        on_existing: what to do with an earlier attempt.
        job: of a cluster, kept in `config.yaml`, so that it knows its own run when it comes back.

    A refusal (exit code 2) before the first checkpoint leaves no trace of a fresh directory.

    Raises:
        ArtifactError: the directory is in use, foreign, damaged, of another config, or there
            although `refuse` was asked for.
        MachineError: it cannot be written.
    """
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        with locked(path):
            remove_litter(path)
            outcome = _outcome(path, config_hash, on_existing)
            if outcome != "finished":
                whose = f"{JOB_LINE}{job}\n" if job else ""
                write_atomic(path / CONFIG, f"{HASH_LINE}{config_hash}\n{whose}{config_yaml}")
            with _nothing_left_if_refused(path, outcome):
                yield RunDirectory(path, outcome)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def read_config_hash(path: Path) -> str:
    """The hash that the run in `path` was started with.

    Raises:
        ArtifactError: its `config.yaml` was not written by `open_run`.
    """
    first = _lines(path)[0]
    if not first.startswith(HASH_LINE):
        raise ArtifactError(f"{path / CONFIG}: damaged: its first line is not {HASH_LINE!r}")
    return first.removeprefix(HASH_LINE)


def is_run_of(path: Path, job: str) -> bool:
    """Whether this job of a cluster was the last to work on the run in `path`."""
    return (path / CONFIG).is_file() and _lines(path)[1:2] == [f"{JOB_LINE}{job}"]


def _lines(path: Path) -> list[str]:
    return (path / CONFIG).read_text(encoding="utf-8", errors="replace").split("\n")


@contextlib.contextmanager
def _nothing_left_if_refused(path: Path, outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if error.exit_code == 2 and outcome == "fresh" and not (path / CHECKPOINTS).exists():
            _empty(path)
        raise


def refuse_taken(path: Path, *, config_hash: str, on_existing: OnExisting) -> None:
    """Refuse a directory that `open_run` would refuse for what was asked for. Changes nothing.

    Raises:
        ArtifactError: it is foreign, of another config, or there although `refuse` was asked for.
    """
    if not _is_taken(path):
        return
    if not (path / CONFIG).is_file():
        raise ArtifactError(f"{path}: holds files but no {CONFIG}: not a run directory")
    if on_existing == "refuse":
        raise ArtifactError(f"{path}: exists and on_existing=refuse; choose another name=")
    if on_existing == "resume" and (theirs := read_config_hash(path)) != config_hash:
        raise ArtifactError(
            f"{path}: holds another experiment (config {theirs[:8]}, not {config_hash[:8]}); "
            "choose another name= or on_existing=overwrite"
        )


def _is_taken(path: Path) -> bool:
    """Whether it holds a run; one that a kill left half emptied is none."""
    if not path.is_dir() or (path / DISCARDED).is_file():
        return False
    return any(p.name != LOCK_NAME for p in path.iterdir())


def _outcome(path: Path, config_hash: str, on_existing: OnExisting) -> Outcome:
    refuse_taken(path, config_hash=config_hash, on_existing=on_existing)
    if on_existing == "overwrite" or not _is_taken(path):
        _empty(path)
        return "fresh"
    if (path / MANIFEST).exists():
        try:
            verify(path)
        except ArtifactError as error:
            remedy = "put it right, or make the run anew with on_existing=overwrite"
            raise ArtifactError(f"{error}; {remedy}") from None
        return "finished"
    return "resume"


def _empty(path: Path) -> None:
    """Give a run up at one stroke, the renaming of its config, and then delete what it was.

    A kill before leaves a run that goes on, since nothing but the manifest is gone; a kill after
    leaves a folder that the next start empties. Renaming needs no room on a full disk.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    if (path / CONFIG).exists():
        (path / CONFIG).rename(path / DISCARDED)
        sync_folder(path)
    for other in [p for p in path.iterdir() if p.name not in (LOCK_NAME, DISCARDED)]:
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)
        else:
            other.unlink()
    sync_folder(path)
    (path / DISCARDED).unlink(missing_ok=True)
    assert not [p for p in path.iterdir() if p.name != LOCK_NAME]

"""Kill runs at random moments until enough died, and compare each with one that was left alone."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from end_to_end.tiny_run import Child, Place, checkpoints, curve, wait_for, weights

MOMENTS = ("any", "steps", "save", "between phases", "export", "publish")
DPO_MOMENTS = (*MOMENTS, "references")


class Kill(NamedTuple):
    """One kill -9: which moment it aimed at, what it hit, and what was on disk."""

    aim: str
    hit: bool
    checkpoint: str
    half_written: int


class Outcome(NamedTuple):
    """A run that was killed some times and then left alone."""

    kills: list[Kill]
    attempts: int
    equal_weights: bool
    equal_curve: bool


def killed_run(
    start: Callable[[], Child],
    place: Place,
    *,
    reference: Path,
    kills: int,
    rng: random.Random,
    seconds: float,
) -> Outcome:
    """Start and kill a run `kills` times or until it is done, then let it finish.

    Args:
        start: starts the command in `place`.
        reference: run directory of the same command, undisturbed.
        rng: draws moments.
        seconds: how long the command takes, start-up included.

    Raises:
        AssertionError: an attempt ended in an error.
    """
    stage, run_dir = reference.parent.name, place.runs / reference.parent.name / reference.name
    died: list[Kill] = []
    attempts = 0
    while len(died) < kills and not (run_dir / "manifest.json").exists():
        aim = rng.choice(DPO_MOMENTS if stage == "dpo" else MOMENTS)
        if aim == "references":
            is_time = _in_reference_pass(place.cache / "references")
        else:
            is_time = moment(aim, run_dir, rng, seconds)
        child = start()
        attempts += 1
        assert attempts < 10 * kills, "runs end without a manifest"
        hit = wait_for(is_time, child, seconds=3 * seconds + 60)
        time.sleep(rng.random() * 0.01)
        ended = child.kill()
        if ended.code == -9:
            died.append(kill_at(aim, hit, run_dir))
        else:
            assert ended.code == 0, ended
    last = start().wait()
    assert last.code == 0, last
    return Outcome(
        died,
        attempts + 1,
        weights(run_dir) == weights(reference),
        curve(run_dir) == curve(reference),
    )


def moment(aim: str, run_dir: Path, rng: random.Random, seconds: float) -> Callable[[], bool]:
    """Whether it is time to kill."""
    begun, pause = time.monotonic(), rng.random() * seconds
    if aim == "any":
        return lambda: time.monotonic() - begun > pause
    if aim == "steps":
        return _seen(run_dir, "checkpoints/*/step-*", skip=rng.randint(0, 3))
    if aim == "between phases":
        before = set(run_dir.glob("exam/*.json"))
        return lambda: bool(set(run_dir.glob("exam/*.json")) - before)
    names = {
        "save": "checkpoints/*/.step-*.partial",
        "export": "**/.model.partial",
        "publish": "metrics.json",
    }
    skip = rng.randint(0, 3) if aim == "save" else 0
    return _seen(run_dir, names[aim], skip)


def _in_reference_pass(folder: Path) -> Callable[[], bool]:
    """True while the pass is made, and at once where its numbers are there already."""
    return lambda: any(folder.glob("*.bin")) or any(folder.glob("*.making"))


def _seen(run_dir: Path, pattern: str, skip: int) -> Callable[[], bool]:
    """True when another path matching `pattern` is there, after `skip` others.

    What an earlier kill left behind does not count until it is made anew.
    """
    names, left_behind = set[str](), _made(run_dir, pattern)

    def look() -> bool:
        names.update(name for name, _ in _made(run_dir, pattern) - left_behind)
        return len(names) > skip

    return look


def _made(run_dir: Path, pattern: str) -> set[tuple[str, int]]:
    """Paths, and when each was last changed."""
    found = set[tuple[str, int]]()
    with suppress(FileNotFoundError):  # it was renamed while we looked
        found.update((str(path), path.stat().st_mtime_ns) for path in run_dir.glob(pattern))
    return found


def kill_at(aim: str, hit: bool, run_dir: Path) -> Kill:
    """What a process that has just died left behind."""
    found = checkpoints(run_dir)
    newest = f"{found[-1].parent.name}/{found[-1].name}" if found else ""
    half = [*run_dir.rglob(".*.partial"), *run_dir.rglob(".tmp-*")]
    return Kill(aim, hit, newest, len(half))

"""Kill ranks of a run under torchrun, which starts all anew, until its end; compare the end."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from end_to_end.killing import Kill, Outcome, kill_at, moment
from end_to_end.tiny_run import (
    CODES,
    DAPT,
    TORCHRUN,
    Child,
    Ended,
    Place,
    curve,
    wait_for,
    weights,
)

EXACT = ["hardware.accelerator=cpu", "hardware.precision=32-true", "name=run"]
RUN = [*DAPT, *CODES, *EXACT, "hardware.micro_batch=1", "hardware.checkpoints.every_steps=1"]
RUN += ["stage.neftune_alpha=0"]
"""Eight steps of two micro-batches a rank, with clipping, and a save after each step."""
TWO = "hardware.devices=2"
MOMENTS = ("any", "steps", "save", "export", "publish")


class RankKills(NamedTuple):
    """What to do to a run: how often, to which rank, with moments from where."""

    count: int
    rank: int
    rng: random.Random
    moments: tuple[str, ...] = MOMENTS


def run_dir(place: Place) -> Path:
    return place.runs / "dapt" / "run"


def command(strategy: str) -> list[str]:
    return [*RUN, f"hardware.strategy={strategy}", TWO]


def killed_ranks(
    strategy: str, place: Place, plan: RankKills, *, reference: Path, seconds: float
) -> Outcome:
    """Start a run once, kill a rank up to `plan.count` times, and compare its end.

    Args:
        reference: run directory of the same command, undisturbed.
        seconds: how long the command takes, start-up included.

    Raises:
        AssertionError: a rank ended that was not killed, or the run in an error.
    """
    place.starter = [*TORCHRUN, f"--max-restarts={plan.count}", "--monitor-interval=0.1"]
    child = place.program(*command(strategy))
    try:
        kills, ended = _kill_until_done(child, run_dir(place), plan, seconds=seconds)
    finally:
        child.send(signal.SIGTERM)  # torchrun takes its ranks along
    assert ended.code == 0, ended
    restarts = ended.err.count("failed (exitcode: ")
    assert restarts <= len(kills), (kills, ended)  # fewer: one hit a rank that was done
    ours = run_dir(place)
    equal_weights = weights(ours) == weights(reference)
    return Outcome(kills, restarts + 1, equal_weights, curve(ours) == curve(reference))


def _kill_until_done(
    child: Child, folder: Path, plan: RankKills, *, seconds: float
) -> tuple[list[Kill], Ended]:
    kills: list[Kill] = []
    pid = 0
    while len(kills) < plan.count and (pid := _next_process(child, plan.rank, pid)):
        aim = plan.rng.choice(plan.moments)
        is_time = moment(aim, folder, plan.rng, seconds)
        hit = wait_for(lambda now=is_time, pid=pid: now() or not _runs(pid), child)
        time.sleep(plan.rng.random() * 0.01)
        if _kill(pid):
            kills.append(kill_at(aim, hit, folder))
    return kills, child.wait()


def _next_process(child: Child, rank: int, last: int) -> int:
    """The process of a rank that is not the `last` one; 0 where the run ends first."""
    found: list[int] = []

    def look() -> bool:
        pid = process_of(child, rank)
        found.extend([pid] if pid not in (None, last) else [])
        return bool(found)

    wait_for(look, child)
    return found[0] if found else 0


def process_of(child: Child, rank: int) -> int | None:
    """The process of a rank that torchrun has started, if it runs."""
    for status in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{child.pid}\n" in (status / "status").read_text()
            environment = b"\0" + (status / "environ").read_bytes() if is_child else b""
        except OSError:
            continue  # ended meanwhile
        if f"\0RANK={rank}\0".encode() in environment:
            return int(status.name)
    return None


def _runs(pid: int) -> bool:
    """False also of one that has ended and that torchrun has not asked yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _kill(pid: int) -> bool:
    """Whether it still ran."""
    if not _runs(pid):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return True

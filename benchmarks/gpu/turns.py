"""Sides of a GPU benchmark take turns until its time is up."""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sides

LATE = "left out: "
"""How a failure begins that is for want of time."""


class Deadline:
    """The end of a benchmark's time.

    Attributes:
        seconds: that it has from when this is made.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def leaves(self, seconds: float = 0.0) -> bool:
        """Whether something that took so long the last time ends in time, and a little slower."""
        return self.left > 1.2 * seconds

    def part(self, share: float) -> "Deadline":
        """Of what is left."""
        return Deadline(share * self.left)

    @property
    def told(self) -> str:
        """Why a side has no figures."""
        return f"{LATE}its turn would not have ended within {self.seconds:.0f} s"


class Turns(NamedTuple):
    """Of a side: how far its first run is off, and the timed ones; or why it failed."""

    parity: dict[str, float] | None
    runs: list[sides.Run]
    failure: str | None = None


def processes_in_turns(
    names: Iterable[str], script: str, task: Sequence[Any], *, toy: bool, deadline: Deadline
) -> dict[str, Turns]:
    """Sides in processes of their own that stay alive, A-B-C, C-B-A: at most five timed rounds.

    No turn begins that would end after the deadline, and what runs then is killed: its earlier
    turns count. A side that fails, for want of memory say or since it computes something else, or
    that has no turn, is told in its line and keeps no other from running. Only where the first run
    of ours fails, nothing else is run.
    """
    with tempfile.TemporaryDirectory() as folder:
        task_file = Path(folder) / "task.json"
        task_file.write_text(json.dumps(task))
        workers = {name: sides.Side(name, script, task_file, threads=4) for name in names}
        guard = threading.Timer(max(0.0, deadline.left), _kill, [list(workers.values())])
        guard.daemon = True
        guard.start()
        try:
            found = _rounds(workers, toy=toy, deadline=deadline)
        finally:
            guard.cancel()
        for name, worker in workers.items():
            if name not in found or found[name].failure is not None:
                worker.process.kill()
            worker.end()
    return found


def raise_for_ours(found: dict[str, Turns]) -> None:
    """Once all lines are told.

    Raises:
        SystemExit: ours failed, not for want of time.
    """
    if has_failed(found["ours"]):
        raise SystemExit(f"ours: {found['ours'].failure}")


def has_failed(turns: Turns) -> bool:
    """Otherwise than for want of time."""
    return turns.failure is not None and not turns.failure.startswith(LATE)


def _rounds(workers: dict[str, sides.Side], *, toy: bool, deadline: Deadline) -> dict[str, Turns]:
    found: dict[str, Turns] = {}
    for name, worker in workers.items():
        found[name] = _first(worker, deadline)
        if name == "ours" and has_failed(found[name]):
            return found
    for number in range(1 if toy else 5):
        for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
            if found[name].failure is None:
                found[name] = _timed(workers[name], found[name], deadline)
    return {
        name: turns if turns.runs or turns.failure else turns._replace(failure=deadline.told)
        for name, turns in found.items()
    }


def _kill(workers: Iterable[sides.Side]) -> None:
    for worker in workers:
        worker.process.kill()


def _first(worker: sides.Side, deadline: Deadline) -> Turns:
    if not deadline.leaves():
        return Turns(None, [], deadline.told)
    try:
        offs: Any = worker.run("parity").heldout
        return Turns(offs, [])
    except (SystemExit, BrokenPipeError) as error:
        return Turns(None, [], str(error)[-600:] if deadline.leaves() else deadline.told)


def _timed(worker: sides.Side, so_far: Turns, deadline: Deadline) -> Turns:
    if not deadline.leaves(max((run.wall for run in so_far.runs), default=0.0)):
        return so_far
    try:
        return so_far._replace(runs=[*so_far.runs, worker.run("time")])
    except (SystemExit, BrokenPipeError) as error:
        if not deadline.leaves():
            return so_far
        return Turns(so_far.parity, [], str(error)[-600:])


def run_ratio(ours: Turns, peer: Turns, costs: Callable[[sides.Run], float]) -> dict[str, Any]:
    """Peer over ours, paired as far as both have run; nothing where one has not."""
    both = list(zip(ours.runs, peer.runs, strict=False))
    if not both:
        return {}
    left, right = zip(*both, strict=True)
    return sides.ratio(left, right, costs, name="wall")

"""A search small enough to be done a hundred times; run as a program, it is killed again and again.

`python toy_search.py LEDGER 1 1 2 2 ...`: a process for each number, one after the other. It is
killed by SIGKILL within that evaluation and, where the number comes a second time, when half of
its line is in the ledger.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cma  # noqa: F401  so that processes made by forking have it already
import numpy as np

from mediphi.merge.search import (
    CandidateError,
    Evaluation,
    Genome,
    Hopeless,
    Record,
    SearchResult,
    SearchSettings,
    Space,
    SpaceOptions,
    search,
)

SPACE = Space("task_arithmetic", ("a", "b"), SpaceOptions(digits=3))
SETTINGS = SearchSettings(seed=5, population=5, num_evaluations=38, identity="toy")
NUM_ITEMS = 24


def toy_fitness(genome: Genome, hopeless: Hopeless | None = None) -> Evaluation:
    """Noise that is a function of the genome, over a hill; every seventh or so fails."""
    digest = hashlib.sha256(repr(sorted(genome.items())).encode()).digest()
    if digest[0] < 36:
        raise CandidateError("the weights sum to zero")
    chance = 0.9 - sum((value - 0.4) ** 2 for value in genome.values())
    right = np.random.default_rng(list(digest)).random(NUM_ITEMS) < chance
    items = {"set": tuple(right.tolist())}
    return Evaluation(float(right.mean()), {"set": float(right.mean())}, items)


def toy_search(
    ledger: Path,
    *,
    fitness: Callable[[Genome, Hopeless | None], Evaluation] = toy_fitness,
    settings: SearchSettings = SETTINGS,
    space: Space = SPACE,
    **given: Any,
) -> SearchResult:
    given.setdefault("holdout", toy_holdout)
    return search(space, fitness, settings=settings, ledger_path=ledger, **given)


def toy_holdout(genome: Genome) -> Evaluation:
    score = round(sum(genome.values()), 6)
    return Evaluation(score)


def history(records: tuple[Record, ...]) -> list[Record]:
    """Records without the time they took."""
    return [record._replace(seconds=0.0) for record in records]


def kill_within(path: Path, number: int, *, writing: bool) -> None:
    """Search until evaluation `number`, which does not end."""
    there = max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0
    calls = 0

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        nonlocal calls
        calls += 1
        if there + calls == number:
            if not writing:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write = _write_half
        return toy_fitness(genome, hopeless)

    toy_search(path, fitness=fitness)


def _write_half(file: int, data: Any, write: Callable[[int, Any], int] = os.write) -> int:
    write(file, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def main() -> None:
    path, numbers = Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]
    for place, number in enumerate(numbers):
        writing = number in numbers[:place]
        process = os.fork()  # importing anew would take longer than all searches
        if process == 0:
            kill_within(path, number, writing=writing)
            os._exit(3)
        _, status = os.waitpid(process, 0)
        is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL or is_torn != writing:
            raise SystemExit(f"evaluation {number} was not killed as planned: {status}")


if __name__ == "__main__":
    main()

"""Progress of a search: a bar on a terminal, plain lines in a log file."""

import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, Protocol, Self

EVERY_SECONDS = 10.0


class Standing(NamedTuple):
    """Where a search is.

    Attributes:
        fitness: of the newest candidate; None: it failed.
        best: highest so far; None: there is none.
        seconds: spent in evaluations, those before a resume included.
    """

    num_evaluations: int
    fitness: float | None
    best: float | None
    num_failed: int
    seconds: float


class Budget(NamedTuple):
    """How long a search goes on: until one of the two is spent; None: without that limit."""

    num_evaluations: int | None
    minutes: float | None

    def is_spent(self, num_evaluations: int, seconds: float) -> bool:
        """Whether no further evaluation may begin."""
        return (self.num_evaluations is not None and num_evaluations >= self.num_evaluations) or (
            self.minutes is not None and seconds >= 60 * self.minutes
        )

    def share(self, standing: Standing) -> float:
        """Spent share of the budget, in [0, 1]."""
        shares = [0.0]
        if self.num_evaluations:
            shares.append(standing.num_evaluations / self.num_evaluations)
        if self.minutes:
            shares.append(standing.seconds / 60 / self.minutes)
        return min(1.0, max(shares))


class Progress(Protocol):
    def show(self, standing: Standing) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def make_progress(budget: Budget) -> Progress:
    """A bar where stderr is a terminal, else a line at most every ten seconds."""
    return ProgressBar(budget) if sys.stderr.isatty() else ProgressLines(budget)


def describe(standing: Standing, budget: Budget) -> str:
    """`12/500  0.4120  best 0.4310  failed 1  ETA 1:02:00`."""
    most = "" if budget.num_evaluations is None else f"/{budget.num_evaluations}"
    parts = [f"{standing.num_evaluations}{most}"]
    if budget.minutes is not None:
        parts.append(f"{standing.seconds / 60:.1f}/{budget.minutes:g} min")
    parts.append("failed" if standing.fitness is None else f"{standing.fitness:.4f}")
    if standing.best is not None:
        parts.append(f"best {standing.best:.4f}")
    if standing.num_failed:
        parts.append(f"failed {standing.num_failed}")
    share = budget.share(standing)
    if 0 < share < 1:
        left = standing.seconds * (1 - share) / share
        parts.append(f"ETA {timedelta(seconds=round(left))}")
    return "  ".join(parts)


class ProgressLines:
    """A line on stderr at most every `EVERY_SECONDS`, and one at the end."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._printed = budget, time.monotonic()
        self._waiting: Standing | None = None

    def show(self, standing: Standing) -> None:
        self._waiting = standing
        if time.monotonic() - self._printed >= EVERY_SECONDS:
            self._say()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._say()

    def _say(self) -> None:
        if self._waiting is not None:
            with suppress(OSError):  # a closed pipe must not stop a search
                line = f"search {describe(self._waiting, self._budget)}"
                print(line, file=sys.stderr, flush=True)
            self._waiting, self._printed = None, time.monotonic()


class ProgressBar:
    """The same numbers beside a bar that stays on one line."""

    def __init__(self, budget: Budget) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._budget = budget
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("search", total=1.0, numbers="")

    def show(self, standing: Standing) -> None:
        done, numbers = self._budget.share(standing), describe(standing, self._budget)
        self._bar.update(self._task, completed=done, numbers=numbers)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

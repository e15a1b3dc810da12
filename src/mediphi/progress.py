"""Progress of long work without a trainer: a bar on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_SECONDS = 10.0


class BytesDone:
    """`merging 1.2/7.6 GB` on stderr; call it with what is done and the whole, in bytes."""

    def __init__(self, title: str, *, every_seconds: float = EVERY_SECONDS) -> None:
        self.title, self.every_seconds = title, every_seconds
        self._bar: Progress | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (TextColumn(self.title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self.title, total=None)
            self._bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif (now := time.monotonic()) - self._printed >= self.every_seconds:
            self._printed = now
            line = f"{self.title} {done / 1e9:.1f}/{total / 1e9:.1f} GB"
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

"""The table at the end of a sweep: on the screen, as CSV and as Markdown."""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mediphi.artifacts import write_atomic

HEADER = ("point", "status", "objective", "value", "heldout/loss", "run", "error")


class Row(NamedTuple):
    """One point's outcome: `done`, `checked`, `skipped`, `queued`, `failed` or `stopped`.

    `run_dir` of a checked point is the log that has its plan.
    """

    label: str
    status: str
    metric: str
    value: float | None
    run_dir: str
    error: str
    heldout: float | None = None

    def cells(self) -> tuple[str, ...]:
        metric = f"{self.metric} ({better(self.metric)} is better)" if self.metric else ""
        figures = (_number(self.value), _number(self.heldout))
        return (self.label, self.status, metric, *figures, self.run_dir, self.error)


def better(metric: str) -> str:
    """Which end of a metric is the good one: losses fall, accuracies rise."""
    return "lower" if metric.endswith(("loss", "perplexity")) else "higher"


def objective(run_dir: Path) -> tuple[str, float | None]:
    """Name and value of the metric that a run is compared by, from its `metrics.json`."""
    try:
        found = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["objective"]
        return str(found["name"]), _finite(found["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", None


def heldout_loss(run_dir: Path) -> float | None:
    """The last held-out loss, which every run has to compare with, from its `metrics.json`."""
    try:
        found = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
        return _finite(found["heldout/loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def write(rows: Sequence[Row], folder: Path) -> None:
    """`table.csv` and `table.md` in `folder`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([HEADER, *(row.cells() for row in rows)])
    write_atomic(folder / "table.csv", text.getvalue())
    write_atomic(folder / "table.md", markdown(rows))


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with aligned columns."""
    cells = [HEADER, *(tuple(c.replace("|", "\\|") for c in row.cells()) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    rule = " | ".join("-" * width for width in widths)
    return "".join(f"| {line} |\n" for line in (lines[0], rule, *lines[1:]))


def show(rows: Sequence[Row]) -> None:
    """Print the table; with colours on a terminal."""
    if not sys.stdout.isatty():
        print(markdown(rows), end="", flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"done": "green", "skipped": "cyan", "failed": "red", "stopped": "yellow"}
    colours |= {"queued": "blue", "checked": "green"}
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*map(Text, row.cells()), style=colours[row.status])
    Console().print(table)

"""`report.html`: what a training run did, on one page that needs nothing else.

No text of a document gets here: the page is made of `metrics.csv` and tables of numbers.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mediphi.html_page import (
    COLOURS,
    Table,
    draw_svg,
    facts_html,
    figure_html,
    short_text,
    table_html,
    write_page,
)
from mediphi.tracking.names import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "report.html"
DASHES = ("-", "--", ":")
"""More lines than colours: the next style."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`metrics.csv`: a column's points as (steps, values), and where each phase begins."""

    values: Mapping[str, tuple[list[int], list[float]]]
    phases: Mapping[str, int]
    last: Mapping[str, float] = field(default_factory=dict)

    @property
    def are_of_pairs(self) -> bool:
        """A preference loss is per pair; a cross-entropy is per token."""
        return any(name.endswith("/margin") for name in self.values)


def write_report(
    run_dir: Path,
    *,
    title: str,
    metrics_csv: Path,
    tables: Sequence[Table] = (),
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write `report.html` into `run_dir`, atomically; equal inputs give equal bytes.

    Args:
        run_dir: the run directory.
        title: headline.
        metrics_csv: as `tracking.CsvLogger` writes it.
        tables: shown as they are, first the exam.
        facts: name to value, shown on top: model, corpus, steps, time.
    """
    rows = read_rows(metrics_csv)
    parts = [facts_html(facts or {})]
    parts += [table_html(table) for table in tables]
    parts += [_figure(*chart, rows) for chart in _charts(rows)]
    return write_page(run_dir / REPORT, title=title, parts=parts)


def read_rows(path: Path) -> Rows:
    """Read `metrics.csv`; empty cells are no points."""
    values: dict[str, tuple[list[int], list[float]]] = {}
    phases: dict[str, int] = {}
    step = 0
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            phases.setdefault(row.pop("phase"), step)  # where the phase before ended
            step = int(row.pop("step"))
            for name, cell in row.items():
                if cell:
                    steps, numbers = values.setdefault(name, ([], []))
                    steps.append(step)
                    numbers.append(float(cell))
    return Rows(values, phases, {name: numbers[-1] for name, (_, numbers) in values.items()})


def _charts(rows: Rows) -> list[tuple[str, str, dict[str, str], bool]]:
    """Title, sentence for those who cannot see it, column to label, logarithmic axis."""

    def group(stem: str) -> dict[str, str]:
        found = (name for name in rows.values if name.startswith(stem))
        return {name: name.removeprefix(stem).replace("_", " ") for name in found}

    def both(name: str) -> dict[str, str]:
        return {f"train/{name}": "training", f"heldout/{name}": "held-out"}

    loss = "Loss per pair" if rows.are_of_pairs else "Loss per token"
    charts = [
        ("Loss", loss, both("loss"), False),
        ("Accuracy", "Accuracy", both("accuracy"), False),
        ("Reward of the chosen less the rejected", "Margin", both("margin"), False),
        ("Held-out loss by kind of text", "Held-out loss", group("heldout/loss/kind/"), False),
        ("Held-out loss by task type", "Held-out loss", group("heldout/loss/task/"), False),
        ("Held-out loss by source", "Held-out loss", group("heldout/loss/source/"), False),
        ("Held-out accuracy by error", "Accuracy", group("heldout/accuracy/error/"), False),
        ("Learning rate", "Learning rate", {"lr": "learning rate"}, False),
        ("Gradient norm before clipping", "Gradient norm", {"grad_norm": "gradient norm"}, True),
        ("Speed", "Training speed", {"tokens_per_second": "speed"}, False),
    ]
    shown = []
    for title, subject, columns, log in charts:
        known = {name: label for name, label in columns.items() if name in rows.values}
        if len(known) > title.endswith("by source"):  # one source is the whole
            shown.append((title, subject, known, log))
    return shown


def _figure(title: str, subject: str, columns: dict[str, str], log: bool, rows: Rows) -> str:
    ends = [
        f"{label} from {short_text(rows.values[name][1][0])} "
        f"to {short_text(rows.values[name][1][-1])}"
        for name, label in columns.items()
    ]
    alt = f"{subject} over optimizer steps: {'; '.join(ends)}."
    svg = draw_svg(lambda figure: _draw(figure, columns, log, rows), salt="+".join(columns))
    return figure_html(title, svg, alt=alt)


def _draw(figure: Figure, columns: dict[str, str], log: bool, rows: Rows) -> None:
    axes = figure.subplots()
    for number, (name, label) in enumerate(columns.items()):
        steps, numbers = _with_gaps(*rows.values[name], list(rows.phases.values()))
        around, place = divmod(number, len(COLOURS))
        axes.plot(
            steps,
            numbers,
            label=label,
            color=COLOURS[place],
            ls=DASHES[around % len(DASHES)],
            lw=1.8,
            marker="o" if len(steps) < 30 else "",
            ms=3.5,
        )
    _decorate(axes, columns, log, rows)


def _with_gaps(
    steps: list[int], numbers: list[float], begins: list[int]
) -> tuple[list[int], list[float]]:
    """No line from the end of one phase to the start of the next: the schedule starts anew."""
    points = list(zip(steps, numbers, strict=True)) + [(b, math.nan) for b in begins if b]
    # A point at the boundary itself belongs to the phase that ends there.
    points.sort(key=lambda point: (point[0], math.isnan(point[1])))
    return [p[0] for p in points], [p[1] for p in points]


def _decorate(axes: Axes, columns: dict[str, str], log: bool, rows: Rows) -> None:
    """Labels with units, phase boundaries, a legend where there is something to tell apart."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    name = next(iter(columns))
    quantity = name.split("/")[1] if "/" in name else columns[name]
    unit = "" if quantity == "loss" and rows.are_of_pairs else unit_of(name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{quantity} ({unit})" if unit else quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dde3e6", lw=0.8)
    axes.set_axisbelow(True)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif name == "tokens_per_second":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(bottom=0)
    for phase, begin in list(rows.phases.items()):
        axes.axvline(begin, color="#5b6770", lw=0.8, ls=":")
        axes.annotate(
            phase,
            (begin, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=11,
            color="#4a555c",
        )
    if len(columns) > 1:
        axes.legend(frameon=False, loc="best", ncols=1 + (len(columns) > 5))

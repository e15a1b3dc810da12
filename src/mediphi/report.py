"""`report.html`: what a training run did, on one page that needs nothing else.

No text of a document gets here: the page is made of `metrics.csv` and tables of numbers.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediphi.tracking.names import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.html"
COLOURS = ("#0b6e8f", "#d1652a", "#4b7f3a", "#7b4b94", "#a8862b", "#5b6770", "#b23a5e", "#2b4c9b")
DASHES = ("-", "--", ":")
"""More lines than colours: the next style."""
STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1c2327;background:#fff;margin:0 auto;
max-width:60rem;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
figure{margin:1rem 0 1.5rem}
figure svg{display:block;width:100%;height:auto}
figcaption{color:#4a555c;font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid #dde3e6;
white-space:nowrap}
thead th{border-bottom:2px solid #1c2327}
td.number,th.number{text-align:right}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.5rem 1rem}
dt{color:#4a555c;font-size:.85rem}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of short cells under a title; numbers should come formatted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


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
    parts = [f"<h1>{html.escape(title)}</h1>", _facts(facts or {})]
    parts += [_table(table) for table in tables]
    parts += [_figure(*chart, rows) for chart in _charts(rows)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )
    target = run_dir / REPORT
    staged = target.with_name(f".{REPORT}.partial")
    staged.write_text(page, "utf-8")
    staged.replace(target)
    return target


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
        f"{label} from {_text(rows.values[name][1][0])} to {_text(rows.values[name][1][-1])}"
        for name, label in columns.items()
    ]
    alt = f"{subject} over optimizer steps: {'; '.join(ends)}."
    svg = _svg(columns, log, rows).replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" ', 1
    )
    return (
        f"<h2>{html.escape(title)}</h2>\n<figure>{svg}"
        f"<figcaption>{html.escape(alt)}</figcaption></figure>"
    )


def _svg(columns: dict[str, str], log: bool, rows: Rows) -> str:
    """A chart as inline SVG without dates or random ids."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.hashsalt": "+".join(columns),
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
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
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


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


def _facts(facts: Mapping[str, object]) -> str:
    items = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(_text(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<dl>{items}</dl>" if items else ""


def _table(table: Table) -> str:
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    head = "".join(_cell("th", c, n) for c, n in zip(table.columns, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell("td", c, n) for c, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>{note}"
    )


def _cell(tag: str, value: object, number: bool) -> str:
    kind = ' class="number"' if number else ""
    return f"<{tag}{kind}>{html.escape(_text(value))}</{tag}>"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(value: object) -> bool:
    text = str(value).strip()
    return text[:1].isdigit() or (text[:1] in "-+." and text[1:2].isdigit())

"""`search.html`: what a search tried and found, on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mediphi.html_page import (
    COLOURS,
    Table,
    draw_svg,
    facts_html,
    figure_html,
    table_html,
    write_page,
)
from mediphi.merge.search.ledger import Record
from mediphi.merge.search.result import SearchResult
from mediphi.merge.search.selection_bias import Estimate
from mediphi.merge.search.space import Coordinate, Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEARCH_PAGE = "search.html"
NUM_TOP = 10
PANELS_A_ROW = 3
MUTED, GRID = "#8b979e", "#dde3e6"
EXPLANATION = (
    "The search split chooses the winner, so the winner's score on it is too high. {} The hold-out "
    "split chose nothing; its score needs no correction. Intervals are bootstrap intervals of 95 %."
)
CORRECTED = (
    "The corrected score is what a winner chosen so can expect on new items: candidates are chosen "
    "on items drawn with replacement and scored on those not drawn (Tsamardinos et al. 2018)."
)
GIVEN_UP = (
    "There is no corrected score: it needs all answers of every candidate, and some were given up."
)
TOO_SMALL = "There is no corrected score: it needs two questions or more of every validation set."


def write_search_page(
    folder: Path,
    *,
    title: str,
    space: Space,
    result: SearchResult,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write `search.html` into `folder`, atomically; equal inputs give equal bytes.

    Args:
        facts: shown on top beside the search's own.
    """
    charts = [
        figure_html(
            "Evaluations",
            draw_svg(lambda figure: draw_evaluations(figure, result.records), salt="evaluations"),
            alt=_evaluations_text(result),
        ),
        figure_html(
            "The winner's parameters",
            draw_svg(
                lambda figure: draw_genome(figure, space, result.winner.genome),
                salt="genome",
                size=_genome_size(space),
            ),
            alt=_genome_text(space),
        ),
    ]
    tables = [_scores(result), _sets(result.winner), _top(space, result)]
    parts = [
        facts_html({**(facts or {}), **_facts(space, result)}),
        f"<p>{_explanation(result)}</p>",
    ]
    parts += [table_html(tables[0]), *charts]
    parts += [table_html(table) for table in tables[1:] if table.rows]
    return write_page(folder / SEARCH_PAGE, title=title, parts=parts)


def draw_evaluations(figure: Figure, records: Sequence[Record]) -> None:
    """Every candidate, the best so far, and the hold-out score of every new best."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    scored = [record for record in records if record.fitness is not None]
    for status, marker, label in (("ok", "o", "candidate"), ("stopped", "v", "given up")):
        own = [record for record in scored if record.status == status]
        if own:
            _dots(axes, own, [r.fitness or 0.0 for r in own], marker, MUTED, label)
    best = bests(records)
    steps = [record.number for record in best] + [records[-1].number]
    values = [record.fitness or 0.0 for record in best]
    axes.step(
        steps, [*values, values[-1]], where="post", color=COLOURS[0], lw=2, label="best so far"
    )
    held = [record for record in records if record.holdout is not None]
    if held:
        scores = [record.holdout.fitness for record in held if record.holdout is not None]
        _dots(axes, held, scores, "D", COLOURS[1], "hold-out of the best")
    if failed := [record for record in records if record.status == "failed"]:
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.06 * (high - low), high)
        _dots(axes, failed, [low] * len(failed), "x", COLOURS[6], "failed (no score)")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("score")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper left", ncols=3, fontsize=11)


def draw_genome(figure: Figure, space: Space, genome: Mapping[str, float]) -> None:
    """A panel a parameter: a bar a model and layer group, from end to end of its bounds."""
    names, slots = list(_panels(space)), _slots(space)
    panels = figure.subplots(
        len(slots), min(len(names), PANELS_A_ROW), squeeze=False, height_ratios=slots
    )
    for place, panel in enumerate(panels.ravel().tolist()):
        if place < len(names):
            own, most = _panels(space)[names[place]], slots[place // PANELS_A_ROW]
            _panel(panel, own, genome)
            panel.set_ylim(most - 0.5, -0.5)  # equal bars in all panels, the first on top
        else:
            panel.set_visible(False)


def bests(records: Sequence[Record]) -> list[Record]:
    """Those that were the best when they were evaluated, in order."""
    found: list[Record] = []
    for record in records:
        if record.status != "ok" or record.fitness is None:
            continue
        if not found or record.fitness > (found[-1].fitness or 0.0):
            found.append(record)
    return found


def _dots(
    axes: Axes,
    records: Sequence[Record],
    values: Sequence[float],
    marker: str,
    colour: str,
    label: str,
) -> None:
    face = "none" if marker == "v" else colour
    axes.scatter(
        [record.number for record in records],
        values,
        s=34 if marker == "D" else 20,
        marker=marker,
        linewidths=1.2,
        edgecolors=None if marker == "x" else colour,
        facecolors=face,
        label=label,
        zorder=3 if marker == "D" else 2,
    )


def _panel(axes: Axes, coordinates: Sequence[Coordinate], genome: Mapping[str, float]) -> None:
    first = coordinates[0]
    labels = [_label(own) for own in coordinates]
    values = [genome[own.name] for own in coordinates]
    places = range(len(coordinates))
    axes.barh(
        places,
        [value - first.low for value in values],
        left=first.low,
        height=0.62,
        color=[COLOURS[(own.group or 0) % len(COLOURS)] for own in coordinates],
    )
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.3g}",
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )
    axes.axvline(first.start, color="#1c2327", lw=1.0, ls=":", zorder=1.5)
    axes.set_xlim(first.low, first.high + 0.25 * (first.high - first.low))
    axes.set_xticks([first.low, first.high])
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_title(first.parameter, fontsize=13, loc="left")


def _label(own: Coordinate) -> str:
    model = own.model or "all"
    return model if own.group is None else f"{model}@{own.group}"


def _panels(space: Space) -> dict[str, list[Coordinate]]:
    """Coordinates by parameter."""
    panels: dict[str, list[Coordinate]] = {}
    for own in space.coordinates:
        panels.setdefault(own.parameter, []).append(own)
    return panels


def _slots(space: Space) -> list[int]:
    """Bars of the fullest panel in each row of panels."""
    sizes = [len(own) for own in _panels(space).values()]
    rows = range(0, len(sizes), PANELS_A_ROW)
    return [max(sizes[first : first + PANELS_A_ROW]) for first in rows]


def _genome_size(space: Space) -> tuple[float, float]:
    slots = _slots(space)
    return 8.6, 0.9 * len(slots) + 0.32 * sum(slots)


def _genome_text(space: Space) -> str:
    groups = "; the number behind the @ is the layer group, 0 next to the input"
    return (
        "Parameters of the winner, each axis as wide as the bounds of the search; the dotted line "
        f"is where the search began{groups if space.options.num_layer_groups > 1 else ''}."
    )


def _facts(space: Space, result: SearchResult) -> dict[str, object]:
    return {
        "Method": space.method.title,
        "Models": len(space.models),
        "Parameters moved": len(space.coordinates),
        "Evaluations": len(result.records),
        "Failed": result.count("failed"),
        "Given up": result.count("stopped"),
        "Repeated, not evaluated": result.num_repeated,
        "Minutes of evaluation": f"{result.seconds / 60:.1f}",
        "Ended": "budget spent" if result.ended == "budget" else "nothing new to try",
    }


def _explanation(result: SearchResult) -> str:
    missing = GIVEN_UP if result.count("stopped") else TOO_SMALL
    return EXPLANATION.format(missing if result.corrected is None else CORRECTED)


def _scores(result: SearchResult) -> Table:
    rows: list[tuple[str, str, str]] = [
        ("on the search split, which chose it", _score(result.winner.fitness), "")
    ]
    if result.corrected is not None:
        rows.append(("corrected for the choice", *_with_interval(result.corrected)))
    if result.correction is not None:
        rows.append(("correction: corrected less search", _points(result.correction), ""))
    if result.holdout is not None:
        rows.append(("on the hold-out split", *_with_interval(result.holdout)))
    if result.gap is not None:
        rows.append(("gap: search less hold-out", _points(result.gap), ""))
    return Table("The winner's score", ("score", "mean", "interval"), rows)


def _sets(winner: Record) -> Table:
    search = {} if winner.evaluation is None else winner.evaluation.by_set
    held = {} if winner.holdout is None else winner.holdout.by_set
    rows = [
        (name, _score(search.get(name)), _score(held.get(name)))
        for name in dict.fromkeys([*search, *held])
    ]
    return Table("The winner by validation set", ("set", "search split", "hold-out split"), rows)


def _top(space: Space, result: SearchResult) -> Table:
    whole = [record for record in result.records if record.status == "ok"]
    whole.sort(key=lambda record: (-(record.fitness or 0.0), record.number))
    rows = [
        (
            record.number,
            record.generation,
            _score(record.fitness),
            _score(None if record.holdout is None else record.holdout.fitness),
            *(f"{record.genome[name]:g}" for name in space.names),
        )
        for record in whole[:NUM_TOP]
    ]
    return Table(
        f"The best {len(rows)} candidates" if len(rows) > 1 else "The best candidate",
        ("evaluation", "generation", "search", "hold-out", *space.names),
        rows,
        "The hold-out split is scored where a candidate was the best so far.",
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def _with_interval(estimate: Estimate) -> tuple[str, str]:
    if estimate.low == estimate.high == estimate.mean:
        return _score(estimate.mean), ""
    return _score(estimate.mean), f"{estimate.low:.4f} to {estimate.high:.4f}"


def _evaluations_text(result: SearchResult) -> str:
    first = bests(result.records)[0]
    held = "" if result.holdout is None else f"; on the hold-out split {result.holdout.mean:.4f}"
    return (
        f"Scores of {len(result.records):,} evaluations: the best rose from "
        f"{_score(first.fitness)} to {_score(result.winner.fitness)} at evaluation "
        f"{result.winner.number}{held}."
    )

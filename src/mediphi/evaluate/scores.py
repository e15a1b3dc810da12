"""Scores with their uncertainty, and the small table that shows them."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Unit = Literal["%", "nats/token"]
"""What scores are: shares, shown as per cent, or losses."""

OVERALL = "all"
"""Name of the row that holds the items of all groups."""


class Scored(NamedTuple):
    """What an item of an exam (a question, a prompt, a pair) was given.

    Attributes:
        id: stable name of the item.
        group: what it is told apart by: difficulty, task type, error type.
        score: in [0, 1].
        chance: what guessing scores on average; None where guessing has no meaning.
        cluster: items that share it are alike, as pairs of one prompt are, and are resampled
            together; never a readable name. None: alike to no other.
        baseline: score of a rule that needs no model; None where the exam has none.
    """

    id: str
    group: str
    score: float
    chance: float | None = None
    cluster: str | None = None
    baseline: float | None = None


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """Mean paired difference (after - before) with its interval."""

    mean: float
    low: float
    high: float


class GroupResult(NamedTuple):
    """Mean score of a group with its 95 % interval; `chance` and `baseline` as of `Scored`."""

    group: str
    num_items: int
    score: float
    low: float
    high: float
    chance: float | None
    baseline: float | None = None


def wilson(
    num_correct: int,
    num_items: int,
    *,
    confidence: float = CONFIDENCE,
    design_effect: float = 1.0,
) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction.

    With a `design_effect` as many items count as would tell as much if they were independent, as in
    Rao & Scott (1992, "A simple method for the analysis of clustered binary data").

    Raises:
        ValueError: no items, or more correct than asked.
    """
    if not 0 <= num_correct <= num_items or num_items == 0:
        raise ValueError(f"{num_correct} correct of {num_items} is no proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, n = num_correct / num_items, num_items / design_effect
    centre = share + z**2 / (2 * n)
    spread = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z**2 / n) for sign in (-1, 1))
    return Interval(max(0.0, min(low, share)), min(1.0, max(high, share)))


def design_effect(scores: Sequence[float], clusters: NDArray[np.int64]) -> float:
    """Variance of a mean over what it would be if items of a cluster were not alike, at least 1.

    The variance ratio of Rao & Scott (1992), without their factor `m / (m - 1)` of m clusters. It
    says nothing where all scores are equal: there every cluster counts as one item.

    Args:
        scores: of all items.
        clusters: int64 `[items]`, each item's cluster, from 0.
    """
    given = np.asarray(scores, np.float64)
    sizes, totals = _per_cluster(given, clusters)
    if len(sizes) == len(given):
        return 1.0
    mean = given.mean()
    independent = ((given - mean) ** 2).sum()
    if not independent:
        return len(given) / len(sizes)
    return max(1.0, float(((totals - mean * sizes) ** 2).sum() / independent))


def bootstrap(
    scores: Sequence[float] | np.ndarray,
    *,
    seed: int,
    clusters: NDArray[np.int64] | None = None,
    num_resamples: int = 10_000,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron 1979), whole clusters resampled.

    The cluster bootstrap of Field & Welsh (2007, "Bootstrapping clustered data") and Davison &
    Hinkley (1997, section 3.8): clusters are drawn with replacement, each with all its items.
    Drawing n with replacement is a multinomial draw over those that differ, which is what happens
    here.

    Args:
        scores: of all items.
        seed: of the draws.
        clusters: int64 `[items]`, each item's cluster, from 0; None: every item is its own.
        num_resamples: draws.
        confidence: share of the draws' means that the interval holds.

    Raises:
        ValueError: no scores.
    """
    given = np.asarray(scores, np.float64)
    if given.size == 0:
        raise ValueError("no scores have no mean")
    numbers = np.arange(given.size) if clusters is None else clusters
    kinds, counts = np.unique(_per_cluster(given, numbers), axis=1, return_counts=True)
    sizes, totals = kinds
    drawn = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(drawn, counts / drawn, size=num_resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws @ totals / (draws @ sizes), (tail, 1 - tail))
    return Interval(float(low), float(high))


def paired_bootstrap(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    seed: int,
    clusters: NDArray[np.int64] | None = None,
    num_resamples: int = 10_000,
    confidence: float = CONFIDENCE,
) -> Difference:
    """`bootstrap` of the mean of `after - before` over the same items, in the same order.

    Raises:
        ValueError: empty, or of different lengths.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"{first.size} and {second.size} scores cannot be paired")
    gained = second - first
    interval = bootstrap(
        gained, seed=seed, clusters=clusters, num_resamples=num_resamples, confidence=confidence
    )
    return Difference(float(gained.mean()), *interval)


def summarise(
    scored: Sequence[Scored], *, overall: bool = False, seed: int = 0
) -> list[GroupResult]:
    """One result for each group, in order of first appearance.

    Intervals are Wilson's where all scores of a group are 0 or 1, else a bootstrap after `seed`;
    both heed clusters.

    Args:
        overall: with several groups, add the mean over all items as the last result.
    """
    groups = _groups(scored, overall=overall)
    return [_result(name, [scored[i] for i in places], seed) for name, places in groups.items()]


def improvement(
    before: Sequence[Scored], after: Sequence[Scored], *, seed: int, overall: bool = False
) -> dict[str, Difference]:
    """Gain of each group that `summarise` tells apart, paired by item, clusters as told by `after`.

    Raises:
        ValueError: the two hold different items.
    """
    if [(one.id, one.group) for one in before] != [(one.id, one.group) for one in after]:
        raise ValueError("the two scorings are not of the same items")
    return {
        name: paired_bootstrap(
            [before[i].score for i in places],
            [after[i].score for i in places],
            seed=seed,
            clusters=_clusters([after[i] for i in places]),
        )
        for name, places in _groups(before, overall=overall).items()
    }


def exam_table(
    results: Mapping[str, Sequence[GroupResult]],
    gains: Mapping[str, Difference],
    *,
    noun: str = "questions",
    unit: Unit = "%",
    baseline: str = "baseline",
) -> list[tuple[str, ...]]:
    """Rows of text, header first: a group by moment (`before`, `after phase1`, ...).

    A cell reads `72.3 % [66.9, 77.1]` (or `3.512 [3.401, 3.624]` of what is no share); what was not
    asked reads `-`. Then come the gain in points, what guessing gives where that has a meaning,
    what the rule named `baseline` gives where there is one, and the number of items, headed by
    `noun`.
    """
    show = _Show(unit)
    by_moment = {name: {one.group: one for one in own} for name, own in results.items()}
    asked = {one.group: one for own in results.values() for one in own}
    by_chance = any(one.chance is not None for one in asked.values())
    by_rule = any(one.baseline is not None for one in asked.values())
    header = [show.heading, *by_moment]
    header += [show.gain_heading] * bool(gains) + ["chance"] * by_chance
    header += [baseline] * by_rule + [noun]
    rows = [tuple(header)]
    for group, one in asked.items():
        row = [group, *(show.cell(own.get(group)) for own in by_moment.values())]
        row += [show.gain(gains.get(group))] if gains else []
        row += [show.number(one.chance)] if by_chance else []
        row += [show.number(one.baseline)] if by_rule else []
        rows.append((*row, f"{one.num_items:,}"))
    return rows


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with blanks, header underlined; one line a row, no trailing blanks."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _groups(scored: Sequence[Scored], *, overall: bool) -> dict[str, list[int]]:
    """Group -> places of its items."""
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(scored):
        groups.setdefault(one.group, []).append(place)
    if overall and len(groups) > 1:
        groups[OVERALL] = list(range(len(scored)))
    return groups


def _clusters(items: Sequence[Scored]) -> NDArray[np.int64]:
    """The clusters' numbers in order of first appearance, `[items]`."""
    known: dict[str | int, int] = {}
    names = (place if one.cluster is None else one.cluster for place, one in enumerate(items))
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


def _per_cluster(scores: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number of items and sum of scores of each cluster, `[2, clusters]`."""
    return np.stack([np.bincount(clusters), np.bincount(clusters, scores)]).astype(np.float64)


def _result(group: str, items: Sequence[Scored], seed: int) -> GroupResult:
    scores = [one.score for one in items]
    clusters = _clusters(items)
    if set(scores) <= {0, 1}:
        effect = design_effect(scores, clusters)
        interval = wilson(int(sum(scores)), len(scores), design_effect=effect)
    else:
        interval = bootstrap(scores, seed=seed, clusters=clusters)
    chance = _mean([one.chance for one in items])
    baseline = _mean([one.baseline for one in items])
    return GroupResult(group, len(items), fmean(scores), *interval, chance, baseline)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


class _Show:
    """How numbers of a unit are written."""

    def __init__(self, unit: Unit) -> None:
        self._factor, self._digits = (100, 1) if unit == "%" else (1, 3)
        self._mark = " %" if unit == "%" else ""
        self.heading = f"{'score' if unit == '%' else unit} [95 % interval]"
        self.gain_heading = "gain in points, paired" if unit == "%" else "difference, paired"

    def number(self, value: float | None) -> str:
        return "-" if value is None else self._plain(value) + self._mark

    def cell(self, result: GroupResult | None) -> str:
        if result is None:
            return "-"
        return f"{self.number(result.score)} {self._interval(result.low, result.high)}"

    def gain(self, gain: Difference | None) -> str:
        if gain is None:
            return "-"
        signed = self._interval(gain.low, gain.high, sign="+")
        return f"{self._plain(gain.mean, sign='+')} {signed}"

    def _interval(self, low: float, high: float, *, sign: str = "") -> str:
        return f"[{self._plain(low, sign=sign)}, {self._plain(high, sign=sign)}]"

    def _plain(self, value: float, *, sign: str = "") -> str:
        return f"{value * self._factor:{sign}.{self._digits}f}"

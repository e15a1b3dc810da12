"""Scores, intervals and the table."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediphi.evaluate.scores import (
    Interval,
    Scored,
    bootstrap,
    design_effect,
    exam_table,
    format_table,
    improvement,
    paired_bootstrap,
    summarise,
    wilson,
)


@pytest.mark.parametrize(
    ("num_correct", "num_items", "low", "high"),
    [
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371109, 1.0),
        (1, 2, 0.09453120573423074, 0.9054687942657693),
        (72, 300, 0.19515315695222749, 0.29142118808453643),
        (150, 300, 0.4437795161339169, 0.5562204838660831),
        (217, 300, 0.6701300560341225, 0.7708894168189139),
    ],
)
def test_wilson_equals_scipy(num_correct: int, num_items: int, low: float, high: float) -> None:
    """scipy 1.17.1: `binomtest(k, n).proportion_ci(0.95, method="wilson")`."""
    assert wilson(num_correct, num_items) == pytest.approx((low, high), abs=1e-12)


def test_wilson_at_another_confidence_equals_scipy() -> None:
    golden = (0.5472750882051804, 0.8815883050410274)
    assert wilson(30, 40, confidence=0.99) == pytest.approx(golden, abs=1e-12)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_mirrors(num_items: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, num_items))
    low, high = wilson(num_correct, num_items)
    assert 0 <= low <= num_correct / num_items <= high <= 1
    mirrored = wilson(num_items - num_correct, num_items)
    assert mirrored == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("counts", [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_proportion_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(*counts)


BEFORE = np.array([0] * 60 + [1] * 40)
AFTER = np.array([1] * 35 + [0] * 25 + [1] * 33 + [0] * 7)


def test_the_bootstrap_equals_scipys() -> None:
    """scipy 1.17.1: `bootstrap((after - before,), mean, method="percentile", 100,000)`."""
    mean, low, high = paired_bootstrap(BEFORE, AFTER, seed=0, num_resamples=100_000)
    assert mean == pytest.approx(0.28)
    assert (low, high) == pytest.approx((0.17, 0.39), abs=0.0101)  # one question is 0.01


def test_the_bootstrap_is_seeded_and_zero_for_equals() -> None:
    first = paired_bootstrap(BEFORE, AFTER, seed=1)
    assert first == paired_bootstrap(BEFORE, AFTER, seed=1)
    assert paired_bootstrap(AFTER, AFTER, seed=1) == (0, 0, 0)
    mean, low, high = paired_bootstrap(AFTER, BEFORE, seed=1)
    assert mean == -first.mean
    assert low < mean < high < 0


@pytest.mark.parametrize(("before", "after"), [([], []), ([1], [1, 0])])
def test_what_cannot_be_paired_is_refused(before: list[int], after: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap(before, after, seed=0)


def scored(group: str, scores: Sequence[float], chance: float | None = 0.25) -> list[Scored]:
    return [Scored(f"{i}/{group}", group, score, chance) for i, score in enumerate(scores)]


def test_the_bootstrap_of_a_mean_equals_scipys() -> None:
    """scipy 1.17.1: `bootstrap((scores,), mean, method="percentile", 100,000)`."""
    scores = (np.arange(80) % 11) / 10
    low, high = bootstrap(scores, seed=0, num_resamples=100_000)
    assert (low, high) == pytest.approx((0.415, 0.555), abs=0.0026)  # a tenth of one is 0.00125
    with pytest.raises(ValueError, match="no mean"):
        bootstrap([], seed=0)


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=1, max_size=40), st.integers(0, 3))
def test_every_interval_lies_in_zero_to_one_and_holds_the_mean(
    scores: list[float], seed: int
) -> None:
    [result] = summarise(scored("g", scores), seed=seed)
    assert result.score == pytest.approx(np.mean(scores))
    assert -1e-12 <= result.low <= result.score + 1e-12
    assert result.score - 1e-12 <= result.high <= 1 + 1e-12


def test_groups_come_in_order_of_first_appearance_each_by_itself() -> None:
    hard, easy = scored("hard", [1, 0, 0, 0]), scored("easy", [1, 1])
    mixed = [hard[0], easy[0], *hard[1:], easy[1]]
    results = summarise(mixed)
    assert [(r.group, r.num_items, r.score) for r in results] == [("hard", 4, 0.25), ("easy", 2, 1)]
    assert (results[0].low, results[0].high) == wilson(1, 4)
    assert results[0].chance == 0.25
    assert summarise([]) == []


def test_scores_between_zero_and_one_get_a_bootstrap_interval() -> None:
    scores = [0.0, 0.25, 0.5, 1.0] * 5
    [result] = summarise(scored("prose", scores, None), seed=4)
    assert (result.low, result.high) == bootstrap(scores, seed=4)
    assert result == summarise(scored("prose", scores, None), seed=4)[0]
    assert result.chance is None


def test_the_overall_result_counts_items_and_needs_two_groups() -> None:
    one, other = scored("a", [1, 0, 0, 0]), scored("b", [1, 1], None)
    *_, last = summarise(one + other, overall=True)
    assert (last.group, last.num_items, last.score) == ("all", 6, 0.5)
    assert (last.low, last.high) == wilson(3, 6)
    assert last.chance is None, "guessing has no meaning for half of the items"
    assert [r.group for r in summarise(one, overall=True)] == ["a"]
    assert list(improvement(one + other, one + other, seed=0, overall=True)) == ["a", "b", "all"]


def test_improvement_pairs_the_same_items() -> None:
    before, after = scored("easy", [1, 0, 0]), scored("easy", [1, 1, 1])
    assert improvement(before, after, seed=0)["easy"].mean == pytest.approx(2 / 3)
    for other in (after[:2], after[::-1], scored("hard", [1, 1, 1])):
        with pytest.raises(ValueError, match="not of the same items"):
            improvement(before, other, seed=0)


# --- clusters


BINARY = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
GRADED = [0.0, 0.3, 0.5, 1.0, 0.2, 0.9, 0.4, 0.4, 0.7, 0.1]


def clustered(scores: Sequence[float], clusters: Sequence[str | None]) -> list[Scored]:
    return [
        Scored(f"{i}", "g", score, cluster=cluster)
        for i, (score, cluster) in enumerate(zip(scores, clusters, strict=True))
    ]


def interval_of(items: Sequence[Scored]) -> Interval:
    [result] = summarise(items, seed=2)
    return Interval(result.low, result.high)


def gain_of(scores: Sequence[float], clusters: Sequence[str | None]) -> Interval:
    """Of a model that scored 0.5 everywhere before."""
    before = clustered([0.5] * len(scores), clusters)
    return Interval(*improvement(before, clustered(scores, clusters), seed=2)["g"][1:])


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_the_cluster_bootstrap_equals_scipys() -> None:
    """scipy 1.17.1: `bootstrap((totals, sizes), sum / sum, paired=True, method="percentile",
    n_resamples=100_000)`."""
    scores, places = (np.arange(80) % 11) / 10, np.arange(80)
    clusters = places // 10 * 3 + np.minimum(places % 10, 2)  # of 1, 1 and 8 items
    found = bootstrap(scores, seed=0, clusters=clusters, num_resamples=100_000)
    assert found == pytest.approx((0.4365, 0.5462), abs=0.002)


@pytest.mark.parametrize("scores", [BINARY, [1.0] * 10, GRADED])
@pytest.mark.parametrize("copies", [2, 5])
def test_copies_in_one_cluster_tell_nothing_new_and_copies_apart_seem_to(
    scores: list[float], copies: int
) -> None:
    names = [f"{i}" for i in range(len(scores))]
    alone, gained = interval_of(clustered(scores, names)), gain_of(scores, names)
    together = interval_of(clustered(scores * copies, names * copies))
    assert together == pytest.approx(alone)
    assert gain_of(scores * copies, names * copies) == pytest.approx(gained)
    apart = interval_of(clustered(scores * copies, [None] * copies * len(scores)))
    assert width(apart) < 0.85 * width(alone)
    if len(set(scores)) > 1:
        assert width(gain_of(scores * copies, [None] * copies * len(scores))) < 0.85 * width(gained)


@given(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), min_size=1, max_size=30))
def test_where_no_two_items_share_a_cluster_nothing_changes(scores: list[float]) -> None:
    names = [f"{i}" for i in range(len(scores))]
    one, other = clustered(scores, names), clustered(scores, [None] * len(scores))
    assert summarise(one, seed=1) == summarise(other, seed=1)
    later, also_later = (
        clustered(scores[::-1], names),
        clustered(scores[::-1], [None] * len(scores)),
    )
    assert improvement(one, later, seed=1) == improvement(other, also_later, seed=1)
    if set(scores) <= {0, 1}:
        assert interval_of(one) == wilson(int(sum(scores)), len(scores))


def test_without_clusters_intervals_are_what_they_were_before_there_were_any() -> None:
    """Numbers of the version before."""
    scores = (np.arange(80) % 11) / 10
    assert bootstrap(scores, seed=0) == pytest.approx((0.415, 0.555), abs=1e-12)
    before = pytest.approx((-0.1475, -0.24825, -0.048125), abs=1e-12)
    assert paired_bootstrap(scores, scores[::-1] ** 2, seed=5) == before


def test_a_design_effect_worked_by_hand() -> None:
    """Mean 1/2; clusters miss it by 1, 0 and -1, items by 1/2 each: 2 over 6 / 4."""
    scores, clusters = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], np.array([0, 0, 1, 1, 2, 2])
    assert design_effect(scores, clusters) == pytest.approx(2 / 1.5)
    assert design_effect(scores, np.array([0, 1, 2, 2, 1, 0])) == 1.0  # less than chance: 0
    assert design_effect([1.0] * 6, clusters) == 2.0
    assert design_effect(scores, np.arange(6)) == 1.0
    assert wilson(50, 100, design_effect=2.0) == pytest.approx(wilson(25, 50))


def draws(*, binary: bool, count: int = 300) -> Iterator[tuple[list[float], list[str]]]:
    """Forty clusters of 1 to 5 items that are much alike; the mean of all is 0.8."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        sizes = rng.integers(1, 6, 40)
        own = np.repeat(rng.beta(0.8, 0.2, 40), sizes)
        noise = rng.uniform(-0.05, 0.05, len(own))
        scores = (rng.random(len(own)) < own) if binary else own + noise
        yield scores.astype(float).tolist(), [f"{n}" for n in np.repeat(np.arange(40), sizes)]


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_of_clustered_items_hold_the_mean_as_often_as_they_say(binary: bool) -> None:
    def covered(interval: Interval) -> bool:
        return interval.low <= 0.8 <= interval.high

    def interval(scores: list[float], names: Sequence[str | None]) -> Interval:
        if binary:
            return interval_of(clustered(scores, names))
        numbers = None if names[0] is None else np.array(names, dtype=np.int64)
        return bootstrap(scores, seed=1, clusters=numbers, num_resamples=1000)

    drawn = list(draws(binary=binary))
    heeding = np.mean([covered(interval(scores, names)) for scores, names in drawn])
    blind = np.mean([covered(interval(scores, [None] * len(scores))) for scores, _ in drawn])
    assert 0.90 <= heeding <= 0.99
    assert blind < 0.83


def test_a_file_of_an_older_version_is_read_and_the_later_scoring_tells_the_clusters() -> None:
    rows = [{"id": f"{i}", "group": "g", "score": s, "chance": None} for i, s in enumerate(GRADED)]
    before = [Scored(**row) for row in json.loads(json.dumps(rows))]
    assert {one.cluster for one in before} == {None}
    after = clustered(BINARY, ["a"] * 5 + ["b"] * 5)
    again = [Scored(**row) for row in json.loads(json.dumps([one._asdict() for one in after]))]
    assert again == after
    told = [old._replace(cluster=new.cluster) for old, new in zip(before, after, strict=True)]
    assert improvement(before, after, seed=0) == improvement(told, after, seed=0)
    untold = [one._replace(cluster=None) for one in after]
    assert improvement(before, after, seed=0) != improvement(before, untold, seed=0)


# --- tables


def test_the_table_shows_each_group_at_each_moment_with_its_interval() -> None:
    before = scored("easy", [1] * 72 + [0] * 228)
    after = scored("easy", [1] * 217 + [0] * 83)
    results = {
        "before": summarise(before),
        "after phase2": summarise(after + scored("hard", [1] * 10)),
    }
    rows = exam_table(results, improvement(before, after, seed=0))
    assert rows[0] == (
        "score [95 % interval]",
        *("before", "after phase2", "gain in points, paired", "chance", "questions"),
    )
    assert rows[1][:3] == ("easy", "24.0 % [19.5, 29.1]", "72.3 % [67.0, 77.1]")
    assert rows[1][3].startswith("+48.3 [+") and rows[1][4:] == ("25.0 %", "300")
    assert rows[2] == ("hard", "-", "100.0 % [72.2, 100.0]", "-", "25.0 %", "10")


def test_a_table_without_chance_or_gain_has_no_such_column() -> None:
    results = {"before": summarise(scored("summarization", [0.0, 0.5], None))}
    head, row = exam_table(results, {}, noun="prompts")
    assert head == ("score [95 % interval]", "before", "prompts")
    assert row[0] == "summarization" and row[2] == "2"


def test_what_a_rule_scores_has_a_column_of_its_own_name() -> None:
    items = [
        one._replace(baseline=rule)
        for one, rule in zip(scored("a", [1, 0]), (1.0, 0.5), strict=True)
    ]
    head, row = exam_table({"before": summarise(items)}, {}, noun="pairs", baseline="the shorter")
    assert head[2:] == ("chance", "the shorter", "pairs")
    assert row[2:] == ("25.0 %", "75.0 %", "2")


def test_columns_are_aligned() -> None:
    lines = format_table([("a", "b"), ("1", "24.0 %"), ("long", "7.5 %")]).splitlines()
    assert len({line.index(cell) for line, cell in zip(lines[2:], ("24", "7"), strict=True)}) == 1
    assert set(lines[1]) == {"-"}
    assert all(line == line.rstrip() for line in lines)

"""Scores, intervals and the table."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediphi.evaluate.scores import (
    Scored,
    bootstrap,
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


def test_columns_are_aligned() -> None:
    lines = format_table([("a", "b"), ("1", "24.0 %"), ("long", "7.5 %")]).splitlines()
    assert len({line.index(cell) for line, cell in zip(lines[2:], ("24", "7"), strict=True)}) == 1
    assert set(lines[1]) == {"-"}
    assert all(line == line.rstrip() for line in lines)

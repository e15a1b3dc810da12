import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediphi.data.selection import choose, fill, hash_number

IDS = [f"icd10cm/{i}" for i in range(40)]
sizes_strategy = st.dictionaries(st.text(max_size=3), st.integers(0, 30), max_size=8)
CHOSEN_BY_HASH = [15, 16, 19, 26, 36]
rows_strategy = st.lists(
    st.tuples(st.sampled_from([1.0, 2.5, 3.0, math.nan]), st.sampled_from("abc")),
    min_size=1,
    max_size=40,
)


def round_robin(sizes: dict[str, int], total: int) -> dict[str, int]:
    """One each in turn until nothing is left to give, or nobody to take."""
    quotas = dict.fromkeys(sizes, 0)
    while total and (open_ones := [key for key in sizes if quotas[key] < sizes[key]]):
        for key in open_ones[:total]:
            quotas[key] += 1
        total -= min(total, len(open_ones))
    return quotas


@settings(deadline=None)
@given(sizes_strategy, st.integers(0, 120))
def test_filling_is_dealing_out_one_by_one(sizes: dict[str, int], total: int) -> None:
    assert fill(sizes, total) == round_robin(sizes, total)


@settings(deadline=None)
@given(sizes_strategy, st.integers(0, 120))
def test_no_stratum_could_have_more_without_a_poorer_one_having_less(
    sizes: dict[str, int], total: int
) -> None:
    quotas = fill(sizes, total)
    assert sum(quotas.values()) == min(total, sum(sizes.values()))
    for key, quota in quotas.items():
        assert quota <= sizes[key]
        if quota < sizes[key]:
            assert all(other <= quota + 1 for other in quotas.values())


def test_a_small_stratum_gives_its_share_to_the_others() -> None:
    assert fill({"a": 1, "b": 50, "c": 50}, 12) == {"a": 1, "b": 6, "c": 5}


def test_by_hash_it_is_the_smallest_hashes() -> None:
    ranked = sorted(range(40), key=lambda n: hash_number("choose", IDS[n]))
    assert choose(IDS, 7) == sorted(ranked[:7])


def test_the_choice_is_the_same_on_every_machine() -> None:
    assert choose(IDS, 5) == CHOSEN_BY_HASH


def test_quality_comes_first_then_the_hash_and_unjudged_rows_last() -> None:
    qualities = [math.nan, 3.0, 1.0, 3.0, 2.0, -math.inf]
    tied = 1 if hash_number("choose", IDS[1]) < hash_number("choose", IDS[3]) else 3
    picked = [choose(IDS[:6], n, qualities=qualities) for n in range(1, 7)]
    added = [set(more) - set(less) for less, more in zip([[], *picked], picked, strict=False)]
    assert added == [{tied}, {4 - tied}, {4}, {2}, {5}, {0}]


def chosen_rows(
    rows: Sequence[tuple[str, float, str]], num_kept: int, *, by_quality: bool
) -> set[str]:
    ids = [row[0] for row in rows]
    qualities = [row[1] for row in rows] if by_quality else None
    kept = choose(ids, num_kept, qualities=qualities, strata=[(row[2],) for row in rows])
    assert kept == sorted(set(kept))
    return {ids[number] for number in kept}


@settings(deadline=None)
@given(rows_strategy, st.integers(1, 40), st.booleans(), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(rows: list, num_kept: int, by_quality: bool, rng) -> None:
    named = [(f"s/{n}", *row) for n, row in enumerate(rows)]
    expected = chosen_rows(named, num_kept, by_quality=by_quality)
    shuffled = rng.sample(named, len(named))
    assert chosen_rows(shuffled, num_kept, by_quality=by_quality) == expected
    assert len(expected) == min(num_kept, len(rows))


@settings(deadline=None)
@given(rows_strategy, st.integers(1, 40))
def test_every_stratum_keeps_its_best(rows: list, num_kept: int) -> None:
    named = [(f"s/{n}", *row) for n, row in enumerate(rows)]
    kept = chosen_rows(named, num_kept, by_quality=True)
    for stratum in "abc":
        scores = {i: -1.0 if math.isnan(q) else q for i, q, s in named if s == stratum}
        inside = [score for i, score in scores.items() if i in kept]
        outside = [score for i, score in scores.items() if i not in kept]
        assert not inside or not outside or min(inside) >= max(outside)


def test_strata_share_evenly_and_the_remainder_goes_by_their_hash() -> None:
    strata = [("a", "x"), ("b", "x"), ("a", "y"), ("", "")] * 10
    first = min(set(strata), key=lambda stratum: hash_number("stratum", "\0".join(stratum)))
    counts = Counter(strata[number] for number in choose(IDS, 13, strata=strata))
    assert sorted(counts.values()) == [3, 3, 3, 4]
    assert counts[first] == 4


def test_without_strata_the_choice_is_not_even() -> None:
    """Negative control of the test above."""
    strata = [("a",)] * 36 + [("b",)] * 4
    assert Counter(strata[n] for n in choose(IDS, 8, strata=strata)) == {("a",): 4, ("b",): 4}
    assert Counter(strata[n] for n in choose(IDS, 8))[("b",)] < 4


@pytest.mark.parametrize("num_kept", [40, 41, 1000])
def test_a_limit_above_the_rows_keeps_all(num_kept: int) -> None:
    strata = [("a",)] * 39 + [("b",)]
    assert choose(IDS, num_kept) == choose(IDS, num_kept, strata=strata) == list(range(40))

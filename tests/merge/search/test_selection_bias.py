"""The best of many noisy scores is too high, and the correction knows by how much."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediphi.merge.search.evaluation import Items, accuracy
from mediphi.merge.search.selection_bias import corrected_score, score_interval

SIZES = {"notes": 150, "codes": 250, "trials": 400}


def candidates(chances: np.ndarray, seed: int) -> list[Items]:
    random = np.random.default_rng(seed)
    return [
        {name: (random.random(size) < chance).tolist() for name, size in SIZES.items()}
        for chance in chances
    ]


def test_among_equals_the_naive_maximum_is_off_and_the_corrected_score_is_not() -> None:
    """200 candidates, all right with probability 0.5; ten worlds."""
    naive, corrected = [], []
    for seed in range(10):
        own = candidates(np.full(200, 0.5), seed)
        naive.append(max(map(accuracy, own)))
        estimate = corrected_score(own, seed=0, num_resamples=200)
        assert estimate is not None
        corrected.append(estimate.mean)
    assert np.mean(naive) > 0.545
    assert np.mean(corrected) == pytest.approx(0.5, abs=0.008)


def test_the_corrected_score_is_the_winners_true_score_where_candidates_differ() -> None:
    """The true score of whom the search would choose, on average over worlds."""
    true, naive, corrected = [], [], []
    for seed in range(10):
        chances = np.random.default_rng(100 + seed).uniform(0.3, 0.6, 100)
        own = candidates(chances, seed)
        scores = list(map(accuracy, own))
        true.append(chances[int(np.argmax(scores))])
        naive.append(max(scores))
        estimate = corrected_score(own, seed=0, num_resamples=200)
        assert estimate is not None
        corrected.append(estimate.mean)
        assert estimate.low < true[-1] < estimate.high
    assert np.mean(naive) - np.mean(true) > 0.01
    assert abs(np.mean(corrected) - np.mean(true)) < 0.008


def test_one_candidate_needs_no_correction() -> None:
    own = candidates(np.array([0.7]), 3)
    estimate = corrected_score(own, seed=0)
    assert estimate is not None
    assert estimate.mean == pytest.approx(accuracy(own[0]), abs=0.002)


def test_equal_candidates_need_no_correction() -> None:
    own = candidates(np.array([0.7]), 3)
    assert corrected_score(own * 9, seed=0) == corrected_score(own, seed=0)


def test_without_items_there_is_no_corrected_score() -> None:
    assert corrected_score([], seed=0) is None
    assert corrected_score([{}], seed=0) is None
    assert corrected_score([{"a": [True]}], seed=0) is None
    assert corrected_score([{"a": [True, False] * 20, "b": [True]}], seed=0) is None
    assert corrected_score([{"a": [True, False], "b": [True, True]}], seed=0) is not None


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=6), min_size=1, max_size=12))
def test_one_candidate_needs_no_correction_on_tiny_sets_either(sets: list[list[bool]]) -> None:
    """Five standard deviations of a mean of a thousand."""
    items = {str(number): of_set for number, of_set in enumerate(sets)}
    estimate = corrected_score([items], seed=0)
    assert estimate is not None
    spread = (sum(np.var(of_set) for of_set in sets) / 1000) ** 0.5 / len(sets)
    assert abs(estimate.mean - accuracy(items)) <= 5 * spread + 1e-6


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.integers(2, 4), st.integers(0, 99))
def test_tiny_sets_are_chosen_on_and_scored_on_as_by_hand(
    sizes: list[int], num: int, seed: int
) -> None:
    """Against a loop over lists, which draws until something is left of every set."""
    random = np.random.default_rng(seed)
    own = [
        {str(n): (random.random(size) < 0.5).tolist() for n, size in enumerate(sizes)}
        for _ in range(num)
    ]
    drawn_scores = []
    for _ in range(600):
        drawn = {name: _drawn(random, len(of_set)) for name, of_set in own[0].items()}
        chosen = max(own, key=lambda one: accuracy(_taken(one, drawn)))
        left = {
            n: [i for i in range(len(own[0][n])) if i not in places] for n, places in drawn.items()
        }
        drawn_scores.append(accuracy(_taken(chosen, left)))
    estimate = corrected_score(own, seed=0)
    assert estimate is not None
    spread = np.std(drawn_scores) * (1 / 600 + 1 / 1000) ** 0.5
    assert abs(estimate.mean - np.mean(drawn_scores)) <= 5 * spread + 0.01


def _drawn(random: np.random.Generator, size: int) -> list[int]:
    while True:
        places = random.integers(0, size, size).tolist()
        if len(set(places)) < size:
            return places


def _taken(items: Items, places: dict[str, list[int]]) -> Items:
    return {name: [items[name][place] for place in own] for name, own in places.items()}


def test_the_interval_is_that_of_an_independent_bootstrap() -> None:
    from scipy.stats import bootstrap

    items = candidates(np.array([0.6]), 1)[0]
    ours = score_interval(items, seed=0, num_resamples=5000)
    assert ours.mean == pytest.approx(accuracy(items))

    def mean_of_sets(*sets: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([of_set.mean(axis=axis) for of_set in sets], axis=0)

    theirs = bootstrap(
        [np.array(of_set, float) for of_set in items.values()],
        mean_of_sets,
        method="percentile",
        n_resamples=5000,
        rng=1,
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.high, abs=0.004)


def test_the_same_seed_gives_the_same_numbers() -> None:
    own = candidates(np.full(20, 0.5), 4)
    first = corrected_score(own, seed=1, num_resamples=150)
    assert first == corrected_score(own, seed=1, num_resamples=150)
    assert first != corrected_score(own, seed=2, num_resamples=150)

"""Giving up early: certain by counting, or sound but for a stated risk."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_search import SETTINGS, toy_fitness, toy_search

from mediphi.merge.search import Evaluation, Genome, Hopeless
from mediphi.merge.search.evaluation import accuracy, make_hopeless

SIZES = (60, 200, 340)
LOOKS = range(10, 340, 20)


def answers(chance: float, random: np.random.Generator) -> dict[str, list[bool]]:
    return {str(size): (random.random(size) < chance).tolist() for size in SIZES}


def items_until_given_up(items: dict[str, list[bool]], hopeless: Hopeless) -> int | None:
    """Items done when it is given up, taken in their order; None: it is not."""
    for look in LOOKS:
        done = [min(look, size) for size in SIZES]
        right = [sum(of_set[:look]) for of_set in items.values()]
        if hopeless(right, done, SIZES):
            return sum(done)
    return None


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_the_certain_bound_never_gives_up_who_could_win(data: st.DataObject) -> None:
    """Any answers in any order, not only random ones."""
    sets = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=3)
    items = {str(n): own for n, own in enumerate(data.draw(sets))}
    best = data.draw(st.floats(0, 1) | st.just(accuracy(items)))
    hopeless = make_hopeless(best, risk=0.0)
    sizes = [len(own) for own in items.values()]
    for look in range(max(sizes) + 1):
        done = [min(look, size) for size in sizes]
        right = [sum(own[:look]) for own in items.values()]
        if hopeless(right, done, sizes):
            assert accuracy(items) <= best
    assert hopeless([sum(own) for own in items.values()], sizes, sizes) == (accuracy(items) <= best)


def test_the_certain_bound_gives_up_as_soon_as_it_can() -> None:
    hopeless = make_hopeless(0.5, risk=0.0)
    assert not hopeless([0], [4], [10])
    assert hopeless([0], [5], [10])
    assert not hopeless([0, 1], [5, 1], [10, 10])


class Simulated(NamedTuple):
    num_wrong: int
    """Candidates given up that were better than the best before them."""
    num_better: int
    """Candidates that were."""
    num_given_up: int
    num_items: int


def simulate(make: Callable[[float], Hopeless], num_searches: int) -> Simulated:
    """Searches among 30 candidates of unlike chances; `make` takes the best."""
    random = np.random.default_rng(7)
    wrong = better = given_up = num_items = 0
    for _ in range(num_searches):
        best = 0.0
        for _ in range(30):
            items = answers(random.uniform(0.35, 0.6), random)
            is_better = best > 0 and accuracy(items) > best
            done = items_until_given_up(items, make(best)) if best else None
            num_items += sum(SIZES) if done is None else done
            better += is_better
            given_up += done is not None
            wrong += is_better and done is not None
            best = max(best, accuracy(items)) if done is None else best
    return Simulated(wrong, better, given_up, num_items)


def with_risk(risk: float) -> Callable[[float], Hopeless]:
    return lambda best: make_hopeless(best, risk=risk)


def test_a_candidate_that_would_win_is_given_up_within_the_risk() -> None:
    found = simulate(with_risk(0.05), 100)
    assert found.num_better > 200
    assert found.num_wrong <= 0.05 * found.num_better
    assert found.num_given_up > 1000


@pytest.mark.parametrize("risk", [0.0, 0.1])
def test_where_ties_win_an_equal_candidate_is_not_given_up(risk: float) -> None:
    """Nine of ten right so far, one item left: at best it is as good as the best."""
    for ties_win in (False, True):
        hopeless = make_hopeless(1.0, risk=risk, ties_win=ties_win)
        assert hopeless([9], [9], [10]) is not ties_win
    assert make_hopeless(0.95, risk=risk, ties_win=True)([8], [9], [10])


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.sampled_from([0.0, 0.3]))
def test_an_estimate_that_is_given_up_is_never_above_the_best(
    counts: list[int], risk: float
) -> None:
    """Else it would be told as better than what was scored to the end."""
    done, size = [20] * len(counts), [25] * len(counts)
    estimate = float(np.mean(counts)) / 20
    assert not make_hopeless(estimate - 1e-9, risk=risk)(counts, done, size)


def test_the_simulation_sees_a_bound_that_is_not_sound() -> None:
    """The mean so far, without its radius, gives up winners in most searches."""

    def make(best: float) -> Hopeless:
        return lambda right, done, size: bool(np.mean(np.divide(right, done)) <= best)

    found = simulate(make, 20)
    assert found.num_wrong > 0.3 * found.num_better


def test_the_radius_is_that_of_the_formula() -> None:
    """20 of 50 items right, 100 in all; the second look has a wider radius."""
    for look in (1, 2):
        chance = 0.1 * 6 / math.pi**2 / look**2
        bound = 0.4 + math.sqrt(math.log(1 / chance) * (1 - 49 / 100) / (2 * 50))
        for best, expected in ((bound + 1e-6, True), (bound - 1e-6, False)):
            hopeless = make_hopeless(best, risk=0.1)
            found = [hopeless([20], [50], [100]) for _ in range(look)]
            assert found[-1] is expected


def test_a_larger_risk_gives_up_earlier() -> None:
    certain, small, large = (simulate(with_risk(risk), 10) for risk in (0.0, 0.01, 0.5))
    assert certain.num_items > small.num_items > large.num_items


@pytest.mark.parametrize("risk", [0.0, 0.1])
def test_a_search_that_gives_up_has_the_same_kind_of_winner(risk: float, tmp_path: Path) -> None:
    """Every candidate given up was indeed no better than the best before it."""

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        whole = toy_fitness(genome)
        own = whole.items["set"]
        for done in range(4, len(own), 4):
            if hopeless is not None and hopeless([sum(own[:done])], [done], [len(own)]):
                return Evaluation(sum(own[:done]) / done, stopped=True)
        return whole

    found = toy_search(tmp_path / "s.jsonl", fitness=fitness, settings=replace(SETTINGS, risk=risk))
    assert found.count("stopped") > 5
    best = 0.0
    for record in found.records:
        if record.status == "ok":
            best = max(best, record.fitness or 0.0)
        elif record.status == "stopped":
            assert toy_fitness(record.genome).fitness <= best
            assert record.holdout is None
    assert found.winner.status == "ok"
    assert found.corrected is None  # it needs every answer of each
    again = toy_search(tmp_path / "s.jsonl", fitness=fitness, settings=replace(SETTINGS, risk=risk))
    assert again == found


def test_off_by_default(tmp_path: Path) -> None:
    given_to: list[Callable[..., bool] | None] = []

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        given_to.append(hopeless)
        return toy_fitness(genome)

    assert SETTINGS.risk is None
    toy_search(tmp_path / "s.jsonl", fitness=fitness)
    assert set(given_to) == {None}

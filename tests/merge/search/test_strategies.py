"""CMA-ES is the library's, the grid is all of it, and both move within the bounds."""

import itertools
from dataclasses import replace
from pathlib import Path

import cma
import numpy as np
import pytest
from toy_search import history, toy_holdout, toy_search

from mediphi.errors import UserError
from mediphi.merge.search import (
    CandidateError,
    Evaluation,
    Fitness,
    Genome,
    Hopeless,
    SearchSettings,
    Space,
    SpaceOptions,
)
from mediphi.merge.search.strategies import grid_axes

SPACE = Space("breadcrumbs", ("a", "b"), SpaceOptions(digits=8))


def hill(genome: Genome, hopeless: Hopeless | None = None) -> Evaluation:
    """Highest at 0.3 of every bound's width."""
    point = SPACE.encode(genome)
    return Evaluation(-float(np.sum((point - 0.3) ** 2)))


def valley(genome: Genome, hopeless: Hopeless | None = None) -> Evaluation:
    """Rosenbrock's function, turned over, with its optimum at 0.5."""
    x = 2 * SPACE.encode(genome)
    return Evaluation(-float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)))


@pytest.mark.parametrize("population", [None, 4, 13])
def test_it_asks_for_what_the_librarys_own_loop_asks_for(
    population: int | None, tmp_path: Path
) -> None:
    asked: list[Genome] = []

    def objective(point: np.ndarray) -> float:
        asked.append(SPACE.decode(point))
        return -hill(asked[-1]).fitness

    options = {"bounds": [0, 1], "seed": 11, "verbose": -10, "verb_log": 0, "maxfevals": 200}
    options |= {} if population is None else {"popsize": population}
    before = np.random.get_state()
    cma.fmin2(objective, SPACE.start, 1 / 6, options | {"eval_final_mean": False})
    np.random.set_state(before)
    settings = SearchSettings(seed=11, population=population, num_evaluations=200)
    result = toy_search(
        tmp_path / "s.jsonl", space=SPACE, fitness=hill, settings=settings, holdout=None
    )
    assert [record.genome for record in result.records] == asked[:200]
    assert len(asked) >= 200


@pytest.mark.parametrize(("fitness", "budget"), [(hill, 1200), (valley, 4000)])
def test_it_finds_the_optimum_of_known_functions(
    fitness: Fitness, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)  # minutes of waiting for a disk
    settings = SearchSettings(num_evaluations=budget)
    result = toy_search(
        tmp_path / "s.jsonl", space=SPACE, fitness=fitness, settings=settings, holdout=None
    )
    assert result.winner.fitness == pytest.approx(0.0, abs=1e-7)


def test_one_coordinate_is_searched_too(tmp_path: Path) -> None:
    space = Space("slerp", ("medcode",))
    result = toy_search(
        tmp_path / "s.jsonl",
        space=space,
        fitness=lambda genome, hopeless: Evaluation(-abs(genome["t"] - 0.237)),
        settings=SearchSettings(num_evaluations=80),
        holdout=None,
    )
    assert result.winner.genome["t"] == pytest.approx(0.237, abs=0.002)


@pytest.mark.parametrize("strategy", ["cmaes", "random"])
def test_no_genome_is_evaluated_twice_and_the_budget_is_used(strategy: str, tmp_path: Path) -> None:
    """With one decimal there are 11 values; a flat fitness makes CMA-ES start anew."""
    space = Space("slerp", ("medcode",), SpaceOptions(digits=1))
    calls: list[float] = []

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        calls.append(genome["t"])
        return Evaluation(0.5)

    settings = SearchSettings(strategy=strategy, num_evaluations=200)  # type: ignore[arg-type]
    result = toy_search(
        tmp_path / "s.jsonl", space=space, fitness=fitness, settings=settings, holdout=None
    )
    assert sorted(calls) == [t / 10 for t in range(11)]
    assert result.ended == "exhausted"
    assert result.num_repeated > 50
    assert result.winner.number == 1


@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["flat", "hill"])
def test_cmaes_goes_on_where_it_has_converged(slope: float, tmp_path: Path) -> None:
    space = Space("task_arithmetic", ("a",), SpaceOptions(digits=2))

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        return Evaluation(-slope * sum((value - 0.6) ** 2 for value in genome.values()))

    result = toy_search(
        tmp_path / "s.jsonl",
        space=space,
        fitness=fitness,
        settings=SearchSettings(num_evaluations=400),
        holdout=None,
    )
    assert len({tuple(r.genome.values()) for r in result.records}) == 400
    assert result.ended == "budget"
    assert slope == 0.0 or result.winner.genome == {"weight/a": 0.6, "lambda": 0.6}


def test_the_paper_s_slerp_shares_are_a_grid(tmp_path: Path) -> None:
    space = Space("slerp", ("medcode",))
    settings = SearchSettings(strategy="grid", grid={"t": (0.1, 0.25, 0.5)})
    result = toy_search(
        tmp_path / "s.jsonl",
        space=space,
        fitness=lambda genome, hopeless: Evaluation(-abs(genome["t"] - 0.3)),
        settings=settings,
        holdout=None,
    )
    assert [record.genome for record in result.records] == [{"t": 0.1}, {"t": 0.25}, {"t": 0.5}]
    assert result.winner.genome == {"t": 0.25}
    assert result.ended == "exhausted"


def test_a_grid_is_all_combinations(tmp_path: Path) -> None:
    space = Space("task_arithmetic", ("a", "b"))
    grid = {"weight": (0.25, 0.75), "weight/b": (0.1, 0.2, 0.3), "lambda": (1.0, 1.2)}
    result = toy_search(
        tmp_path / "s.jsonl",
        space=space,
        fitness=lambda genome, hopeless: Evaluation(sum(genome.values())),
        settings=SearchSettings(strategy="grid", grid=grid),
        holdout=None,
    )
    expected = itertools.product((0.25, 0.75), (0.1, 0.2, 0.3), (1.0, 1.2))
    assert [tuple(record.genome.values()) for record in result.records] == list(expected)


def test_equal_values_of_a_grid_are_one(tmp_path: Path) -> None:
    space = Space("slerp", ("medcode",), SpaceOptions(bounds={"t": (-0.0, 0.12345)}))
    grid = {"t": (0.1, 0.10, 0.0, -0.0, 0.12345)}
    result = toy_search(
        tmp_path / "s.jsonl",
        space=space,
        fitness=lambda genome, hopeless: Evaluation(genome["t"]),
        settings=SearchSettings(strategy="grid", grid=grid),
        holdout=None,
    )
    assert grid_axes(space, grid) == [(0.1, 0.0, 0.12345)]
    assert [record.genome["t"] for record in result.records] == [0.1, 0.0, 0.12345]
    assert result.num_repeated == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "grid", "grid": {"weight": (0.1,)}}, "grid has no values for lambda"),
        ({"strategy": "grid", "grid": {"weight": (2.0,), "lambda": (1,)}}, "weight/a=2 lies out"),
        (
            {"strategy": "grid", "grid": {"weight": (1.0,), "lambda": (1,), "t": (1,)}},
            "grid has values for t; the search moves weight/a, weight/b, lambda",
        ),
        (
            {
                "strategy": "grid",
                "grid": {"weight": [n / 1000 for n in range(1000)], "lambda": (1,)},
            },
            "the grid has 1,000,000 combinations; at most 100,000",
        ),
        (
            {"strategy": "grid", "grid": {"weight": (0.5, 0.33333), "lambda": (1,)}},
            "grid value weight/a=0.33333 must have at most 4 decimals, such as 0.3333",
        ),
        (
            {"strategy": "grid", "grid": {"weight/a": (0.00001,), "weight": (1,), "lambda": (1,)}},
            "grid value weight/a=1e-05 must have at most 4 decimals, such as 0.0",
        ),
        ({"grid": {"weight": (0.1,)}}, "a grid was given and strategy=cmaes"),
        ({"population": 3}, "population=3 is too small; it must be at least 4"),
        ({"sigma": 0.0}, "sigma=0 must lie within (0, 1]"),
        ({"risk": 1.0}, "risk=1 must lie within [0, 1)"),
        ({"num_evaluations": None}, "a search needs a budget"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(
    settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        toy_search(
            tmp_path / "s.jsonl",
            space=Space("task_arithmetic", ("a", "b")),
            settings=SearchSettings(**settings),  # type: ignore[arg-type]
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s.jsonl").exists()


def test_a_file_of_signals_in_the_working_directory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = toy_search(tmp_path / "alone.jsonl")
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")
    monkeypatch.chdir(tmp_path)
    beside = toy_search(tmp_path / "beside.jsonl")
    assert history(beside.records) == history(alone.records)
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"cma_signals.in", "alone.jsonl", "beside.jsonl"}


SOUP = Space("linear", ("a", "b", "c", "d"))


def soup_fitness(genome: Genome, hopeless: Hopeless | None = None) -> Evaluation:
    """A mean of errors that cancel: b and d together are better than either, a spoils them."""
    errors = {"a": 0.9, "b": 0.2, "c": -0.8, "d": -0.3}
    taken = [errors[name.partition("/")[2]] for name, weight in genome.items() if weight == 1]
    assert taken and set(genome.values()) <= {0.0, 1.0}
    return Evaluation(-abs(sum(taken) / len(taken)))


def test_the_greedy_soup_takes_a_model_where_the_mean_is_no_worse(tmp_path: Path) -> None:
    """By hand: b -0.2, d -0.3, c -0.8, a -0.9 alone; b+d 0.05; with c worse; with a worse."""
    settings = SearchSettings(strategy="greedy")
    result = toy_search(
        tmp_path / "s.jsonl", space=SOUP, fitness=soup_fitness, settings=settings, holdout=None
    )
    assert len(result.records) == 4 + 3 and result.ended == "exhausted"
    assert result.winner.genome == {"weight/a": 0, "weight/b": 1, "weight/c": 0, "weight/d": 1}
    assert result.winner.fitness == pytest.approx(-0.05)


PAIR = Space("linear", ("a", "b"))
GREEDY = SearchSettings(strategy="greedy")


@pytest.mark.parametrize(
    ("alone", "together", "winner"),
    [
        ((0.5, 0.5), 0.5, (1, 1)),
        ((0.5, 0.5), 0.4, (1, 0)),
        ((0.4, 0.5), 0.5, (1, 1)),
        ((0.5, 0.5), None, (1, 0)),
        ((None, 0.5), 0.5, (1, 1)),
        ((None, 0.5), None, (0, 1)),
    ],
)
def test_the_winner_is_the_last_soup_taken(
    alone: tuple[float | None, float],
    together: float | None,
    winner: tuple[int, int],
    tmp_path: Path,
) -> None:
    """Where the mean is no worse; not of models alone that are equal, and not what failed."""
    scores = {"10": alone[0], "01": alone[1], "11": together}

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        found = scores["".join(f"{value:g}" for value in genome.values())]
        if found is None:
            raise CandidateError("no memory")
        return Evaluation(found)

    path = tmp_path / "s.jsonl"
    result = toy_search(path, space=PAIR, fitness=fitness, settings=GREEDY)
    assert tuple(result.winner.genome.values()) == winner
    assert result.winner.holdout == toy_holdout(result.winner.genome)
    assert toy_search(path, space=PAIR, fitness=fitness, settings=GREEDY) == result


def test_a_tied_soup_is_taken_and_the_next_is_tried_with_it(tmp_path: Path) -> None:
    """Killed after every evaluation, too."""
    flat = lambda genome, hopeless: Evaluation(0.5)  # noqa: E731
    path = tmp_path / "s.jsonl"
    for most in range(1, 9):
        some = replace(GREEDY, num_evaluations=most)
        result = toy_search(path, space=SOUP, fitness=flat, settings=some)
    assert [sum(r.genome.values()) for r in result.records] == [1, 1, 1, 1, 2, 3, 4]
    assert (result.winner.number, result.ended) == (7, "exhausted")
    whole = toy_search(tmp_path / "w.jsonl", space=SOUP, fitness=flat, settings=GREEDY)
    assert history(result.records) == history(whole.records)
    assert [r.number for r in whole.records if r.holdout] == [1, 5, 6, 7]


def test_a_soup_that_may_tie_is_not_given_up(tmp_path: Path) -> None:
    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        items = {"set": (True, False)}
        if hopeless is not None and hopeless([1], [1], [2]):
            return Evaluation(1.0, stopped=True)
        if hopeless is not None and hopeless([0], [1], [2]):
            return Evaluation(0.0, stopped=True)
        return Evaluation(0.5, items=items)

    settings = replace(GREEDY, risk=0.0)
    result = toy_search(tmp_path / "s.jsonl", space=PAIR, fitness=fitness, settings=settings)
    assert [r.status for r in result.records] == ["ok", "stopped", "ok"]
    assert tuple(result.winner.genome.values()) == (1, 1)
    assert result.corrected is None


def test_the_greedy_soup_needs_one_weight_of_every_model(tmp_path: Path) -> None:
    settings = SearchSettings(strategy="greedy")
    with pytest.raises(UserError, match="take merge=linear"):
        toy_search(tmp_path / "s.jsonl", space=SPACE, fitness=hill, settings=settings)


def test_a_search_begins_where_it_is_told_to() -> None:
    options = SpaceOptions(start={"weight/b": 0.77, "lambda": 9.0})
    space = Space("breadcrumbs", ("a", "b"), options)
    start = space.decode(space.start)
    assert (start["weight/a"], start["weight/b"], start["lambda"]) == (0.5, 0.77, 1.5)

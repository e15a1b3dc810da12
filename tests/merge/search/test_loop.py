"""What counts, who wins, when it ends."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toy_search import SETTINGS, toy_fitness, toy_holdout, toy_search

from mediphi.errors import UserError
from mediphi.merge.search import (
    CandidateError,
    Evaluation,
    Genome,
    Hopeless,
    Record,
    SearchResult,
)
from mediphi.merge.search import strategies as strategies_module


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return toy_search(tmp_path_factory.mktemp("search") / "s.jsonl")


def test_failed_candidates_count_and_say_why(result: SearchResult) -> None:
    failed = [record for record in result.records if record.status == "failed"]
    assert len(failed) == result.count("failed") > 1
    assert {record.reason for record in failed} == {"the weights sum to zero"}
    assert all(record.fitness is None for record in failed)
    assert [record.number for record in result.records] == list(range(1, 39))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_fitness_that_is_no_number_is_a_failure(value: float, tmp_path: Path) -> None:
    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        return Evaluation(value if genome["lambda"] > 1.1 else genome["lambda"])

    found = toy_search(tmp_path / "s.jsonl", fitness=fitness)
    assert found.count("failed") > 0
    assert found.winner.genome["lambda"] <= 1.1
    assert {r.reason for r in found.records if r.status == "failed"} == {f"the fitness is {value}"}
    assert toy_search(tmp_path / "s.jsonl", fitness=fitness) == found


def test_the_strategy_is_told_the_lowest_fitness_for_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[float]] = []
    tell = strategies_module.Cmaes.tell

    def listen(
        self: strategies_module.Cmaes, points: list, fitness: list[float], *, best: int | None
    ) -> None:
        told.append(list(fitness))
        tell(self, points, fitness, best=best)

    monkeypatch.setattr(strategies_module.Cmaes, "tell", listen)
    found = toy_search(tmp_path / "s.jsonl")
    for generation, values in enumerate(told):
        own = [r for r in found.records if r.generation <= generation]
        lowest = min(r.fitness for r in own if r.fitness is not None)
        newest = [r for r in own if r.generation == generation]
        expected = [lowest if r.fitness is None else r.fitness for r in newest]
        assert values == expected
    assert any(r.status == "failed" for r in found.records[: 5 * len(told)])


def test_a_first_generation_that_fails_whole_ends_the_search(tmp_path: Path) -> None:
    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        raise CandidateError("no\nmemory")

    for _ in ("first", "resumed"):
        with pytest.raises(UserError, match=r"^all 5 candidates failed, .* with: no memory$"):
            toy_search(tmp_path / "s.jsonl", fitness=fitness)


def test_an_error_of_the_program_is_no_failed_candidate(tmp_path: Path) -> None:
    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        toy_search(tmp_path / "s.jsonl", fitness=fitness)
    assert len(toy_search(tmp_path / "s.jsonl").records) == 38


def test_the_winner_is_the_first_of_the_highest_on_the_search_split(result: SearchResult) -> None:
    scores = [r.fitness for r in result.records if r.fitness is not None]
    assert result.winner.fitness == max(scores)
    assert result.winner == next(r for r in result.records if r.fitness == max(scores))


def test_the_holdout_split_is_scored_for_every_new_best_and_chooses_nothing(
    result: SearchResult, tmp_path: Path
) -> None:
    best = -math.inf
    for record in result.records:
        is_new_best = record.fitness is not None and record.fitness > best
        assert (record.holdout is not None) == is_new_best
        if record.holdout is not None:
            assert record.holdout == toy_holdout(record.genome)
            best = record.fitness or 0.0
    other = toy_search(tmp_path / "s.jsonl", holdout=lambda genome: Evaluation(-genome["lambda"]))
    assert [r.genome for r in other.records] == [r.genome for r in result.records]
    assert other.winner.genome == result.winner.genome
    assert result.holdout is not None
    assert result.gap == pytest.approx((result.winner.fitness or 0.0) - result.holdout.mean)


def test_without_a_holdout_split_there_is_no_gap(tmp_path: Path) -> None:
    alone = toy_search(tmp_path / "s.jsonl", holdout=None)
    assert alone.gap is None
    assert alone.holdout is None
    assert alone.corrected is not None


def test_minutes_are_summed_over_resumed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that an evaluation moves on by six seconds, and the time between runs by a day."""
    now = 0.0

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        nonlocal now
        now += 6.0
        if now == 24.0:
            raise KeyboardInterrupt
        return toy_fitness(genome)

    monkeypatch.setattr("mediphi.merge.search.loop.time.monotonic", lambda: now)
    settings = replace(SETTINGS, num_evaluations=None, minutes=1.0)
    with pytest.raises(KeyboardInterrupt):
        toy_search(tmp_path / "s.jsonl", fitness=fitness, settings=settings)
    now += 86_400.0
    found = toy_search(tmp_path / "s.jsonl", fitness=fitness, settings=settings)
    assert len(found.records) == 10
    assert found.seconds == 60.0
    assert found.ended == "budget"


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(
    result: SearchResult, tmp_path: Path
) -> None:
    small = toy_search(tmp_path / "s.jsonl", settings=replace(SETTINGS, num_evaluations=12))
    assert len(small.records) == 12
    seen: list[Record] = []
    large = toy_search(tmp_path / "s.jsonl", on_evaluation=seen.append)
    assert [r.genome for r in large.records] == [r.genome for r in result.records]
    assert [r.number for r in seen] == list(range(13, 39))


def test_a_fitness_that_is_not_the_mean_of_its_items_is_a_fault(tmp_path: Path) -> None:
    wrong = Evaluation(0.9, {}, {"a": (True, False), "b": (True, True, True, False)})
    with pytest.raises(ValueError, match=r"fitness 0.9 is not the items' mean 0.625"):
        toy_search(tmp_path / "s.jsonl", fitness=lambda genome, hopeless: wrong)


def test_progress_is_told_in_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = toy_search(tmp_path / "s.jsonl")
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("search 38/38  ")
    assert told[-1].endswith(f"best {found.winner.fitness:.4f}  failed {found.count('failed')}")


def test_on_a_terminal_progress_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    toy_search(tmp_path / "s.jsonl", settings=replace(SETTINGS, minutes=1.0))
    told = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "━━━" in told
    assert "38/38" in told
    assert "/1 min" in told

"""A search killed anywhere and started again has the history of one that ran through."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_search import SETTINGS, history, toy_fitness, toy_search

from mediphi.errors import ArtifactError
from mediphi.merge.search import Evaluation, Genome, Hopeless, SearchResult

NUM = SETTINGS.num_evaluations or 0
PROGRAM = Path(__file__).with_name("toy_search.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchResult, bytes]:
    path = tmp_path_factory.mktemp("whole") / "search.jsonl"
    return toy_search(path), path.read_bytes()


def test_a_search_killed_in_every_evaluation_and_every_write_has_the_same_history(
    whole: tuple[SearchResult, bytes], tmp_path: Path
) -> None:
    assert {record.generation for record in whole[0].records} == set(range(8))
    ledger = tmp_path / "search.jsonl"
    numbers = [str(n) for n in range(1, NUM + 1) for _ in ("before", "in the write")]
    subprocess.run(
        [sys.executable, str(PROGRAM), str(ledger), *numbers],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    calls: list[Genome] = []
    resumed = toy_search(ledger, fitness=counting(calls))
    assert history(resumed.records) == history(whole[0].records)
    assert resumed.winner._replace(seconds=0) == whole[0].winner._replace(seconds=0)
    assert resumed.num_repeated == whole[0].num_repeated
    assert len(calls) == 1


def test_a_line_torn_at_any_byte_is_evaluated_again(
    whole: tuple[SearchResult, bytes], tmp_path: Path
) -> None:
    ledger, text = tmp_path / "search.jsonl", whole[1]
    last = text[:-1].rfind(b"\n") + 1
    places = [0, 1, text.index(b"\n"), *range(last, len(text) - 1, 25), len(text) - 1]
    for end in places:
        ledger.write_bytes(text[:end])
        calls: list[Genome] = []
        resumed = toy_search(ledger, fitness=counting(calls))
        assert history(resumed.records) == history(whole[0].records)
        assert len(calls) == (1 if end >= last else NUM)
        assert ledger.read_bytes().count(b"\n") == text.count(b"\n")


def test_a_finished_search_evaluates_nothing_and_says_the_same(
    whole: tuple[SearchResult, bytes], tmp_path: Path
) -> None:
    ledger = tmp_path / "search.jsonl"
    ledger.write_bytes(whole[1])
    calls: list[Genome] = []
    assert toy_search(ledger, fitness=counting(calls), on_evaluation=calls.append) == whole[0]
    assert not calls
    assert ledger.read_bytes() == whole[1]


def test_numpys_global_generator_is_neither_read_nor_touched(
    whole: tuple[SearchResult, bytes], tmp_path: Path
) -> None:
    np.random.seed(1)

    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        np.random.seed(sum(map(ord, str(genome))))
        return toy_fitness(genome)

    result = toy_search(tmp_path / "reseeded.jsonl", fitness=fitness)
    assert history(result.records) == history(whole[0].records)
    before = np.random.get_state()[1].copy()
    toy_search(tmp_path / "again.jsonl")
    assert (np.random.get_state()[1] == before).all()


def test_another_seed_has_another_history(
    whole: tuple[SearchResult, bytes], tmp_path: Path
) -> None:
    other = toy_search(tmp_path / "search.jsonl", settings=replace(SETTINGS, seed=6))
    assert history(other.records) != history(whole[0].records)


def test_a_ledger_that_the_strategy_would_not_write_is_refused(tmp_path: Path) -> None:
    ledger = tmp_path / "search.jsonl"
    toy_search(ledger, fitness=lambda genome, hopeless: Evaluation(genome["lambda"]), holdout=None)
    lines = ledger.read_bytes().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    toy_search(other, fitness=lambda genome, hopeless: Evaluation(-genome["lambda"]), holdout=None)
    theirs = other.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:8] + theirs[8:]))
    with pytest.raises(ArtifactError, match=r"search\.jsonl:9: the search would not try"):
        toy_search(ledger, holdout=None)


def counting(calls: list[Genome]) -> Callable[[Genome, Hopeless | None], Evaluation]:
    def fitness(genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        calls.append(genome)
        return toy_fitness(genome, hopeless)

    return fitness

"""The page shows what was tried and found, needs nothing else, and repeats byte for byte."""

import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from toy_search import SETTINGS, SPACE, toy_search

from mediphi.merge.search import Evaluation, SearchResult, SearchSettings, Space, SpaceOptions
from mediphi.merge.search.page import bests, write_search_page


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return toy_search(tmp_path_factory.mktemp("search") / "s.jsonl")


def write(folder: Path, result: SearchResult, space: Space = SPACE) -> str:
    facts = {"Experts": "a <and> b"}
    page = write_search_page(folder, title="Search", space=space, result=result, facts=facts)
    assert page == folder / "search.html"
    return page.read_text("utf-8")


def test_the_winner_its_scores_and_the_counts_are_there(
    result: SearchResult, tmp_path: Path
) -> None:
    page = write(tmp_path, result)
    text = unescape(re.sub(r"<[^>]+>", "|", page))
    assert f"Evaluations||{len(result.records)}|" in text
    assert f"Failed||{result.count('failed')}|" in text
    assert "Experts||a <and> b|" in text
    assert result.corrected is not None
    assert result.holdout is not None
    for score in (result.winner.fitness, result.corrected.mean, result.holdout.mean):
        assert f"|{score:.4f}|" in text
    assert result.gap is not None and result.correction is not None
    assert f"gap: search less hold-out|{100 * result.gap:+.1f} points|" in text.replace("||", "|")
    told = f"correction: corrected less search|{100 * result.correction:+.1f} points|"
    assert told in text.replace("||", "|")
    for value in result.winner.genome.values():
        assert f"|{value:g}|" in text
    assert page.count("<svg ") == 2
    assert page.count('role="img"') == 2


def test_it_needs_nothing_from_elsewhere(result: SearchResult, tmp_path: Path) -> None:
    page = write(tmp_path, result)
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", page)
    assert not re.search(r'(src|href)="(?!#)', page)
    assert list(tmp_path.iterdir()) == [tmp_path / "search.html"]


def test_it_repeats_byte_for_byte(result: SearchResult, tmp_path: Path) -> None:
    assert write(tmp_path, result) == write(tmp_path, result)


def test_the_best_are_those_that_rose(result: SearchResult) -> None:
    found = bests(result.records)
    assert found[-1] == result.winner
    assert [r for r in result.records if r.holdout is not None] == found


@pytest.mark.parametrize("num_layer_groups", [1, 3])
def test_a_search_without_holdout_items_or_failures_has_a_page_too(
    num_layer_groups: int, tmp_path: Path
) -> None:
    space = Space("breadcrumbs", ("a", "b"), SpaceOptions(num_layer_groups=num_layer_groups))
    found = toy_search(
        tmp_path / "s.jsonl",
        space=space,
        fitness=lambda genome, hopeless: Evaluation(-sum(genome.values())),
        settings=SearchSettings(num_evaluations=9),
        holdout=None,
    )
    page = write(tmp_path, found, space)
    assert "corrected for the choice" not in page
    assert "by validation set" not in page
    assert ("layer group" in page) == (num_layer_groups > 1)


def test_layer_groups_are_named_as_in_the_ledger(tmp_path: Path) -> None:
    """On the chart, below it and in the table."""
    space = Space("task_arithmetic", ("a", "b"), SpaceOptions(num_layer_groups=2))
    page = write(tmp_path, toy_search(tmp_path / "s.jsonl", space=space), space)
    chart = unescape(page[page.index("The winner's parameters".replace("'", "&#x27;")) :])
    labels = re.findall(r">((?:a|b|all)\W?\d)<", chart)
    assert labels == ["a@0", "a@1", "b@0", "b@1", "all@0", "all@1"]
    assert "the number behind the @ is the layer group, 0 next to the input" in chart
    assert all(f">{name}<" in chart for name in space.names)


def test_a_set_with_one_item_leaves_no_corrected_score_and_the_page_says_why(
    tmp_path: Path,
) -> None:
    found = toy_search(
        tmp_path / "s.jsonl",
        fitness=lambda genome, hopeless: Evaluation(0.75, items={"a": (True, False), "b": (True,)}),
        settings=SearchSettings(num_evaluations=2),
    )
    assert found.corrected is None
    page = write(tmp_path, found)
    assert "it needs two questions or more of every validation set" in page
    assert "correction: " not in page


def test_a_search_of_one_candidate_has_a_page_too(tmp_path: Path) -> None:
    one = toy_search(tmp_path / "s.jsonl", settings=replace(SETTINGS, num_evaluations=1))
    assert "The best candidate" in write(tmp_path, one)


def test_searching_loads_no_model_library() -> None:
    code = "import sys, cma, mediphi.merge.search.page; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "lightning", "datasets"} & set(loaded)

"""The committed preference pairs and the script that writes them."""

import json
import lzma
from collections import Counter
from typing import Any

import pytest

from mediphi.synthesize.corruption import ERROR_TYPES
from mediphi.synthesize.corruption.phrases import CHATTER, CLOSINGS, PREFACES, SHALLOW
from scripts.build_mediflow_dpo import (
    NUM_ROWS,
    OUTPUT,
    best_rows,
    by_file,
    num_pairs,
    pairs_of,
    read_split,
)


def committed(name: str) -> list[dict[str, Any]]:
    with lzma.open(OUTPUT / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict[str, Any]]]:
    return {
        split: committed(split) + committed(f"questions_{split}") for split in ("train", "heldout")
    }


def test_the_committed_set_has_enough_pairs_of_every_error_type(
    pairs: dict[str, list[dict[str, Any]]],
) -> None:
    assert len(pairs["train"]) >= 2500
    assert len(pairs["heldout"]) >= 300
    for found in pairs.values():
        counts = Counter(pair["error_type"] for pair in found)
        assert set(counts) == set(ERROR_TYPES)
        assert min(counts.values()) >= 0.04 * len(found)


def test_no_committed_pair_has_two_equal_sides(pairs: dict[str, list[dict[str, Any]]]) -> None:
    for pair in (*pairs["train"], *pairs["heldout"]):
        assert pair["rejected_output"].strip()
        assert pair["rejected_output"].split() != pair["output"].split()
        if pair["output_format"] == "json":
            assert json.loads(pair["rejected_output"]) != json.loads(pair["output"])


def test_no_training_pair_shares_its_input_with_a_held_out_one(
    pairs: dict[str, list[dict[str, Any]]],
) -> None:
    inputs = [{" ".join(p["input"].split()).lower() for p in found} for found in pairs.values()]
    assert inputs[0].isdisjoint(inputs[1])


def test_pairs_of_one_row_have_different_errors(pairs: dict[str, list[dict[str, Any]]]) -> None:
    keys = [(p["instruction"], p["input"], p["output"], p["error_type"]) for p in pairs["train"]]
    assert len(set(keys)) == len(keys)


def test_30_to_65_percent_of_worse_sides_are_longer_and_no_phrase_is_in_over_2_percent(
    pairs: dict[str, list[dict[str, Any]]],
) -> None:
    found = pairs["train"]
    longer = sum(len(p["rejected_output"]) > len(p["output"]) for p in found) / len(found)
    assert 0.3 <= longer <= 0.65
    for phrase in (*PREFACES, *CLOSINGS, *SHALLOW, *CHATTER):
        stem = phrase.split("{}")[0]
        used = sum(len(stem) > 8 and stem in p["rejected_output"] for p in found)
        assert used <= 0.02 * len(found)


def test_the_committed_held_out_pairs_are_what_the_script_writes() -> None:
    found = pairs_of(read_split("heldout"), NUM_ROWS["heldout"])
    names = ("heldout", "questions_heldout")
    assert by_file("heldout", found) == {name: committed(name) for name in names}


def test_the_best_rows_have_the_most_pairs_in_the_papers_proportion() -> None:
    assert list(num_pairs(85)) == [3] * 20 + [2] * 25 + [1] * 40
    rows = read_split("heldout")
    chosen = best_rows(rows, 200)
    qualities = [row["quality"] for row in chosen]
    assert len(chosen) == 200
    assert qualities == sorted(qualities, reverse=True)
    assert {row["task_type"] for row in chosen} == {row["task_type"] for row in rows}

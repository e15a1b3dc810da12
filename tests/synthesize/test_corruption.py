"""Worse answers by rule: each error type does what it says, and only where it can."""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediphi.errors import UserError
from mediphi.synthesize.corruption import ERROR_TYPES, ErrorType, corrupt
from mediphi.synthesize.corruption.trees import points

SEEDS = range(12)

NOTE = (
    "The patient is a 76-year-old woman who was admitted with pneumonia of the left lung. "
    "She had a fever of 39.2 degrees and a cough because of the infection. "
    "She was treated with amoxicillin for 7 days and her symptoms improved."
)
PAGE = (
    "She was seen in the emergency room on Sunday by the doctor on call. "
    "A 76-year-old woman came with fever and cough that had lasted for three days. "
    "The chest film showed pneumonia of the left lung and no effusion. "
    "Her husband reported that she had stopped eating on the second day. "
    "Treatment with amoxicillin was begun, and she went home after 7 days. "
    "A control film was ordered for the following month."
)


def row(output: str, **changes: str) -> dict[str, str]:
    return {
        "instruction": "Summarize the visit in a few sentences.",
        "input": PAGE,
        "output": output,
        "task_type": "summarization",
        "output_format": "plain_text",
        **changes,
    }


SUMMARY = row(NOTE)
DISEASES = row(
    json.dumps({"diseases": ["pneumonia of the left lung", "fever", "cough"]}),
    instruction="List the diseases as JSON.",
    task_type="named entity recognition",
    output_format="json",
)
LABEL = row(
    "neutral",
    instruction="Answer with entailment, contradiction or neutral.",
    task_type="textual entailment",
)
CHOICE = row(
    "B",
    instruction="Answer with the letter alone.",
    input="What is the meaning of J18.9?\nA. Asthma\nB. Pneumonia\nC. Influenza\nD. Cough",
    task_type="multiple-choice question-answering",
)


def variants(given: dict[str, str], error_type: ErrorType, **more: Any) -> list[str]:
    found = [corrupt(given, error_type, seed=seed, **more) for seed in SEEDS]
    assert all(found), f"{error_type} applies to this output with every seed"
    return [text for text in found if text]


def distance(one: str, other: str) -> int:
    """Optimal string alignment: insertions, deletions, substitutions, adjacent exchanges."""
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        rows.append([i])
        for j, b in enumerate(other, 1):
            best = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                best = min(best, rows[i - 2][j - 2] + 1)
            rows[i].append(best)
    return rows[-1][-1]


def test_error_types_are_the_twelve_of_the_paper() -> None:
    assert len(set(ERROR_TYPES)) == 12
    assert {"ambiguity", "over-verbosity", "spelling errors"} < set(ERROR_TYPES)


def test_an_unknown_error_type_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"'typos': allowed are ambiguity, .*spelling errors$"):
        corrupt(SUMMARY, "typos", seed=0)  # type: ignore[arg-type]


PIECES = st.sampled_from(
    [*points(NOTE).parts, *PAGE.split(), "1. Rest.", "- ", "A: b", "no", "?", "a, , b; "]
)
TEXTS = st.one_of(
    st.lists(PIECES, min_size=1, max_size=8).map(" ".join),
    st.lists(PIECES, min_size=1, max_size=6).map("\n".join),
    st.text(min_size=1, max_size=60),
).filter(lambda text: bool(text.strip()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-50, 500) | st.just(36.6) | TEXTS | st.just(""),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["head", "tail", "label", "note"]), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(TEXTS, st.sampled_from(ERROR_TYPES), st.integers(0, 5), st.lists(TEXTS, max_size=3))
def test_a_worse_text_differs_and_is_never_empty(
    output: str, error_type: ErrorType, seed: int, pool: list[str]
) -> None:
    given = row(output, input=f"{PAGE}\n{output}")
    worse = corrupt(given, error_type, seed=seed, pool=pool)
    assert worse == corrupt(given, error_type, seed=seed, pool=pool)
    if worse is not None:
        assert worse.strip()
        assert worse.split() != output.split()


@settings(max_examples=300)
@given(VALUES, st.sampled_from(ERROR_TYPES), st.integers(0, 5), st.sampled_from([None, 2]))
def test_worse_json_is_json_with_other_values(
    value: Any, error_type: ErrorType, seed: int, indent: int | None
) -> None:
    given = row(json.dumps(value, indent=indent), output_format="json")
    worse = corrupt(given, error_type, seed=seed, pool=[json.dumps(["pool"])])
    if worse is not None:
        changed = json.loads(worse)
        assert changed != value
        assert isinstance(changed, type(value)) or not isinstance(value, (dict, list))
        if isinstance(value, dict):
            assert changed.keys() == value.keys()


def test_the_same_seed_gives_the_same_text_in_another_process() -> None:
    code = (
        "import json, sys; from mediphi.synthesize.corruption import *\n"
        "row = json.load(sys.stdin)\n"
        "print(json.dumps([corrupt(row, name, seed=3) for name in ERROR_TYPES]))"
    )
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(SUMMARY),
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        assert json.loads(result.stdout) == [corrupt(SUMMARY, e, seed=3) for e in ERROR_TYPES]


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_seeds_vary_the_error(error_type: ErrorType) -> None:
    wanted = 1 if error_type == "brevity" else 4
    assert len(set(variants(SUMMARY, error_type))) >= wanted


def changed_words(worse: str, output: str = NOTE) -> list[tuple[str, str]]:
    before, after = output.split(), worse.split()
    assert len(before) == len(after)
    return [(a, b) for a, b in zip(before, after, strict=True) if a != b]


def test_spelling_errors_are_single_slips_inside_long_words() -> None:
    for worse in variants(SUMMARY, "spelling errors"):
        pairs = changed_words(worse)
        assert 1 <= len(pairs) <= 5
        for right, wrong in pairs:
            assert len(right.strip(".,")) >= 5
            assert right[0] == wrong[0]
            assert distance(right, wrong) == 1


def test_grammatical_errors_keep_most_words_and_all_numbers() -> None:
    for worse in variants(SUMMARY, "grammatical errors"):
        kept = Counter(worse.split()) & Counter[str](NOTE.split())
        assert kept.total() >= 0.8 * len(NOTE.split())
        assert "76-year-old" in worse
        assert "39.2" in worse


def test_stylistic_issues_keep_the_numbers_and_nearly_all_words() -> None:
    for worse in variants(SUMMARY, "stylistic issues"):
        assert all(number in worse for number in ("76-year-old", "39.2", " 7 "))
        lowered = Counter(worse.lower().split())
        assert (lowered & Counter[str](NOTE.lower().split())).total() >= 0.85 * len(NOTE.split())


def test_factual_inaccuracy_changes_one_word_for_another_of_its_kind() -> None:
    seen = set()
    for worse in variants(SUMMARY, "factual inaccuracy"):
        ((right, wrong),) = changed_words(worse)
        seen.add(right)
        if any(c.isdigit() for c in right):
            assert [c.isdigit() for c in right] == [c.isdigit() for c in wrong]
    assert len(seen) >= 4
    assert seen <= {
        *("76-year-old", "woman", "admitted", "with", "pneumonia", "left", "39.2", "fever"),
        *("7", "days", "amoxicillin", "improved.", "of"),
    }


def test_a_wrong_label_is_another_allowed_one() -> None:
    assert set(variants(LABEL, "factual inaccuracy")) == {"entailment", "contradiction"}
    assert set(variants(CHOICE, "factual inaccuracy")) == {"A", "C", "D"}


def test_a_wrong_entity_comes_from_the_pool_or_keeps_its_kind() -> None:
    given = DISEASES | {"output": '{"diseases": ["gout"]}'}
    pool = ['{"diseases": ["measles", "mumps"]}']
    found = {worse for worse in variants(given, "factual inaccuracy", pool=pool)}
    assert found == {'{"diseases": ["measles"]}', '{"diseases": ["mumps"]}'}
    assert corrupt(given, "factual inaccuracy", seed=0) is None


def test_partial_correctness_drops_one_of_the_parts() -> None:
    items = set(json.loads(DISEASES["output"])["diseases"])
    for worse in variants(DISEASES, "partial correctness"):
        left = json.loads(worse)["diseases"]
        assert len(left) == len(items) - 1
        assert set(left) < items
    listed = row("1. Rest.\n2. Water.\n3. Amoxicillin.")
    for worse in variants(listed, "partial correctness"):
        assert [line[:2] for line in worse.split("\n")] == ["1.", "2."]
    for worse in variants(SUMMARY, "partial correctness"):
        assert len(worse.split()) < len(NOTE.split())
        assert set(worse.replace(".", "").split()) <= set(NOTE.replace(".", "").split())


def test_brevity_keeps_a_beginning_of_at_most_seven_tenths() -> None:
    for source in (SUMMARY, row(points(NOTE).parts[0])):
        for worse in variants(source, "brevity"):
            assert source["output"].startswith(worse.rstrip("."))
            assert len(worse.split()) <= 0.7 * len(source["output"].split())


def test_over_verbosity_adds_three_tenths_and_says_everything() -> None:
    for worse in variants(SUMMARY, "over-verbosity"):
        assert len(worse.split()) >= 1.3 * len(NOTE.split())
        assert all(fact in worse for fact in ("76-year-old", "39.2", "amoxicillin"))
    assert all("neutral" in worse for worse in variants(LABEL, "over-verbosity"))


def test_unbalanced_detail_copies_from_the_input_and_cuts_elsewhere() -> None:
    given = points(PAGE).parts
    for worse in variants(SUMMARY, "unbalanced detail"):
        assert sum(sentence in worse for sentence in given) == 1
        assert sum(sentence in worse for sentence in points(NOTE).parts) == 2


def test_misinterpretation_answers_with_another_sentence_of_the_input() -> None:
    for worse in variants(SUMMARY, "misinterpretation"):
        parts = points(worse).parts
        (foreign,) = [part for part in parts if part not in points(NOTE).parts]
        assert foreign in points(PAGE).parts
        assert len(parts) == 3
    for worse in variants(DISEASES, "misinterpretation"):
        before, after = json.loads(DISEASES["output"])["diseases"], json.loads(worse)["diseases"]
        ((_, other),) = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert other in PAGE


def test_ambiguity_takes_precision_away() -> None:
    for worse in variants(SUMMARY, "ambiguity"):
        gone = [word for word in NOTE.split() if word not in worse.split()]
        assert 1 <= len(gone) <= 10
    for worse in variants(LABEL, "ambiguity"):
        assert "neutral" in worse
        assert "entailment" in worse or "contradiction" in worse


def test_logical_flaws_reverse_relations_and_contradict() -> None:
    triple = {"head": "flu", "relation": "causes", "tail": "fever"}
    given = row(json.dumps([triple]), output_format="json", task_type="relation extraction")
    reversed_ = [triple | {"head": "fever", "tail": "flu"}]
    assert {json.dumps(json.loads(w)) for w in variants(given, "logical flaws")} == {
        json.dumps(reversed_)
    }
    cause = row("She had a high fever because the lung was infected.")
    assert "The lung was infected because she had a high fever." in variants(cause, "logical flaws")
    assert any("not" in worse.split() for worse in variants(SUMMARY, "logical flaws"))


def test_simplistic_reasoning_rests_on_one_word_of_the_input() -> None:
    for source in (SUMMARY, LABEL):
        for worse in variants(source, "simplistic reasoning"):
            clue = worse.split("'")[1]
            assert clue in PAGE.lower()
    assert all(len(points(worse).parts) <= 3 for worse in variants(SUMMARY, "simplistic reasoning"))


@pytest.mark.parametrize(
    ("given", "error_type"),
    [
        (LABEL, "partial correctness"),
        (LABEL, "brevity"),
        (LABEL, "unbalanced detail"),
        (LABEL, "misinterpretation"),
        (LABEL, "logical flaws"),
        (LABEL, "grammatical errors"),
        (CHOICE, "spelling errors"),
        (CHOICE, "logical flaws"),
        (DISEASES, "simplistic reasoning"),
        (DISEASES, "logical flaws"),
        (row("Fever."), "brevity"),
        (row("Fever."), "factual inaccuracy"),
        (row(NOTE, input="Fever?"), "unbalanced detail"),
        (row(NOTE, input="Fever?"), "misinterpretation"),
        (row("[]", output_format="json"), "over-verbosity"),
        (row("NaN", output_format="json"), "factual inaccuracy"),
    ],
)
def test_an_error_that_cannot_stand_in_an_output_is_not_written(
    given: dict[str, str], error_type: ErrorType
) -> None:
    assert all(corrupt(given, error_type, seed=seed) is None for seed in SEEDS)

"""Texts against references: parity with rouge-score, properties, a metric for each task."""

import json
import lzma
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from mediphi.evaluate.text_scores import (
    BY_TASK,
    choice_match,
    entity_f1,
    exact_match,
    line_f1,
    rouge_1,
    rouge_2,
    rouge_l,
    score_answer,
)

HELDOUT = Path(__file__).parents[2] / "assets" / "corpora" / "mediflow" / "heldout.jsonl.xz"
THEIRS = RougeScorer(["rouge1", "rouge2", "rougeL"])
WORDS = ["the", "a", "heart", "failure", "BP", "120/80", "été", "İ", "fever,", "_"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9)
ANY_TEXT = TEXTS.map(" ".join) | st.text(max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["Asthma", "flu", "a b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("xyz"), inner),
    max_leaves=8,
)


@given(ANY_TEXT, ANY_TEXT)
def test_rouge_equals_googles(answer: str, reference: str) -> None:
    theirs = THEIRS.score(reference, answer)
    for ours, name in ((rouge_1, "rouge1"), (rouge_2, "rouge2"), (rouge_l, "rougeL")):
        assert ours(answer, reference) == pytest.approx(theirs[name].fmeasure, abs=1e-12)


@given(ANY_TEXT, ANY_TEXT)
def test_scores_lie_in_zero_to_one_and_do_not_care_who_is_the_reference(a: str, b: str) -> None:
    for score in (rouge_1, rouge_2, rouge_l, exact_match, line_f1):
        assert 0 <= score(a, b) <= 1
        assert score(a, b) == pytest.approx(score(b, a))
        assert score(a, b) <= score(a, a) or score(a, a) == 0


def test_rouge_l_sees_order_where_rouge_1_does_not() -> None:
    """Lin 2004, section 3.1: police kill the gunman."""
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == 0.75
    assert rouge_l("the gunman kill police", reference) == 0.5
    assert rouge_1("the gunman killed police", reference) == 1


@pytest.mark.parametrize("answer", ["entailment", "Entailment.", "  ENTAILMENT \n", "entailment ."])
def test_a_label_may_differ_in_case_blanks_and_full_stop(answer: str) -> None:
    assert exact_match(answer, "Entailment") == 1
    assert exact_match(answer, "contradiction") == exact_match(f"not {answer}", "entailment") == 0


@pytest.mark.parametrize(
    "answer",
    ["B", "b.", " (B)", "B) heart failure", "Answer: B", "The correct option is B.", "B\nas"],
)
def test_a_choice_is_the_letter_that_an_answer_begins_with(answer: str) -> None:
    assert choice_match(answer, "B") == choice_match(answer, "(B) heart failure") == 1
    assert choice_match(answer, "C") == 0


@pytest.mark.parametrize("answer", ["A patient with fever", "", "A or B", "Aspirin", "A vs. B"])
def test_an_article_or_two_letters_are_no_choice(answer: str) -> None:
    assert choice_match(answer, "A") == 0


def test_a_choice_without_a_letter_must_be_equal() -> None:
    assert choice_match("Heart failure.", "heart failure") == 1
    assert choice_match("A", "heart failure") == 0


def entities(*pairs: tuple[str, str]) -> str:
    return json.dumps([{"text": text, "type": kind} for text, kind in pairs])


def test_an_entity_counts_when_text_and_type_are_right() -> None:
    gold = entities(("asthma", "disease"), ("salbutamol", "drug"))
    assert entity_f1(entities(("Salbutamol ", "drug"), ("asthma.", "disease")), gold) == 1
    assert entity_f1(entities(("asthma", "disease"), ("salbutamol", "disease")), gold) == 0.5
    assert entity_f1(entities(("asthma", "disease")), gold) == pytest.approx(2 / 3)
    twice = entities(*[("asthma", "disease")] * 3)
    assert entity_f1(twice, gold) == pytest.approx(2 / 5), "a repeated entity is right once"
    assert entity_f1('[{"type": "drug", "text": "salbutamol"}]', gold) == pytest.approx(2 / 3)


def test_values_of_an_object_count_under_their_key() -> None:
    gold = '{"diseases": ["asthma", "flu"], "score": 3}'
    assert entity_f1('{"score": 3, "diseases": ["flu", "asthma"]}', gold) == 1
    assert entity_f1('{"drugs": ["asthma", "flu"], "score": 3}', gold) == pytest.approx(1 / 3)
    assert entity_f1('{"diseases": []}', '{"diseases": []}') == entity_f1("[]", "[]") == 1
    assert entity_f1("[]", gold) == 0


@pytest.mark.parametrize(
    "answer", ["", "none", '["asthma"', '```json\n["asthma"]\n```', '["asthma"] ok', "[" * 10**5]
)
def test_an_answer_that_is_not_json_scores_zero(answer: str) -> None:
    assert entity_f1(answer, '["asthma"]') == 0


@given(JSON, JSON)
def test_entity_f1_is_symmetric_and_one_for_equals(a: Any, b: Any) -> None:
    ours, theirs = json.dumps(a), json.dumps(b)
    assert entity_f1(ours, ours) == 1
    assert 0 <= entity_f1(ours, theirs) == entity_f1(theirs, ours) <= 1
    assert entity_f1(json.dumps(a, indent=2), theirs) == entity_f1(ours, theirs)


@given(st.permutations(["asthma", "flu", "cough", "fever"]), st.integers(0, 4))
def test_the_order_of_items_does_not_matter(items: list[str], num_right: int) -> None:
    answer = items[:num_right] + ["other"] * (4 - num_right)
    gold = ["asthma", "flu", "cough", "fever"]
    assert entity_f1(json.dumps(answer), json.dumps(gold)) == num_right / 4
    assert line_f1("\n".join(answer), "\n".join(gold)) == num_right / 4


WRONG_SENTENCE = "The patient was given 5 mg of warfarin on the second day"


@pytest.mark.parametrize(
    ("task_type", "output_format", "answer", "reference", "score"),
    [
        ("classification", "plain_text", "Cardiology.", "cardiology", 1.0),
        ("classification", "plain_text", "cardiology ward", "cardiology", 0.0),
        ("classification", "json", '["JOB", "HOUSING"]', '["JOB"]', 2 / 3),
        ("textual entailment", "plain_text", "Consistent", "consistent", 1.0),
        ("multiple-choice question-answering", "plain_text", "C) fever", "C", 1.0),
        ("named entity recognition", "json", '{"diseases": ["flu"]}', '{"diseases": ["flu"]}', 1.0),
        ("named entity recognition", "plain_text", "flu\nasthma", "Asthma\nflu", 1.0),
        ("named entity recognition", "plain_text", '["flu"]', '["flu", "cough"]', 2 / 3),
        ("relation extraction", "json", "no json", '[{"head": "a"}]', 0.0),
        ("error detection & correction", "plain_text", "-1", "-1", 1.0),
        ("error detection & correction", "plain_text", WRONG_SENTENCE, f"{WRONG_SENTENCE}s", 0.0),
        ("abbreviation expansion", "plain_text", "heart failure", "congestive heart failure", 0.8),
        ("abbreviation expansion", "json", '{"CHF": "x"}', '{"CHF": "congestive"}', 0.0),
        ("summarization", "plain_text", "fever and cough", "cough and fever", 1.0),
        ("note scoring", "plain_text", "3 of 5", "4 of 5", 2 / 3),
        ("summarization", "json", "fever and cough", "cough and fever", 1.0),
        ("a task of tomorrow", "plain_text", "fever", "fever and", 2 / 3),
    ],
)
def test_each_task_type_has_its_metric(
    task_type: str, output_format: str, answer: str, reference: str, score: float
) -> None:
    assert score_answer(task_type, output_format, answer, reference) == pytest.approx(score)


def test_a_bundled_reference_is_the_best_answer_and_a_neighbours_is_far_worse() -> None:
    """The control: of every task type the reference of another row."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with lzma.open(HELDOUT, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            rows[row["task_type"]].append(row)
    assert rows.keys() > BY_TASK.keys()
    for task, own in rows.items():
        outputs = [(row["output_format"], row["output"]) for row in own]
        assert all(score_answer(task, form, text, text) == 1 for form, text in outputs)
        others = [score_answer(task, f, wrong, text) for (f, text), (_, wrong) in pairwise(outputs)]
        assert fmean(others) < 0.6

"""The committed instruction set: its format, its answers, and what is kept out of it."""

import csv
import io
import json
import lzma
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mediphi.errors import DataError, UserError
from scripts.build_mediflow.families import (
    abbreviations,
    codes,
    consumer_questions,
    entities,
    scoring,
)
from scripts.build_mediflow.leakage import BLOCK, MIN_WHOLE, SPAN, ForbiddenTexts
from scripts.build_mediflow.material import CORPORA, Material, mend
from scripts.build_mediflow.selection import by_file, published, select

Row = dict[str, Any]
SPLITS = ("train", "heldout")
FILES = (*SPLITS, *(f"questions_{split}" for split in SPLITS))
MASK = re.compile(r"\[(NAME|LOCATION|CONTACT|DATE|AGE|PHI|PROFESSION)\]|\b(SUBJECT|MESSAGE):")
"""What MeQSum's publisher put into the questions."""
COLUMNS = [
    "instruction",
    "input",
    "output",
    "task_type",
    "input_data",
    "output_format",
    "difficulty_level",
    "rejected_output",
    "error_type",
    "quality",
    "alignment",
    "coherence",
    "realism",
    "difficulty",
]
TASKS = {
    "summarization",
    "question-answering",
    "multiple-choice question-answering",
    "named entity recognition",
    "relation extraction",
    "classification",
    "reasoning & diagnosis",
    "textual entailment",
    "text simplification",
    "text expansion",
    "abbreviation expansion",
    "aspect-oriented keyword extraction",
    "error detection & correction",
    "note scoring",
}
DOCUMENT_TYPES = set(
    """Discharge Summary; SOAP Clinical Note; Clinical Note; Progress Note; Admission Note;
    Scientific Article; Clinical Case; Nursing Note; Monitoring Data of Vital Signs;
    Referral Letter; Emergency Department Note; Laboratory Report; Radiology Report;
    Doctor-Patient Conversation; Nurse-Patient Dialog; Operative Note; Consultation Note;
    Pathology Report; Prescription Note; Preoperative Assessment; Postoperative Note;
    Therapy Notes; Immunization Record; Screening Report; Consent Form; Care Plan; Dietary Notes;
    Psychiatric Evaluation; Social Work Note; End-of-Life Care Documentation; Triage Note;
    Dental Record; Home Health Care Report; Genetic Testing Report; Incident Report;
    Patient Education Material""".replace("\n    ", " ").split("; ")
)
LEVELS = {"low", "moderate", "moderate-hard", "hard", "very hard", "extreme"}
MARKS = ("quality", "alignment", "coherence", "realism", "difficulty")


def unpacked(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


@cache
def rows_of(file: str, folder: str = "mediflow") -> tuple[Row, ...]:
    text = unpacked(CORPORA / folder / f"{file}.jsonl.xz")
    return tuple(json.loads(line) for line in text.splitlines())


def rows(split: str) -> tuple[Row, ...]:
    return rows_of(split) + rows_of(f"questions_{split}")


def both(task: str | None = None, **wanted: str) -> list[Row]:
    found = [row for split in SPLITS for row in rows(split)]
    wanted |= {"task_type": task} if task else {}
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CORPORA.parent / "models" / "phi35_mini" / "tokenizer.json"))


def num_tokens(text: str) -> int:
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


def test_rows_have_the_columns_of_mediflow_in_its_order() -> None:
    assert all(list(row) == COLUMNS for row in both())
    assert all(row["rejected_output"] is None and row["error_type"] is None for row in both())


def test_names_are_those_of_mediflow() -> None:
    assert len(DOCUMENT_TYPES) == 36
    assert {row["task_type"] for row in both()} <= TASKS
    assert {row["input_data"] for row in both()} <= DOCUMENT_TYPES
    assert {row["difficulty_level"] for row in both()} == LEVELS
    assert {row["output_format"] for row in both()} == {"plain_text", "json"}


def test_every_task_but_simplification_has_rows_to_train_and_to_hold_out() -> None:
    train, heldout = (Counter(row["task_type"] for row in rows(split)) for split in SPLITS)
    assert len(rows("train")) >= 3500
    assert set(train) == set(heldout) == TASKS - {"text simplification"}
    assert min(heldout.values()) >= 25
    assert min(train.values()) >= 100


def test_every_task_is_asked_in_at_least_four_ways() -> None:
    for task in TASKS - {"text simplification"}:
        assert len({row["instruction"] for row in rows("train") if row["task_type"] == task}) >= 4


def test_files_are_small_and_rows_short() -> None:
    sizes = [(CORPORA / "mediflow" / f"{file}.jsonl.xz").stat().st_size for file in FILES]
    assert sum(sizes) < 2.5e6
    texts = ["".join(row[part] for part in ("instruction", "input", "output")) for row in both()]
    assert median(map(num_tokens, texts[::10])) < 350
    assert max(map(num_tokens, (text for text in texts if len(text) > 5000))) <= 2000


def test_no_text_is_empty_and_no_slot_of_a_phrasing_is_left() -> None:
    assert all(row["instruction"] and row["input"] and row["output"] for row in both())
    assert not any(re.search(r"\{[a-z_]+\}", row["instruction"]) for row in both())


def test_marks_lie_between_1_and_4_and_tell_rows_apart() -> None:
    for mark in MARKS:
        values = [row[mark] for row in rows("train")]
        assert 1 <= min(values) < max(values) <= 4
        assert pstdev(values) > 0.2
    best = Counter(row["quality"] for row in rows("train"))[4.0]
    assert best < len(rows("train")) / 10


def test_json_outputs_parse() -> None:
    outputs = [json.loads(row["output"]) for row in both(output_format="json")]
    assert len(outputs) > 1000
    assert all(isinstance(output, dict | list) for output in outputs)


def test_entities_stand_in_the_text() -> None:
    found = both("named entity recognition", output_format="json")
    for row in found:
        mentions = json.loads(row["output"])["diseases"]
        assert mentions and all(mention in row["input"] for mention in mentions)
    lines = both("named entity recognition", output_format="plain_text")
    assert found and lines
    assert all(line in row["input"] for row in lines for line in row["output"].split("\n"))


def test_tails_of_relations_and_keywords_stand_in_the_text() -> None:
    for row in both("relation extraction"):
        text = " ".join(row["input"].split())
        assert all(triple["tail"] in text for triple in json.loads(row["output"]))
    for row in both("aspect-oriented keyword extraction"):
        output = json.loads(row["output"])
        terms = (
            output if isinstance(output, list) else [t for part in output.values() for t in part]
        )
        text = " ".join(row["input"].lower().split())
        assert terms and all(" ".join(term.lower().split()) in text for term in terms)


def test_the_right_option_is_the_title_in_the_published_order_file() -> None:
    text = unpacked(CORPORA / "icd10cm_2021" / "icd10cm-order-Jan-2021.txt.xz")
    titles = {line[6:13].strip(): line[77:].strip() for line in text.splitlines()}
    asked = both("multiple-choice question-answering")
    for row in asked:
        code = re.search(r"code (\S+)\?", row["input"])
        options = dict(re.findall(r"^([A-D])\. (.*)$", row["input"], re.MULTILINE))
        assert code is not None and len(options) == 4
        # The order file lost the accents that the options have.
        right = unicodedata.normalize("NFKD", options[row["output"]])
        title = titles[code[1].replace(".", "")]
        assert right.encode("ascii", "ignore").decode() == title
    counts = Counter(row["output"] for row in asked)
    assert max(counts.values()) - min(counts.values()) <= 3


def test_labels_are_among_those_that_the_instruction_names() -> None:
    for row in both("textual entailment"):
        assert re.search(rf"\b{row['output']}\b", row["instruction"], re.IGNORECASE)
    for row in both("classification", output_format="plain_text"):
        assert row["output"] in row["instruction"]


def test_planted_errors_stand_in_the_case_and_their_correction_does_not() -> None:
    found = both("error detection & correction", output_format="json")
    planted = [(row, json.loads(row["output"])) for row in found]
    assert {output["error"] for _, output in planted} == {True, False}
    for row, output in planted:
        if output["error"]:
            assert output["sentence"] in row["input"] and output["correction"] not in row["input"]
        else:
            assert output["sentence"] is output["correction"] is None
    for row in both("error detection & correction", output_format="plain_text"):
        assert row["output"] == "-1" or f"\n{row['output']} " in f"\n{row['input']}"


def test_scores_count_the_headings() -> None:
    for row in both("note scoring"):
        output = json.loads(row["output"])
        rubric = scoring.NOTE_RUBRIC
        if "review of systems" in row["instruction"]:
            rubric = scoring.VISIT_RUBRIC
        assert output["score"] == len(rubric) - len(output["missing"])
        for name, headings in rubric.items():
            lines = {line.strip().rstrip(":") for line in row["input"].split("\n")}
            present = not lines.isdisjoint(headings)
            assert present == (name not in output["missing"])


def test_abbreviations_are_expanded_by_a_list_of_at_least_80() -> None:
    assert len(abbreviations.EXPANSIONS) >= 80
    for row in both("abbreviation expansion", output_format="json"):
        for form, full in json.loads(row["output"]).items():
            assert form in row["input"] and abbreviations.EXPANSIONS[form] == full


@pytest.mark.parametrize(
    ("sentence", "expanded"),
    [
        ("An MRI was done.", "A magnetic resonance imaging was done."),
        ("He had a UTI and an EKG.", "He had a urinary tract infection and an electrocardiogram."),
        ("CT was normal.", "Computed tomography was normal."),
        ("Tylenol p.r.n. for pain", "Tylenol as needed for pain"),
    ],
)
def test_written_out_sentences_keep_their_articles_and_capitals(
    sentence: str, expanded: str
) -> None:
    assert abbreviations.ABBREVIATION.sub(abbreviations.written_out, sentence) == expanded


@pytest.mark.parametrize("sentence", ["Stage IV cancer.", "BP was high on CT.", "MRI q.6h. done"])
def test_a_sentence_with_another_abbreviation_or_meaning_is_not_used(sentence: str) -> None:
    assert abbreviations.abbreviations_of(sentence) == {}


def test_splits_share_no_input_and_no_span() -> None:
    train, heldout = ({words(row["input"]) for row in rows(split)} for split in SPLITS)
    assert train.isdisjoint(heldout)
    forbidden = ForbiddenTexts(
        (row[part] for row in rows("heldout") for part in ("input", "output")), whole=False
    )
    texts = (f"{row['input']}\n{row['output']}" for row in rows("train"))
    assert not any(forbidden.overlaps(text) for text in texts)


def bundled_tests() -> dict[str, list[str]]:
    """Test rows by set, read without the project's readers."""
    found: dict[str, list[str]] = {"mts_dialog": [], "pubmedqa": [], "ncbi": []}
    for path in sorted((CORPORA / "mts_dialog").glob("*TestSet*.xz")):
        table = csv.DictReader(io.StringIO(unpacked(path)))
        found["mts_dialog"] += [row["dialogue"] for row in table]
    folder = CORPORA / "pubmedqa_pqal"
    abstracts = json.loads(unpacked(folder / "ori_pqal.json.xz"))
    for pmid in json.loads(unpacked(folder / "test_ground_truth.json.xz")):
        found["pubmedqa"] += [abstracts[pmid]["CONTEXTS"][0], abstracts[pmid]["LONG_ANSWER"]]
    sentences = unpacked(CORPORA / "bio_ner_ncbi-disease" / "test.tsv.xz").split("\n\n")
    for sentence in sentences:
        found["ncbi"].append(" ".join(line.split("\t")[0] for line in sentence.splitlines()))
    return found


def test_no_text_of_a_test_split_stands_in_any_file() -> None:
    everything = "\n".join(words(f"{row['input']}\n{row['output']}") for row in both())
    tests = bundled_tests()
    assert {name: len(texts) for name, texts in tests.items()} == {
        "mts_dialog": 400,
        "pubmedqa": 1000,
        "ncbi": pytest.approx(940, abs=2),
    }
    for texts in tests.values():
        openings = {words(text)[:SPAN] for text in texts}
        leaked = [o for o in openings if len(o) >= MIN_WHOLE and o in everything]
        assert leaked == []


def test_a_planted_test_dialogue_is_found() -> None:
    dialogue = bundled_tests()["mts_dialog"][0]
    forbidden = ForbiddenTexts([dialogue])
    assert forbidden.overlaps(f"Some visit. {dialogue.upper()[20:300]} The end.")
    assert forbidden.equals(dialogue.replace(" ", "  "))
    assert not forbidden.overlaps(dialogue[: SPAN // 2])


@given(
    text=st.text("ab ", min_size=SPAN + 20, max_size=3 * SPAN),
    start=st.integers(0, 20),
    length=st.integers(BLOCK, SPAN + 40),
)
def test_a_span_is_found_exactly_when_it_is_long_enough(text: str, start: int, length: int) -> None:
    source = words(text)
    piece = source[start : start + length].strip()
    given_text = f"x {piece} y"
    shared = any(
        given_text[i : i + SPAN] in source for i in range(max(0, len(given_text) - SPAN + 1))
    )
    assert ForbiddenTexts([source], whole=False).overlaps(given_text) == shared


@pytest.mark.parametrize("folder", ["mediflow", "mediflow_dpo"])
@pytest.mark.parametrize("file", FILES)
def test_real_questions_stand_in_files_of_their_own(folder: str, file: str) -> None:
    found = rows_of(file, folder)
    phrasings = consumer_questions.SHORT_QUESTION.phrasings
    is_question = {row["instruction"] in phrasings for row in found}
    assert is_question == {file.startswith("questions")}
    masked = sum(MASK.search(json.dumps(row)) is not None for row in found)
    assert masked >= len(found) / 2 if file.startswith("questions") else masked == 0


def test_no_other_row_repeats_a_question_or_its_summary() -> None:
    """Also as the rejected side of a pair: those are taken from other rows."""
    questions = [row for split in SPLITS for row in rows_of(f"questions_{split}")]
    texts = {words(row[part]) for row in questions for part in ("input", "output")}
    others = [row for split in SPLITS for row in rows_of(split)]
    others += [row for split in SPLITS for row in rows_of(split, "mediflow_dpo")]
    sides = {words(row[side] or "") for row in others for side in ("output", "rejected_output")}
    assert sides.isdisjoint(texts)
    spans = ForbiddenTexts(text for text in texts if len(text) >= MIN_WHOLE)
    assert not any(spans.overlaps(side) for side in sides | {words(row["input"]) for row in others})


def test_a_question_and_another_row_of_one_split_go_into_two_files() -> None:
    task = consumer_questions.SHORT_QUESTION
    candidates = [
        task.candidate("q", "train", given="MESSAGE: is gout bad", wanted="Is gout bad?"),
        entities.LINES.candidate("a", "train", given="Gout is common.", wanted="Gout"),
    ]
    selection = select(candidates, tests=ForbiddenTexts([]), tokenizer=tokenizer())
    files = {name: [row.output for row in kept] for name, kept in by_file(selection).items()}
    assert files == {"questions_train": ["Is gout bad?"], "train": ["Gout"]}


def test_rebuilding_a_family_from_bundled_data_gives_the_committed_rows() -> None:
    material = Material()
    tests = ForbiddenTexts(material.bundled_test_texts())
    selection = select(entities.candidates(material), tests=tests, tokenizer=tokenizer())
    for split, kept in selection.rows.items():
        committed = [row for row in rows(split) if row["task_type"] == "named entity recognition"]
        assert [published(row) for row in kept] == committed


def test_rebuilding_the_held_out_questions_about_codes_gives_the_committed_rows() -> None:
    documents = [d for d in Material().icd10cm if codes.split_of(d.facts["code"]) == "heldout"]
    quiz = sorted(codes.of_quiz(documents, "heldout"), key=lambda row: row.key)
    asked = "multiple-choice question-answering"
    committed = [row for row in rows("heldout") if row["task_type"] == asked]
    assert [published(row) for row in quiz] == committed


def test_a_document_in_both_splits_is_refused() -> None:
    task = entities.LINES
    candidates = [
        task.candidate("one abstract", "train", given="Gout is common.", wanted="Gout"),
        task.candidate("one abstract", "heldout", given="Asthma is too.", wanted="Asthma"),
    ]
    with pytest.raises(DataError, match=r"a document feeds both splits"):
        select(candidates, tests=ForbiddenTexts([]), tokenizer=tokenizer())


def test_a_training_row_with_text_of_a_held_out_row_is_dropped() -> None:
    task, text = entities.LINES, " ".join(f"word{number}" for number in range(60))
    candidates = [
        task.candidate("one", "train", given=f"First {text}", wanted="word1"),
        task.candidate("two", "train", given="Something else.", wanted="else"),
        task.candidate("three", "heldout", given=f"Then {text}", wanted="word1"),
    ]
    selection = select(candidates, tests=ForbiddenTexts([]), tokenizer=tokenizer())
    assert [row.document for row in selection.rows["train"]] == ["two"]
    assert selection.dropped == {("train", "text of a held-out row"): 1}


def test_sets_that_are_not_bundled_need_their_folder() -> None:
    with pytest.raises(UserError, match=r"meqsum is not bundled"):
        _ = Material().meqsum


def test_text_that_was_decoded_wrongly_is_mended_and_other_text_kept() -> None:
    assert mend("cells/\u00ce\u00bcL, \u00c3\u0178-HCG") == "cells/\u03bcL, \u00df-HCG"
    assert mend("Ménière, na\u00efve, 5 \u00b5g") == "Ménière, na\u00efve, 5 \u00b5g"

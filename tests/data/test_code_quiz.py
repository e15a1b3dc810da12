"""Multiple-choice questions over codes."""

import hashlib
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mediphi.config.corpus import Icd10cmSource, Licence
from mediphi.config.stages import Quiz
from mediphi.data.bad_rows import BadRows
from mediphi.data.code_quiz import build_quiz
from mediphi.data.sources import icd10cm
from mediphi.records import Document, MultipleChoice
from mediphi.synthesize.rules import generate

REAL = Path(__file__).parents[2] / "assets" / "corpora" / "icd10cm_2021"
LETTERS = "ABCDEF"


@pytest.fixture(scope="module")
def real_codes() -> list[Document]:
    licence = Licence(id="public domain", origin="CDC", commercial_ok=True)
    source = Icd10cmSource(kind="icd10cm", path=str(REAL), licence=licence)
    return list(icd10cm.read(source, name="icd10cm", bad_rows=BadRows()))


def document(code: str, description: str, ancestors: list[str], **facts: Any) -> Document:
    return Document(
        id=f"icd/{code}",
        group_id=f"icd/{code[:3]}",
        source="icd",
        text=description,
        facts={
            "system": "ICD-10-CM 2021",
            "code": code,
            "description": description,
            "ancestors": [[key, f"about {key}"] for key in ancestors],
            **facts,
        },
    )


def tree(num_chapters: int = 3) -> list[Document]:
    """Chapters of 3 sections of 5 categories of 4 codes; names are distinct."""
    documents = []
    for chapter in LETTERS[:num_chapters]:
        for section in range(3):
            above = [f"{chapter}00-{chapter}99", f"{chapter}{section}0-{chapter}{section}9"]
            for number in range(5):
                category = f"{chapter}{section}{number}"
                documents.append(document(category, f"disease {category.lower()[::-1]}", above))
                documents += [
                    document(f"{category}.{n}", f"form {n} of {category[::-1]}", [*above, category])
                    for n in range(4)
                ]
    return documents


def distance(one: Document, other: Document) -> int | None:
    """Length of the way between two codes by breadth-first search, the slow and plain way."""
    edges: dict[str, set[str]] = {}
    for item in tree():
        keys = [key for key, _ in item.facts["ancestors"]] + [item.facts["code"]]
        for upper, lower in pairwise(keys):
            edges.setdefault(upper, set()).add(lower)
            edges.setdefault(lower, set()).add(upper)
    layer, seen, steps = {one.facts["code"]}, set(), 0
    while layer:
        if other.facts["code"] in layer:
            return steps
        seen |= layer
        layer = {near for node in layer for near in edges[node]} - seen
        steps += 1
    return None


BY_DESCRIPTION = {item.facts["description"]: item for item in tree()}
QUIZ = Quiz(num_questions=40)


def asked(question: MultipleChoice) -> Document:
    return BY_DESCRIPTION[question.options[question.answer]]


def test_the_right_option_is_the_meaning_of_the_code_in_the_prompt() -> None:
    for question in build_quiz(tree(), quiz=QUIZ, seed=0):
        code = asked(question).facts["code"]
        assert question.prompt == f"ICD-10-CM code {code} means"
        assert question.id == f"ICD-10-CM/{code}/{question.group}"


def test_wrong_options_stand_at_the_distance_that_the_difficulty_names() -> None:
    allowed = {"hard": {2}, "medium": {3, 4, 5}}
    found: Counter[tuple[str, int | None]] = Counter()
    for question in build_quiz(tree(), quiz=QUIZ, seed=1):
        for place, option in enumerate(question.options):
            if place != question.answer:
                steps = distance(asked(question), BY_DESCRIPTION[option])
                found[question.group, steps] += 1
                assert steps in allowed.get(question.group, {steps})
    assert {steps for level, steps in found if level == "medium"} == {3, 4, 5}
    assert found["easy", None] > 40, "easy options come from other chapters too"


def test_ancestors_and_descendants_are_never_wrong_options() -> None:
    for question in build_quiz(tree(), quiz=QUIZ, seed=2):
        code = asked(question).facts["code"]
        for place, option in enumerate(question.options):
            other = BY_DESCRIPTION[option].facts["code"]
            assert place == question.answer or not (code in other or other in code)


def test_each_place_is_right_equally_often() -> None:
    quiz = Quiz(num_questions=41, num_options=3)
    questions = build_quiz(tree(), quiz=quiz, seed=3)
    for difficulty in quiz.difficulties:
        places = Counter(q.answer for q in questions if q.group == difficulty)
        assert sorted(places.values()) == [13, 14, 14]


def test_difficulties_are_compared_on_the_same_codes() -> None:
    questions = build_quiz(tree(), quiz=QUIZ, seed=4)
    codes = [[asked(q).id for q in questions if q.group == level] for level in QUIZ.difficulties]
    assert codes[0] == codes[1] == codes[2]
    assert len(set(codes[0])) == 40


def test_a_code_with_too_few_siblings_is_not_asked_at_the_hard_level_only() -> None:
    lonely = document("X00", "alone", ["X00-X99", "X00-X09"])
    quiz = Quiz(num_questions=1000)
    ids = {question.id for question in build_quiz([*tree(), lonely], quiz=quiz, seed=0)}
    assert "ICD-10-CM/X00/easy" in ids
    assert not {"ICD-10-CM/X00/medium", "ICD-10-CM/X00/hard"} & ids
    assert len(ids) == 225 * 3 + 1


def test_codes_of_a_category_that_the_list_leaves_out_are_still_siblings() -> None:
    leaves = [
        document(f"{n}.{m}", f"leaf {n} {m}", ["390-459"]) for n in (436, 437) for m in range(5)
    ]
    for question in build_quiz(leaves, quiz=Quiz(difficulties=("hard", "medium")), seed=0):
        category = question.id.split("/")[1][:3]
        same = [option.split()[1] == category for option in question.options]
        assert sum(same) == (4 if question.group == "hard" else 1)


def test_options_are_distinct_although_codes_share_a_description() -> None:
    above = ["A00-A99", "A00-A09"]
    same = [document(f"A0{n}", "Fever" if n < 4 else f"Pain {n}", above) for n in range(6)]
    same.append(document("A09", "FEVER", above))
    questions = build_quiz(same, quiz=Quiz(num_questions=9, num_options=3), seed=0)
    assert questions
    for question in questions:
        assert len({option.casefold() for option in question.options}) == 3


def test_no_option_gives_the_code_away() -> None:
    above = ["A00-A99", "A00-A09"]
    told = [document(f"A0{n}", f"Thing {n}", above) for n in range(5)]
    told.append(document("A08", "Disease of a08 kind", above))
    told.append(document("A07", "Whatever is not A01", above))
    for question in build_quiz(told, quiz=Quiz(num_questions=50), seed=0):
        code = question.id.split("/")[1]
        assert code != "A08"
        assert not any(code.casefold() in option.casefold() for option in question.options)


def test_a_rule_based_summary_states_what_the_quiz_asks_in_the_same_words(
    real_codes: list[Document],
) -> None:
    by_code = {item.facts["code"]: item for item in real_codes}
    for question in build_quiz(real_codes, quiz=QUIZ, seed=0):
        [summary] = generate(by_code[question.id.split("/")[1]], ("summary",))
        told = f"{question.prompt} {question.options[question.answer]}"
        assert summary.text.startswith(f"{told}.")


def test_the_real_classification_is_asked_in_full_at_every_difficulty(
    real_codes: list[Document],
) -> None:
    """ICD-10-CM 2021 has 1,911 categories (tabular list)."""
    categories = [item for item in real_codes if item.facts["level"] == "category"]
    assert len(categories) == 1911
    described = {item.facts["code"]: item.facts for item in real_codes}
    for documents in (categories, real_codes):
        questions = build_quiz(documents, quiz=Quiz(num_questions=300), seed=0)
        assert Counter(q.group for q in questions) == {"easy": 300, "medium": 300, "hard": 300}
        assert len({q.id.split("/")[1] for q in questions}) == 300
        for question in questions:
            facts = described[question.id.split("/")[1]]
            assert question.options[question.answer] == facts["description"]
            assert len({option.casefold() for option in question.options}) == 4


def test_wrong_options_of_real_hard_categories_come_from_their_section(
    real_codes: list[Document],
) -> None:
    categories = [item for item in real_codes if item.facts["level"] == "category"]
    section = {item.facts["description"]: item.facts["ancestors"] for item in categories}
    for question in build_quiz(categories, quiz=Quiz(difficulties=("hard",)), seed=0):
        assert len({str(section[option]) for option in question.options}) == 1


def test_classifications_are_not_mixed() -> None:
    above = ["001-139", "001-009"]
    nine = [document(f"00{n}", f"Ninth {n}", above, system="ICD-9-CM") for n in range(5)]
    questions = build_quiz([*nine, *tree()], quiz=Quiz(num_questions=1000), seed=0)
    assert any(question.prompt == "ICD-9-CM code 001 means" for question in questions)
    for question in questions:
        assert len({option.startswith("Ninth") for option in question.options}) == 1


def test_a_corpus_without_codes_has_no_quiz() -> None:
    page = Document(id="p/1", group_id="p/1", source="p", text="Prose.")
    assert build_quiz([page], quiz=QUIZ, seed=0) == []
    assert build_quiz([], quiz=QUIZ, seed=0) == []


def test_the_order_of_the_documents_does_not_matter_but_the_seed_does() -> None:
    documents = tree()
    shuffled = random.Random(5).sample(documents, len(documents))
    assert build_quiz(documents, quiz=QUIZ, seed=0) == build_quiz(shuffled, quiz=QUIZ, seed=0)
    assert build_quiz(documents, quiz=QUIZ, seed=0) != build_quiz(documents, quiz=QUIZ, seed=1)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_builds_the_same_quiz(hash_seed: str) -> None:
    program = (
        "import hashlib, runpy;"
        f"names = runpy.run_path({__file__!r});"
        "quiz = names['build_quiz'](names['tree'](), quiz=names['QUIZ'], seed=0);"
        "print(hashlib.sha256(repr(quiz).encode()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = build_quiz(tree(), quiz=QUIZ, seed=0)
    assert there == hashlib.sha256(repr(here).encode()).hexdigest()

"""ICD-10-CM: what a code means, how codes relate, and what a shortened title stands for.

Only a share of the categories is used, so that questions about the others stay unseen.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from mediphi.config.stages import Quiz
from mediphi.data.code_quiz import build_quiz
from mediphi.data.sources.bundled import read_text
from mediphi.data.sources.icd10cm import ORDER_FILE, ORDER_LINE
from mediphi.data.sources.icd_page import page_text
from mediphi.records import Document
from scripts.build_mediflow.material import CORPORA, Material
from scripts.build_mediflow.rows import Candidate, Split, Task, share

CHOICE = Task(
    name="code_meaning",
    task_type="multiple-choice question-answering",
    source="icd10cm",
    input_data="Scientific Article",
    level=0,
    max_rows=(540, 60),
    phrasings=(
        "Choose the right description of the ICD-10-CM code. Answer with the letter alone.",
        "What does this diagnosis code mean? Give only the letter of the right option.",
        "Pick the option that states the meaning of the code. Reply with one letter.",
        "Multiple choice: which description belongs to the code? Output A, B, C or D.",
        "Select the correct definition for the medical code below and answer with its letter.",
    ),
)
RELATIONS = Task(
    name="code_relations",
    task_type="relation extraction",
    source="icd10cm",
    input_data="Scientific Article",
    level=2,
    output_format="json",
    max_rows=(300, 35),
    phrasings=(
        "Extract the relations that this entry of the ICD-10-CM tabular list states about its "
        "code. Output a JSON list of objects with 'head', 'relation' and 'tail'; relations are "
        "child_of, parent_of, excludes1, excludes2, code_first, use_additional_code, code_also.",
        "Read the code entry and list its relations as JSON triples (head, relation, tail). "
        "Use child_of, parent_of, excludes1, excludes2, code_first, use_additional_code and "
        "code_also.",
        "Turn this classification entry into a JSON array of relations. Every element has the "
        "keys head, relation and tail. Allowed relations: child_of, parent_of, excludes1, "
        "excludes2, code_first, use_additional_code, code_also.",
        "Which codes and conditions is this code linked to, and how? Answer as JSON objects with "
        "head, relation, tail (child_of, parent_of, excludes1, excludes2, code_first, "
        "use_additional_code, code_also).",
    ),
)
TITLE = Task(
    name="code_title",
    task_type="text expansion",
    source="icd10cm",
    input_data="Clinical Note",
    level=0,
    max_rows=(220, 25),
    phrasings=(
        "Expand this shortened ICD-10-CM title to the full title.",
        "The diagnosis below is written in shorthand. Write it out in full.",
        "Write the complete wording of this abbreviated diagnosis.",
        "Spell out the clipped words of the diagnosis title.",
    ),
)
LEVELS: dict[str, int] = {"easy": 0, "medium": 2, "hard": 4}
PER_DIFFICULTY = {"train": 180, "heldout": 20}
TRAIN_BELOW, HELDOUT_BELOW = 0.35, 0.45
"""Shares of the categories; the rest, more than half, is left unseen."""
NOTED = {
    "excludes1": "excludes1",
    "excludes2": "excludes2",
    "code_first": "code_first",
    "use_additional_code": "use_additional_code",
    "code_also": "code_also",
}
MAX_PAGE_CHARACTERS = 1100
SPLITS: tuple[Split, ...] = ("train", "heldout")


def candidates(material: Material) -> Iterator[Candidate]:
    """Codes of the categories in use, by split."""
    for split in SPLITS:
        documents = [d for d in material.icd10cm if split_of(d.facts["code"]) == split]
        yield from of_quiz(documents, split)
        for document in documents:
            yield from of_relations(document, split)
        descriptions = {d.facts["code"]: d.facts["description"] for d in documents}
        yield from of_titles(descriptions, split)


@cache
def split_of_category(category: str) -> Split | None:
    place = share(f"mediflow category {category}")
    if place < TRAIN_BELOW:
        return "train"
    return "heldout" if place < HELDOUT_BELOW else None


def split_of(code: str) -> Split | None:
    """None for a category that is left unseen."""
    return split_of_category(code[:3])


def of_quiz(documents: list[Document], split: Split) -> Iterator[Candidate]:
    """Questions whose wrong options come from the same split."""
    quiz = Quiz(num_questions=PER_DIFFICULTY[split])
    for question in build_quiz(documents, quiz=quiz, seed=0):
        system, code, _ = question.id.split("/")
        options = "\n".join(
            f"{letter}. {option}" for letter, option in zip("ABCD", question.options, strict=True)
        )
        yield CHOICE.candidate(
            f"icd10cm/{code[:3]}",
            split,
            given=f"What is the meaning of the {system} code {code}?\n{options}",
            wanted="ABCD"[question.answer],
            level=LEVELS[question.group],
        )


def of_relations(document: Document, split: Split) -> Iterator[Candidate]:
    """Entries with at least one note that names another code or condition."""
    facts = document.facts
    text = page_text(dict(facts))
    if any(facts[key] for key in NOTED) and len(text) <= MAX_PAGE_CHARACTERS:
        key = f"icd10cm/{facts['code'][:3]}"
        wanted = json.dumps(triples(facts, text), ensure_ascii=False)
        yield RELATIONS.candidate(key, split, given=text, wanted=wanted)


def triples(facts: Mapping[str, Any], text: str) -> list[dict[str, str]]:
    """Relations that the entry prints; children by seventh character are not spelled out there."""
    code = facts["code"]
    found = [("child_of", facts["parent"])] if facts["parent"] else []
    found += [("parent_of", child) for child, _ in facts["children"] if child in text]
    found += [(name, note) for key, name in NOTED.items() for note in facts[key]]
    return [{"head": code, "relation": name, "tail": tail} for name, tail in found]


def of_titles(descriptions: dict[str, str], split: Split) -> Iterator[Candidate]:
    """Short titles of the order file that differ from the full one."""
    _, text = read_text(str(CORPORA / "icd10cm_2021"), ORDER_FILE, name="icd10cm")
    for line in text.splitlines():
        match = ORDER_LINE.fullmatch(line)
        if match is None:
            continue
        code = match[1] if len(match[1]) == 3 else f"{match[1][:3]}.{match[1][3:]}"
        short, full = match[3].strip(), descriptions.get(code, "")
        if full and len(full) > len(short) + 8:
            yield TITLE.candidate(f"icd10cm/{code[:3]}", split, given=short, wanted=full)

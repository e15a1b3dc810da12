"""MeQSum and MedQuAD: questions that people ask, and answers written for them."""

import re
from collections.abc import Iterator

from mediphi.data.sources.bundled import content_key
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Task, split_by_hash

SHORT_QUESTION = Task(
    name="question_summary",
    task_type="summarization",
    source="meqsum",
    input_data="Patient Education Material",
    level=1,
    max_rows=(430, 50),
    phrasings=(
        "Rewrite this consumer's health question as one short question.",
        "Summarize the message below into the question that needs an answer. Leave out what does "
        "not matter for the answer.",
        "What is this person asking? Answer with a single brief question.",
        "Condense the health question to its core, keeping the condition, drug or test it is "
        "about.",
        "A medical librarian receives this message. Write the short question that she should "
        "look up.",
    ),
)
ANSWER = Task(
    name="patient_answer",
    task_type="question-answering",
    source="medquad",
    input_data="Patient Education Material",
    level=1,
    max_rows=(600, 50),
    phrasings=(
        "Answer the health question for a member of the public.",
        "Give a clear and factual answer to the question below, as a patient information page "
        "would.",
        "A reader of a health website asks the following. Write the answer.",
        "Answer this question about a disease or condition in plain terms.",
        "Explain the answer to this medical question to someone without medical training.",
    ),
)
MAX_ANSWER_CHARACTERS = 700
MIN_ANSWER_CHARACTERS = 60
HELDOUT_TOPICS = 0.08
NAMES_NO_ANSWER = re.compile(r"These resources|MedlinePlus|Clinical ?Trials|See |Please see")
"""Answers that only point elsewhere."""
FREQUENCY_LIST = re.compile(r"\(\d+%\); ")
"""What is left of a table of signs."""


def candidates(material: Material) -> Iterator[Candidate]:
    """Half of MeQSum and short answers of MedQuAD."""
    for row in material.meqsum:
        key = f"meqsum/{content_key(row['CHQ'])}"
        split = split_by_hash(key, heldout=0.1)
        yield SHORT_QUESTION.candidate(key, split, given=row["CHQ"], wanted=row["Summary"])
    for page in material.medquad:
        split = split_by_hash(page.group_id, heldout=HELDOUT_TOPICS)
        for question, answer in page.facts.get("questions", ()):
            if is_short_answer(answer):
                yield ANSWER.candidate(page.group_id, split, given=question, wanted=answer)


def is_short_answer(answer: str) -> bool:
    return (
        MIN_ANSWER_CHARACTERS <= len(answer) <= MAX_ANSWER_CHARACTERS
        and answer[-1] in ".!"
        and not NAMES_NO_ANSWER.search(answer)
        and not answer.startswith("What are the signs")
        and not FREQUENCY_LIST.search(answer)
    )

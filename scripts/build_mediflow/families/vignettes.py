"""MEDEC, the validation file: vignettes with and without a planted medical error."""

import json
import re
from collections.abc import Iterator

from mediphi.data.sources.bundled import content_key, normalise
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Split, Task, pick, split_by_hash

SENTENCE_ID = Task(
    name="error_sentence",
    task_type="error detection & correction",
    source="medec",
    input_data="Clinical Case",
    level=2,
    max_rows=(480, 60),
    phrasings=(
        "One of the numbered sentences may hold a medical error. Give its number, or -1 if the "
        "text is correct. Answer with the number alone.",
        "Find the sentence with a wrong diagnosis, cause, treatment or next step. Output its "
        "number; -1 if there is none.",
        "Check this case for one medical error. Reply with the id of the wrong sentence or -1.",
        "Which sentence is medically wrong? Answer with its number only, or with -1 when all are "
        "right.",
    ),
)
CORRECTION = Task(
    name="error_correction",
    task_type="error detection & correction",
    source="medec",
    input_data="Clinical Case",
    level=3,
    output_format="json",
    max_rows=(260, 40),
    phrasings=(
        "Check the case for a medical error. Output JSON with 'error' (true or false), "
        "'sentence' (the wrong sentence or null) and 'correction' (the right one or null).",
        "Find and correct the medical error, if there is one. Answer as a JSON object with the "
        "keys error, sentence and correction; the last two are null in a correct text.",
        "Review this vignette. Return JSON: error (true/false), the wrong sentence, and the "
        "sentence as it should read; null where nothing is wrong.",
        "Does the text hold a wrong diagnosis, cause, drug or management step? Reply in JSON "
        "with error, sentence, correction.",
    ),
)
CONSISTENCY = Task(
    name="case_consistency",
    task_type="textual entailment",
    source="medec",
    input_data="Clinical Case",
    level=3,
    phrasings=(
        "Does the statement agree with the case? Answer with consistent or inconsistent.",
        "Given the case as premise, decide whether the statement is consistent or inconsistent "
        "with it. One word.",
        "Judge whether the findings of the case support the statement: consistent or inconsistent.",
        "Read case and statement and label the pair as consistent or inconsistent.",
    ),
)
MISSING = Task(
    name="case_conclusion",
    task_type="reasoning & diagnosis",
    source="medec",
    input_data="Clinical Case",
    level=4,
    phrasings=(
        "The sentence that states the {subject} was taken out of this case. Write it.",
        "From the findings, state the {subject} in one sentence.",
        "Reason through the case and complete it with a sentence on the {subject}.",
        "What is the {subject} here? Answer with one sentence that could end the case.",
    ),
)
SUBJECTS = {
    "diagnosis": "diagnosis",
    "causalOrganism": "causal organism",
    "management": "next step of management",
    "pharmacotherapy": "drug treatment",
    "treatment": "treatment",
}
NUMBERED = re.compile(r"\n+(?=\d+ )")
OPENING_CHARACTERS = 80
"""The wrong and the right version of a vignette begin alike."""


def candidates(material: Material) -> Iterator[Candidate]:
    """Versions of a vignette stay in one split."""
    for row in material.medec:
        key = f"medec/{content_key(normalise(row['Text'])[:OPENING_CHARACTERS])}"
        split = split_by_hash(key, heldout=0.13)
        yield from of_errors(row, key, split)
        if row["Error Flag"] == "1":
            yield from of_conclusion(row, key, split)


def of_errors(row: dict[str, str], key: str, split: Split) -> Iterator[Candidate]:
    """The wrong sentence's number, or the sentence with its correction."""
    wrong = row["Error Flag"] == "1"
    if pick(("number", "number", "correction"), "form", row["Text ID"]) == "number":
        lines = [" ".join(line.split()) for line in NUMBERED.split(row["Sentences"])]
        number = row["Error Sentence ID"]
        yield SENTENCE_ID.candidate(key, split, given="\n".join(lines), wanted=number)
        return
    found = {
        "error": wrong,
        "sentence": one_line(row["Error Sentence"]) if wrong else None,
        "correction": one_line(row["Corrected Sentence"]) if wrong else None,
    }
    if not wrong or row["Error Sentence"].strip() in row["Text"]:
        given = one_line(row["Text"])
        wanted = json.dumps(found, ensure_ascii=False)
        yield CORRECTION.candidate(key, split, given=given, wanted=wanted)


def of_conclusion(row: dict[str, str], key: str, split: Split) -> Iterator[Candidate]:
    """What the corrected sentence says, from the rest of the case."""
    wrong, right = one_line(row["Error Sentence"]), one_line(row["Corrected Sentence"])
    text = one_line(row["Corrected Text"])
    if right not in text or text.count(right) != 1:
        return
    rest = " ".join(text.replace(right, " ").split())
    subject = SUBJECTS[row["Error Type"]]
    yield MISSING.candidate(key, split, given=rest, wanted=right, subject=subject)
    statement, label = pick(((right, "consistent"), (wrong, "inconsistent")), "statement", key)
    given = f"Case: {rest}\nStatement: {statement}"
    yield CONSISTENCY.candidate(key, split, given=given, wanted=label)


def one_line(text: str) -> str:
    return " ".join(text.split())

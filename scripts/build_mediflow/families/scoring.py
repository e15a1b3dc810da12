"""How complete a note is: a mark by a rubric that the instruction states.

MediFlow's judges mark notes freely; here a point is a heading, so the answer can be counted.
"""

import json
import re
from collections.abc import Iterator

from mediphi.records import Document
from scripts.build_mediflow.families.conversations import visit_split
from scripts.build_mediflow.families.notes import document_type
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Task

PHRASINGS = (
    "Score how complete this note is: one point for each of the sections {sections} that has "
    "a heading of its own. Output JSON with 'score' and 'missing' (a list).",
    "Rate the note from 0 to {count}. It gets a point for every one of these headed sections: "
    "{sections}. Answer as JSON with the keys score and missing.",
    "Check the note against the list {sections}. Give a JSON object with 'score', the number "
    "of sections present under their own heading, and 'missing', the others.",
    "Grade the documentation. A point is given for each heading out of {sections}. Return "
    "JSON: score and missing.",
)
NOTE = Task(
    name="note_completeness",
    task_type="note scoring",
    source="mtsamples",
    input_data="Clinical Note",
    level=2,
    output_format="json",
    phrasings=PHRASINGS,
)
VISIT = Task(
    name="visit_completeness",
    task_type="note scoring",
    source="aci_bench",
    input_data="Clinical Note",
    level=2,
    output_format="json",
    phrasings=PHRASINGS,
)
NOTE_RUBRIC = {
    "history of present illness": {"HISTORY OF PRESENT ILLNESS", "HPI"},
    "past medical history": {"PAST MEDICAL HISTORY"},
    "medications": {"MEDICATIONS", "CURRENT MEDICATIONS"},
    "allergies": {"ALLERGIES"},
    "social history": {"SOCIAL HISTORY"},
    "family history": {"FAMILY HISTORY"},
    "physical examination": {"PHYSICAL EXAMINATION", "PHYSICAL EXAM"},
    "assessment or impression": {"ASSESSMENT", "IMPRESSION", "ASSESSMENT AND PLAN"},
}
STEMS = {
    "history of present illness": r"present|HPI|HX|subjective|S:|history:",
    "past medical history": r"medical hist|past hist|PMH|PMHX|past med",
    "medications": r"med|drug",
    "allergies": r"allerg",
    "social history": r"soc|SH:|habits",
    "family history": r"fam|FH:|FHX",
    "physical examination": r"exam|objective|O:|PE:|vital",
    "assessment or impression": r"assess|impress|diagnos|A:|A/P|conclusion",
}
ARGUABLE = {
    name: re.compile(
        rf"^(?=[^.:\n]{{0,60}}:)(?:[^.:\n]*\s)?(?:{stem})", re.MULTILINE | re.IGNORECASE
    )
    for name, stem in STEMS.items()
}
"""A line that opens with another name for a section: whether that counts could be argued."""
VISIT_RUBRIC = {
    "chief complaint": {"CHIEF COMPLAINT"},
    "history of present illness": {"HISTORY OF PRESENT ILLNESS"},
    "review of systems": {"REVIEW OF SYSTEMS"},
    "physical examination": {"PHYSICAL EXAM", "PHYSICAL EXAMINATION", "EXAM"},
    "results": {"RESULTS"},
    "assessment": {"ASSESSMENT", "ASSESSMENT AND PLAN", "IMPRESSION"},
    "plan": {"PLAN", "ASSESSMENT AND PLAN"},
}
MIN_CHARACTERS, MAX_CHARACTERS = 300, 4500
MIN_SCORE = 2


def candidates(material: Material) -> Iterator[Candidate]:
    """Notes whose headings leave no doubt."""
    for note in material.mtsamples:
        found = headings(note.text)
        missing = [name for name, any_of in NOTE_RUBRIC.items() if found.isdisjoint(any_of)]
        sized = MIN_CHARACTERS <= len(note.text) <= MAX_CHARACTERS
        clear = not any(ARGUABLE[name].search(note.text) for name in missing)
        if sized and clear and len(NOTE_RUBRIC) - len(missing) >= MIN_SCORE:
            split, kind = material.origins.split_of_note(note.group_id), document_type(note)
            wanted = answer(NOTE_RUBRIC, missing)
            yield NOTE.candidate(
                note.group_id,
                split,
                given=note.text,
                wanted=wanted,
                input_data=kind,
                sections=", ".join(NOTE_RUBRIC),
                count=str(len(NOTE_RUBRIC)),
            )
    for number, document in enumerate(material.aci_bench):
        yield of_visit(document, number)


def of_visit(document: Document, number: int) -> Candidate:
    """The note of an ACI-Bench visit; its headings follow one pattern."""
    note = document.facts["summary"]
    found = headings(note)
    missing = [name for name, any_of in VISIT_RUBRIC.items() if found.isdisjoint(any_of)]
    return VISIT.candidate(
        document.group_id,
        visit_split(number),
        given=note,
        wanted=answer(VISIT_RUBRIC, missing),
        sections=", ".join(VISIT_RUBRIC),
        count=str(len(VISIT_RUBRIC)),
    )


def headings(note: str) -> set[str]:
    """Lines without the colon at their end; those of the rubric are headings."""
    return {line.strip().rstrip(":") for line in note.split("\n")}


def answer(rubric: dict[str, set[str]], missing: list[str]) -> str:
    return json.dumps({"score": len(rubric) - len(missing), "missing": missing})

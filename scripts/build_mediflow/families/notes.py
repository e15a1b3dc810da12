"""MTSamples: specialty, description, keywords and assessment of a note."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise, takewhile

from mediphi.records import Document
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Split, Task

SPECIALTY = Task(
    name="specialty",
    task_type="classification",
    source="mtsamples",
    input_data="Clinical Note",
    level=1,
    max_rows=(260, 30),
    phrasings=(
        "Which specialty does this note belong to? Choose one of: {specialties}. Answer with the "
        "name alone.",
        "Classify the excerpt by medical specialty. Options: {specialties}. Output one option.",
        "Name the department that would keep this note: {specialties}. Give only the name.",
        "Assign one specialty to the text. Allowed answers: {specialties}.",
    ),
)
DESCRIPTION = Task(
    name="note_description",
    task_type="summarization",
    source="mtsamples",
    input_data="Clinical Note",
    level=2,
    max_rows=(200, 30),
    phrasings=(
        "Describe this note in one or two sentences.",
        "Summarize the document as a line for a table of contents.",
        "State briefly what this clinical document is about.",
        "Give a short description of the note: who, what and why, where it says so.",
    ),
)
KEYWORDS = Task(
    name="note_keywords",
    task_type="aspect-oriented keyword extraction",
    source="mtsamples",
    input_data="Clinical Note",
    level=1,
    output_format="json",
    max_rows=(220, 30),
    phrasings=(
        "Extract the keywords of this excerpt (findings, procedures, drugs, anatomy) as a JSON "
        "list, each as it stands in the text.",
        "Which terms of the note would you index it under? Answer with a JSON list of words and "
        "phrases from the text.",
        "List the clinical keywords of the text as a JSON array, in lower case.",
        "Pick the words and phrases that a search for this note should find. Output a JSON list.",
    ),
)
ASSESSMENT = Task(
    name="note_assessment",
    task_type="reasoning & diagnosis",
    source="mtsamples",
    input_data="Clinical Note",
    level=3,
    max_rows=(260, 40),
    phrasings=(
        "Write the section '{heading}' that follows from this note.",
        "Reason from history and findings to the '{heading}' section of the note.",
        "The note stops before '{heading}'. State what belongs there.",
        "Read the sections below and give the '{heading}'.",
    ),
)
SPECIALTIES = {
    "Cardiovascular / Pulmonary": "Clinical Note",
    "Orthopedic": "Clinical Note",
    "Radiology": "Radiology Report",
    "Gastroenterology": "Clinical Note",
    "Neurology": "Clinical Note",
    "Obstetrics / Gynecology": "Clinical Note",
    "Urology": "Clinical Note",
    "ENT - Otolaryngology": "Clinical Note",
    "Hematology - Oncology": "Clinical Note",
    "Ophthalmology": "Clinical Note",
    "Nephrology": "Clinical Note",
    "Psychiatry / Psychology": "Psychiatric Evaluation",
    "Dentistry": "Dental Record",
    "Dermatology": "Clinical Note",
}
"""Specialties that name a field, with the document type of their notes where there is one."""
DOCUMENT_TYPES = {
    "Surgery": "Operative Note",
    "Discharge Summary": "Discharge Summary",
    "Emergency Room Reports": "Emergency Department Note",
    "Radiology": "Radiology Report",
    "Consult - History and Phy.": "Consultation Note",
    "SOAP / Chart / Progress Notes": "Progress Note",
    "Psychiatry / Psychology": "Psychiatric Evaluation",
    "Dentistry": "Dental Record",
    "Lab Medicine - Pathology": "Pathology Report",
    "Autopsy": "Pathology Report",
    "Letters": "Referral Letter",
    "Diets and Nutritions": "Dietary Notes",
    "Hospice - Palliative Care": "End-of-Life Care Documentation",
    "Physical Medicine - Rehab": "Therapy Notes",
    "Speech - Language": "Therapy Notes",
}
"""The first that fits."""
HEADING = re.compile(r"[A-Z][A-Z /&,()'-]{2,50}:")
CONCLUSIONS = ("ASSESSMENT:", "IMPRESSION:", "DIAGNOSIS:", "FINAL DIAGNOSIS:", "DIAGNOSES:")
KEYWORD = re.compile(r"[a-z][a-z0-9 /'-]{2,38}")
EXCERPT_CHARACTERS = 900
MAX_NOTE_CHARACTERS = 2200


def candidates(material: Material) -> Iterator[Candidate]:
    """Distinct notes; a note's rows are all in one split."""
    keywords = material.mtsamples_keywords
    for note in material.mtsamples:
        split = material.origins.split_of_note(note.group_id)
        number = note.id.partition("/")[2]
        yield from of_specialty(note, split)
        yield from of_description(note, split)
        yield from of_keywords(note, split, keywords[number])
        yield from of_assessment(note, split)


def document_type(note: Document) -> str:
    """MediFlow's name for the note's type."""
    specialties = note.facts["specialties"]
    fitting = (name for key, name in DOCUMENT_TYPES.items() if key in specialties)
    return next(fitting, "Clinical Note")


def excerpt(text: str) -> str:
    """First whole lines within `EXCERPT_CHARACTERS`; empty when the first is longer."""
    lengths = 0

    def fits(line: str) -> bool:
        nonlocal lengths
        lengths += len(line) + 1
        return lengths <= EXCERPT_CHARACTERS

    return "\n".join(takewhile(fits, text.split("\n")))


def of_specialty(note: Document, split: Split) -> Iterator[Candidate]:
    """Notes listed under exactly one field."""
    fields = [name for name in note.facts["specialties"] if name in SPECIALTIES]
    text = excerpt(note.text)
    if len(fields) == 1 and len(text) >= EXCERPT_CHARACTERS // 3:
        yield SPECIALTY.candidate(
            note.group_id,
            split,
            given=text,
            wanted=fields[0],
            input_data=document_type(note),
            specialties=", ".join(SPECIALTIES),
        )


def of_description(note: Document, split: Split) -> Iterator[Candidate]:
    """Short notes whose published description is a sentence and not cut off."""
    summary = note.facts.get("summary", "")
    if 40 <= len(summary) <= 300 and summary[-1] == "." and len(note.text) <= MAX_NOTE_CHARACTERS:
        kind = document_type(note)
        yield DESCRIPTION.candidate(
            note.group_id, split, given=note.text, wanted=summary, input_data=kind
        )


def of_keywords(note: Document, split: Split, published: str) -> Iterator[Candidate]:
    """Published keywords that stand in the excerpt, in their published order."""
    text = excerpt(note.text)
    terms = [term.strip().lower() for term in published.split(",")]
    found = [
        term
        for term in dict.fromkeys(terms)
        if KEYWORD.fullmatch(term) and re.search(rf"\b{re.escape(term)}\b", text.lower())
    ]
    if len(found) >= 3:
        kind = document_type(note)
        yield KEYWORDS.candidate(
            note.group_id, split, given=text, wanted=json.dumps(found), input_data=kind
        )


def sections(text: str) -> list[tuple[str, str, str]]:
    """Headings in capitals on a line of their own: heading, text above it, lines below it."""
    lines = text.split("\n")
    places = [number for number, line in enumerate(lines) if HEADING.fullmatch(line)]
    return [
        (lines[place], "\n".join(lines[:place]), "\n".join(lines[place + 1 : end]))
        for place, end in pairwise([*places, len(lines)])
    ]


def of_assessment(note: Document, split: Split) -> Iterator[Candidate]:
    """The first concluding section from the text before it."""
    for heading, above, wanted in sections(note.text):
        if heading not in CONCLUSIONS:
            continue
        if 250 <= len(above) <= 2 * MAX_NOTE_CHARACTERS and 15 <= len(wanted) <= 600:
            yield ASSESSMENT.candidate(
                note.group_id,
                split,
                given=above,
                wanted=wanted,
                input_data=document_type(note),
                heading=heading.rstrip(":").capitalize(),
            )
        return

"""MTS-Dialog and ACI-Bench: from conversation to note, and back."""

import re
from collections.abc import Iterator

from mediphi.records import Document
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.origins import official_split
from scripts.build_mediflow.rows import Candidate, Split, Task, share

SECTION = Task(
    name="dialogue_to_section",
    task_type="summarization",
    source="mts_dialog",
    input_data="Doctor-Patient Conversation",
    level=1,
    max_rows=(700, 60),
    phrasings=(
        "Summarize this conversation between doctor and patient as the section '{section}' of a "
        "clinical note. Use only what was said.",
        "Write the note section '{section}' from the dialogue below.",
        "You document visits. Turn the conversation into the '{section}' section of the note, in "
        "the third person and without small talk.",
        "Read the dialogue and give the text that belongs under '{section}' in the patient's "
        "note. Do not add findings that nobody mentioned.",
        "Condense the following doctor-patient dialogue into a '{section}' entry.",
    ),
)
NAMING = Task(
    name="section_name",
    task_type="classification",
    source="mts_dialog",
    input_data="Clinical Note",
    level=0,
    max_rows=(200, 25),
    phrasings=(
        "Which section of a clinical note does this text come from? Choose one of: {sections}. "
        "Answer with the name alone.",
        "Classify the excerpt by note section. Sections: {sections}. Give only the section.",
        "Name the heading under which this text would stand in a note. Possible headings: "
        "{sections}. Reply with one heading.",
        "Sort this piece of a clinical note into one of the sections {sections}. Output the "
        "section's name and nothing else.",
    ),
)
DIALOGUE = Task(
    name="section_to_dialogue",
    task_type="text expansion",
    source="mts_dialog",
    input_data="Clinical Note",
    level=3,
    max_rows=(160, 25),
    phrasings=(
        "Write the conversation between doctor and patient that this note section summarizes.",
        "Expand the note excerpt into a dialogue in which the doctor asks and the patient tells "
        "what is recorded here.",
        "Imagine the visit behind this entry. Write it out as a dialogue with the speakers "
        "'Doctor' and 'Patient'.",
        "Turn the short section below into a full conversation between a doctor and a patient. "
        "Every recorded fact should come up.",
    ),
)
PLAN = Task(
    name="visit_to_plan",
    task_type="reasoning & diagnosis",
    source="aci_bench",
    input_data="Clinical Note",
    level=3,
    phrasings=(
        "The note below ends before the assessment. Write the section 'Assessment and plan'.",
        "From history, examination and results, write the assessment and plan for this patient.",
        "Complete the clinical note: state the problems and what is to be done about each.",
        "Reason from the findings in this note to an assessment and a plan.",
    ),
)
VISIT = Task(
    name="visit_to_note",
    task_type="summarization",
    source="aci_bench",
    input_data="Doctor-Patient Conversation",
    level=4,
    phrasings=(
        "Write a full clinical note of this visit, with its usual sections.",
        "Summarize the conversation as a clinical note, from chief complaint to plan.",
        "Turn the transcript of the visit into a structured note for the record.",
        "You are the scribe. Produce the note for the encounter below, section by section.",
    ),
)
SECTIONS = (
    "Family and social history",
    "History of present illness",
    "Past medical history",
    "Review of systems",
    "Past surgical history",
    "Allergies",
    "Medications",
    "Assessment",
)
"""Those with enough rows to learn from."""
EXPANDED_SHARE = 0.2
ACI_TRAINING = 67
"""Rows of the published training file."""
MIN_LABELLED_WORDS = 5
PLAN_HEADING = re.compile(r"^(?:ASSESSMENT|IMPRESSION)(?: AND PLAN)?:?\s*$", re.MULTILINE)


def candidates(material: Material) -> Iterator[Candidate]:
    """Official validation rows are held out; the test rows were never read."""
    for document in material.mts_dialog:
        split = official_split(document)
        note = material.origins.note_of.get(document.group_id)
        if note is None or material.origins.split_of_note(note) == split:
            yield from of_conversation(document, split, key=note or document.group_id)
    for number, document in enumerate(material.aci_bench):
        yield from of_visit(document, visit_split(number))


def visit_split(number: int) -> Split:
    """Split of an ACI-Bench document by its place: the reader gives training rows first."""
    return "train" if number < ACI_TRAINING else "heldout"


def of_conversation(document: Document, split: Split, *, key: str) -> Iterator[Candidate]:
    """A dialogue is summarized or, for a share of them, written from its summary."""
    section = document.facts["summary"]
    if share(f"direction {document.group_id}") < EXPANDED_SHARE and len(section.split()) >= 12:
        yield DIALOGUE.candidate(key, split, given=section, wanted=document.text)
    else:
        title = document.title
        yield SECTION.candidate(key, split, given=document.text, wanted=section, section=title)
    if document.title in SECTIONS and len(section.split()) >= MIN_LABELLED_WORDS:
        names = ", ".join(SECTIONS)
        yield NAMING.candidate(key, split, given=section, wanted=document.title, sections=names)


def of_visit(document: Document, split: Split) -> Iterator[Candidate]:
    """The whole note from the dialogue, and its last section from those before it."""
    note = document.facts["summary"]
    yield VISIT.candidate(document.group_id, split, given=document.text, wanted=note)
    heading = PLAN_HEADING.search(note)
    if heading:
        before, plan = note[: heading.start()], note[heading.end() :]
        yield PLAN.candidate(document.group_id, split, given=before, wanted=plan)

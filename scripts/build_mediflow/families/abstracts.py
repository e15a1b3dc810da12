"""PubMedQA: abstracts with a question, its yes/no/maybe answer and a conclusion."""

import json
from collections.abc import Iterator
from typing import Any

from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Split, Task, pick, split_by_hash

ANSWER = Task(
    name="abstract_answer",
    task_type="question-answering",
    source="pubmedqa",
    input_data="Scientific Article",
    level=2,
    max_rows=(220, 30),
    phrasings=(
        "Answer the research question from the abstract in one to three sentences.",
        "Read the abstract without its conclusion and answer the question that the study asked.",
        "What does this study say about the question? Answer from the abstract alone.",
        "Give a short answer to the question, supported by the results in the abstract.",
    ),
)
DECISION = Task(
    name="abstract_decision",
    task_type="classification",
    source="pubmedqa",
    input_data="Scientific Article",
    level=2,
    max_rows=(160, 25),
    phrasings=(
        "Does the abstract answer the question with yes, no or maybe? Reply with one word.",
        "Classify the study's answer to its question as yes, no or maybe. Output the label alone.",
        "Decide from the abstract whether the answer is yes, no or maybe. Give only the label.",
        "Label the outcome of this study for its question: yes, no or maybe.",
    ),
)
CONCLUSION = Task(
    name="abstract_conclusion",
    task_type="summarization",
    source="pubmedqa",
    input_data="Scientific Article",
    level=2,
    max_rows=(120, 25),
    phrasings=(
        "Write the conclusion of this abstract.",
        "Summarize what the study found in the words of a conclusion.",
        "The abstract lacks its last section. State the authors' conclusion.",
        "Condense objective, methods and results into a conclusion of a few sentences.",
    ),
)
ENTAILMENT = Task(
    name="conclusion_entailment",
    task_type="textual entailment",
    source="pubmedqa",
    input_data="Scientific Article",
    level=1,
    max_rows=(430, 50),
    phrasings=(
        "Does the premise entail the hypothesis? Answer with entailment, contradiction or neutral.",
        "Decide how the hypothesis relates to the premise: entailment, contradiction or neutral. "
        "Output one word.",
        "Given the conclusion of a study as premise, label the hypothesis as entailment, "
        "contradiction or neutral.",
        "Read premise and hypothesis. Reply 'entailment' if the hypothesis follows, "
        "'contradiction' if the opposite follows, 'neutral' if it stays open.",
    ),
)
HEADINGS = Task(
    name="abstract_headings",
    task_type="aspect-oriented keyword extraction",
    source="pubmedqa",
    input_data="Scientific Article",
    level=2,
    output_format="json",
    max_rows=(160, 25),
    phrasings=(
        "Extract the subject terms of this abstract as a JSON list of strings, each as it stands "
        "in the text.",
        "Which words of the abstract would serve as its subject headings? Answer with a JSON list.",
        "List the keywords for indexing this article: diseases, treatments, methods and groups "
        "of people that the text names. Output JSON.",
        "Give the index terms that occur in this abstract as a JSON array.",
    ),
)
LABELS = {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}
OPPOSITE = {"entailment": "contradiction", "contradiction": "entailment", "neutral": "neutral"}
HELDOUT_SHARE = 0.13
CHECK_TAGS = frozenset(("humans", "male", "female", "adult", "aged", "animals", "child"))
"""Indexers add these to nearly every article."""
MIN_HEADINGS = 3


def candidates(material: Material) -> Iterator[Candidate]:
    """Five tasks for each abstract that is no test item."""
    for pmid, entry in material.pubmedqa.items():
        key = f"pubmedqa/{pmid}"
        split = split_by_hash(key, heldout=HELDOUT_SHARE)
        abstract = page(entry)
        asked = f"Question: {entry['QUESTION']}\n\n{abstract}"
        conclusion = entry["LONG_ANSWER"]
        yield ANSWER.candidate(key, split, given=asked, wanted=conclusion)
        yield DECISION.candidate(key, split, given=asked, wanted=entry["final_decision"])
        yield CONCLUSION.candidate(key, split, given=abstract, wanted=conclusion)
        yield of_hypothesis(key, split, entry)
        headings = headings_in(abstract, entry["MESHES"])
        if len(headings) >= MIN_HEADINGS:
            yield HEADINGS.candidate(key, split, given=abstract, wanted=json.dumps(headings))


def page(entry: dict[str, Any]) -> str:
    """Sections of the abstract but the conclusion."""
    sections = zip(entry["LABELS"], entry["CONTEXTS"], strict=True)
    return "\n".join(f"{label}: {' '.join(text.split())}" for label, text in sections)


def of_hypothesis(key: str, split: Split, entry: dict[str, Any]) -> Candidate:
    """The conclusion as premise; the hypothesis says yes or no, by hash."""
    says = pick(("yes", "no"), "hypothesis", key)
    label = LABELS[entry["final_decision"]]
    given = (
        f"Premise: {entry['LONG_ANSWER']}\n"
        f'Hypothesis: The answer to the question "{entry["QUESTION"]}" is {says}.'
    )
    wanted = label if says == "yes" else OPPOSITE[label]
    return ENTAILMENT.candidate(key, split, given=given, wanted=wanted)


def headings_in(abstract: str, headings: list[str]) -> list[str]:
    """Subject headings that stand in the abstract, as it writes them."""
    lowered = abstract.lower()
    found = []
    for heading in headings:
        place = lowered.find(heading.lower())
        if place >= 0 and heading.lower() not in CHECK_TAGS:
            found.append(abstract[place : place + len(heading)])
    return found

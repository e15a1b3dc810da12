"""SHADR: sentences about social determinants of health, written by a model, labelled by people."""

import json
from collections import Counter
from collections.abc import Iterator

from mediphi.data.sources.bundled import content_key
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Task, split_by_hash

DETERMINANTS = Task(
    name="social_determinants",
    task_type="classification",
    source="shadr",
    input_data="Social Work Note",
    level=1,
    output_format="json",
    phrasings=(
        "Which social determinants of health does the sentence mention? Answer with a JSON list "
        "from EMPLOYMENT, HOUSING, PARENT, RELATIONSHIP, SUPPORT, TRANSPORTATION; an empty list "
        "if none.",
        "Label the sentence with all fitting social determinants (EMPLOYMENT, HOUSING, PARENT, "
        "RELATIONSHIP, SUPPORT, TRANSPORTATION) as a JSON list.",
        "Classify this line of a social work note. Output a JSON array with any of EMPLOYMENT, "
        "HOUSING, PARENT, RELATIONSHIP, SUPPORT and TRANSPORTATION that it is about.",
        "Tag social determinants of health. Possible tags: EMPLOYMENT, HOUSING, PARENT, "
        "RELATIONSHIP, SUPPORT, TRANSPORTATION. Reply with a JSON list, possibly empty.",
    ),
)
ADVERSE = Task(
    name="adverse_determinant",
    task_type="classification",
    source="shadr",
    input_data="Social Work Note",
    level=1,
    phrasings=(
        "Does the sentence describe the patient's {determinant} as adverse or nonadverse for "
        "health? Answer with one word.",
        "Judge the social determinant {determinant} in this sentence: adverse or nonadverse? "
        "Give the label alone.",
        "Label the sentence's {determinant} aspect as adverse or nonadverse.",
        "Is what the sentence says about {determinant} adverse or nonadverse? Reply with the "
        "label.",
    ),
)
SENTENCE = Task(
    name="telegraphic_sentence",
    task_type="text expansion",
    source="shadr",
    input_data="Social Work Note",
    level=1,
    phrasings=(
        "Write the clipped line as a full sentence about the person named.",
        "Expand this shorthand from a social work note into a sentence that says who it is about.",
        "Turn the telegraphic entry into a complete sentence, naming the person given.",
        "Rewrite the entry in full words, with the person as its subject.",
    ),
)
NONE = "<NO_SDOH>"


def candidates(material: Material) -> Iterator[Candidate]:
    """Half of the sentences; those that the annotators labelled in two ways are left out."""
    labels = Counter(content_key(key) for key, _ in {labelled(row) for row in material.shadr})
    for row in material.shadr:
        sentence = row["original_sentence"].strip()
        key = f"shadr/{content_key(sentence)}"
        split = split_by_hash(key, heldout=0.15)
        if labels[content_key(sentence)] == 1:
            names = [] if row["label"] == NONE else sorted(set(row["label"].split(",")))
            wanted = json.dumps(names)
            yield DETERMINANTS.candidate(key, split, given=sentence, wanted=wanted)
            if len(names) == 1 and row["adverse"] in ("adverse", "nonadverse"):
                slot = names[0].lower()
                yield ADVERSE.candidate(
                    key, split, given=sentence, wanted=row["adverse"], determinant=slot
                )
        person = f"Person: {row['demographic']}\nEntry: {sentence}"
        yield SENTENCE.candidate(key, split, given=person, wanted=row["demographic_inserted"])


def labelled(row: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """Sentence with its labels, whatever their order."""
    return row["original_sentence"].strip(), (*sorted(row["label"].split(",")), row["adverse"])

"""Families of tasks: one module per kind of source, each with `candidates(material)`."""

from collections.abc import Callable, Iterator

from scripts.build_mediflow.families import (
    abbreviations,
    abstracts,
    codes,
    consumer_questions,
    conversations,
    entities,
    guidelines,
    notes,
    scoring,
    social,
    vignettes,
)
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate

FAMILIES: dict[str, Callable[[Material], Iterator[Candidate]]] = {
    "abbreviations": abbreviations.candidates,
    "abstracts": abstracts.candidates,
    "codes": codes.candidates,
    "consumer_questions": consumer_questions.candidates,
    "conversations": conversations.candidates,
    "entities": entities.candidates,
    "guidelines": guidelines.candidates,
    "notes": notes.candidates,
    "scoring": scoring.candidates,
    "social": social.candidates,
    "vignettes": vignettes.candidates,
}

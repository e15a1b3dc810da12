"""MediFlow's columns, and candidates for rows before they are filtered and rated."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mediphi.data.sources.bundled import content_key

Split = Literal["train", "heldout"]
Option = TypeVar("Option")

COLUMNS = (
    "instruction",
    "input",
    "output",
    "task_type",
    "input_data",
    "output_format",
    "difficulty_level",
    "rejected_output",
    "error_type",
    "quality",
    "alignment",
    "coherence",
    "realism",
    "difficulty",
)
"""In the order of the published set."""

TASK_TYPES = (
    "summarization",
    "question-answering",
    "multiple-choice question-answering",
    "named entity recognition",
    "relation extraction",
    "classification",
    "reasoning & diagnosis",
    "textual entailment",
    "text simplification",
    "text expansion",
    "abbreviation expansion",
    "aspect-oriented keyword extraction",
    "error detection & correction",
    "note scoring",
)
LEVELS = ("low", "moderate", "moderate-hard", "hard", "very hard", "extreme")
LONG_INPUT_WORDS = 250
"""A longer input is one level harder."""
ODD_BREAKS = re.compile("[\\x0b\\x0c\\x1c-\\x1e\\x85\\u2028\\u2029]")
"""Line breaks that only some programs see; a JSON line must not hold any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A row that may be kept, with what the filters need to know about it."""

    task: "Task"
    document: str
    split: Split
    instruction: str
    input: str
    output: str
    input_data: str
    level: int

    @property
    def key(self) -> str:
        """Orders rows: sixteen hexadecimal digits that look random and never change."""
        return digest(self.task.name, self.document, self.input, self.output)

    @property
    def difficulty_level(self) -> str:
        longer = len(self.input.split()) > LONG_INPUT_WORDS
        return LEVELS[min(self.level + longer, len(LEVELS) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of row from one source.

    Attributes:
        name: unique; `max_rows` rows of training and held-out data are kept under it.
        source: key of `licences.SOURCES`.
        level: index in `LEVELS`, for a short input.
        phrasings: instructions of equal meaning; a row gets one by hash.
        input_data: document type; a candidate may name its own.
    """

    name: str
    task_type: str
    source: str
    input_data: str
    phrasings: tuple[str, ...]
    level: int
    output_format: Literal["plain_text", "json"] = "plain_text"
    max_rows: tuple[int, int] = (300, 30)

    def candidate(
        self,
        document: str,
        split: Split,
        *,
        given: str,
        wanted: str,
        input_data: str | None = None,
        level: int | None = None,
        **slots: str,
    ) -> Candidate:
        """A row about `document`; `slots` fill the braces of the phrasings."""
        phrasing = pick(self.phrasings, self.name, document, given)
        return Candidate(
            task=self,
            document=document,
            split=split,
            instruction=phrasing.format(**slots),
            input=ODD_BREAKS.sub(" ", given).strip(),
            output=ODD_BREAKS.sub(" ", wanted).strip(),
            input_data=input_data or self.input_data,
            level=self.level if level is None else level,
        )


def digest(*parts: str) -> str:
    """Sixteen hexadecimal digits of the parts."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def pick(options: Sequence[Option], *parts: str) -> Option:
    """One of `options`, by hash of the parts."""
    return options[int(digest(*parts), 16) % len(options)]


def share(text: str) -> float:
    """Number in [0, 1) that depends on the words of `text` only."""
    return int(content_key(text), 16) / 16**16


def split_by_hash(group: str, *, heldout: float) -> Split:
    """A share of groups is held out; the same ones every time."""
    return "heldout" if share(f"mediflow heldout {group}") < heldout else "train"

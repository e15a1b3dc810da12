"""What a rule may draw from: the row's instruction and input, other outputs, and the dice."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from random import Random

from mediphi.synthesize.corruption.edits import cased
from mediphi.synthesize.corruption.trees import MAX_PHRASE_WORDS, Tree, strings
from mediphi.synthesize.sentences import split_sentences

WORD = re.compile(r"[^\W\d_][\w-]*")
OPTION = re.compile(
    r"(?:^|(?<=\s))\(?([A-H])[.):]\s+(\S.*?)(?=\s+\(?[A-H][.):]\s|\s*\n|\s*$)", re.MULTILINE
)
CHOICE = re.compile(r"(\(?)([A-H])((?:[.):]|$)\s*)(.*)", re.DOTALL)
NUMBER = re.compile(r"-?\d+")
NUMBERED_LINE = re.compile(r"^(\d+)[.):]?\s", re.MULTILINE)
SPEAKER = re.compile(r"^(?:[A-Z][\w.]*\s?){1,3}:\s+")
LABEL_SETS = (
    ("yes", "no", "maybe"),
    ("entailment", "neutral", "contradiction"),
    ("entailed", "neutral", "contradicted"),
    ("true", "false"),
    ("positive", "negative"),
    ("correct", "incorrect"),
    ("supported", "unsupported"),
    ("low", "moderate", "high"),
    ("mild", "moderate", "severe"),
    ("easy", "medium", "hard"),
    ("poor", "fair", "good", "excellent"),
    ("treatment", "problem", "test"),
)
MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 5, 45


@dataclass(frozen=True)
class Source:
    """Of one row. `pool` holds other outputs of the task, decoded."""

    task_type: str
    instruction: str
    document: str
    pool: tuple[Tree, ...]
    rng: Random

    @cached_property
    def sentences(self) -> list[str]:
        """Statements of the input in order, without who says them; no questions, no headings."""
        stripped = (SPEAKER.sub("", sentence) for sentence in split_sentences(self.document))
        return [
            sentence
            for sentence in stripped
            if MIN_SENTENCE_WORDS <= len(sentence.split()) <= MAX_SENTENCE_WORDS
            and sentence[-1] in ".!"
        ]

    @cached_property
    def options(self) -> dict[str, str]:
        """Letter and text of a multiple choice, from the input or else the instruction."""
        for text in (self.document, self.instruction):
            found = {letter: option.strip() for letter, option in OPTION.findall(text)}
            if len(found) > 1 and min(found) == "A":
                return found
        return {}

    @cached_property
    def pool_strings(self) -> list[str]:
        return sorted({string for tree in self.pool for string in strings(tree)})

    def alternatives(self, text: str) -> list[str]:
        """What this label or choice could wrongly have been; none for anything else."""
        return self._choices(text) or self._labels(text)

    def _choices(self, text: str) -> list[str]:
        for letter, option in self.options.items():
            if text == option:
                return [other for key, other in self.options.items() if key != letter]
        if NUMBER.fullmatch(text):
            return [n for n in dict.fromkeys(NUMBERED_LINE.findall(self.document)) if n != text]
        match = CHOICE.fullmatch(text)
        if not match or match[2] not in self.options:
            return []
        opening, letter, mark, rest = match.groups()
        others = [(key, other) for key, other in self.options.items() if key != letter]
        own = self.options[letter]
        if not rest:
            return [f"{opening}{key}{mark}" for key, _ in others]
        if rest.lower().startswith(own.lower()):
            return [f"{opening}{key}{mark}{other}{rest[len(own) :]}" for key, other in others]
        return []

    def _labels(self, text: str) -> list[str]:
        label = text.rstrip(".").lower()
        if not label or len(label.split()) > MAX_PHRASE_WORDS:
            return []
        known = [set_ for set_ in LABEL_SETS if label in set_]
        allowed = [set_ for set_ in known if all(map(self._instructed, set_))] or known[:1]
        others: Iterable[str] = allowed[0] if allowed else ()
        if self._instructed(label):
            offered = (s.rstrip(".") for s in self.pool_strings if len(s.split()) <= 6)
            others = [*others, *filter(self._instructed, offered)]
        different = dict.fromkeys(cased(other, text) for other in others if other.lower() != label)
        return [other + text[len(label) :] for other in different]

    def _instructed(self, label: str) -> bool:
        return bool(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", self.instruction, re.I))


def words(text: str) -> list[str]:
    """Words in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def overlap(one: str, other: str) -> float:
    """Share of the words of the shorter text that stand in the other one, 0 to 1."""
    first, second = set(words(one)), set(words(other))
    return len(first & second) / max(1, min(len(first), len(second)))

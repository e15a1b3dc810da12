"""Small changes of a text as spans with their replacement."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple


class Edit(NamedTuple):
    """Characters `start:end` become `new`."""

    start: int
    end: int
    new: str


def apply(text: str, edits: Sequence[Edit]) -> str:
    """The text with edits that do not overlap."""
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.new + text[edit.end :]
    return text


def draw(edits: Sequence[Edit], count: int, rng: Random) -> list[Edit]:
    """Up to `count` of them, chosen at random, none touching another."""
    chosen: list[Edit] = []
    for edit in rng.sample(edits, len(edits)):
        if all(edit.end < other.start or other.end < edit.start for other in chosen):
            chosen.append(edit)
        if len(chosen) == count:
            break
    return chosen


def substitutions(text: str, table: Mapping[str, Sequence[str]], rng: Random) -> list[Edit]:
    """One edit for every whole word or phrase that the table knows, in the case of the original."""
    return [
        Edit(match.start(), match.end(), cased(rng.choice(table[match[0].lower()]), match[0]))
        for match in _pattern(tuple(table)).finditer(text)
    ]


def cased(word: str, like: str) -> str:
    """`word` with the capitals of another one."""
    if len(like) > 1 and like.isupper():
        return word.upper()
    return capitalised(word) if like[:1].isupper() else word


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def uncapitalised(text: str) -> str:
    """Lower case at the start, unless an abbreviation or a name stands there."""
    first = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if first.lower() in OPENINGS else text


_OPENINGS = """
a after all although an and as at because before both by despite during each following for from
he her his if in it its many most no of on one our patients she since some that the their there
these they this those to treatment two we when while with
"""
OPENINGS = frozenset(_OPENINGS.split())
"""Words that open a sentence and lose their capital in the middle of one."""


@lru_cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])", re.I)

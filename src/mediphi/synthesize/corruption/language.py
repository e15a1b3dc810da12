"""Errors of wording: style, grammar, spelling."""

import re
from random import Random

from mediphi.synthesize.corruption import lexicon, phrases
from mediphi.synthesize.corruption.edits import (
    Edit,
    apply,
    capitalised,
    draw,
    substitutions,
    uncapitalised,
)
from mediphi.synthesize.corruption.source import Source
from mediphi.synthesize.corruption.trees import Tree, edit_line

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {
    letter: row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    for row in KEYBOARD
    for place, letter in enumerate(row)
}
LONG_WORD = re.compile(r"(?<![\w-])[A-Za-z][a-z]{4,}(?![\w-])")
MIN_GRAMMAR_WORDS = 4
WORDS_PER_ERROR = 9
MAX_ERRORS = 5
THE = re.compile(r"\b(?:the|an?) (?=[a-z])")
MODIFIED = re.compile(r"\b(?:a|an|the|no|his|her|with|of) ([a-z]{4,}) ([a-z]{4,})\b")
NOT_DONE = re.compile(r"\b(is|are|was|were|has|have|had|did|does|do) (not|been|also) ")


def stylistic_issues(tree: Tree, source: Source) -> Tree | None:
    """One line in a register that does not fit: casual words, chatter, shouting, or careless case.

    Facts stay. A label keeps its letters and changes their case or its marks.
    """
    rng = source.rng

    def edit(text: str) -> str | None:
        styles = [_casual, _chatty, _shouted, _careless, _excited]
        for style in rng.sample(styles, len(styles)):
            changed = style(text, rng)
            if changed is not None and changed != text:
                return changed
        return None

    return edit_line(tree, edit, rng)


def grammatical_errors(tree: Tree, source: Source) -> Tree | None:
    """Wrong agreement, articles, prepositions and word order; one error to nine words, at most 5.

    Needs four words, one of which has a form that can be wrong.
    """

    def edit(text: str) -> str | None:
        if len(text.split()) < MIN_GRAMMAR_WORDS or source.alternatives(text):
            return None
        edits = [
            *substitutions(text, lexicon.WRONG_FORMS, source.rng),
            *(Edit(m.start(), m.end(), "") for m in THE.finditer(text)),
            *(_swapped(m) for m in NOT_DONE.finditer(text)),
            *(_swapped(m) for m in MODIFIED.finditer(text)),
        ]
        return _with_errors(text, edits, source.rng)

    return edit_line(tree, edit, source.rng)


def spelling_errors(tree: Tree, source: Source) -> Tree | None:
    """One slip in some words of five letters or more; one word in nine, at most 5.

    A slip is a neighbour on the keyboard, two letters exchanged, one dropped or one doubled; the
    first letter stays.
    """

    def edit(text: str) -> str | None:
        rng = source.rng
        edits = [Edit(m.start(), m.end(), _slip(m[0], rng)) for m in LONG_WORD.finditer(text)]
        return _with_errors(text, edits, rng)

    return edit_line(tree, edit, source.rng)


def _with_errors(text: str, edits: list[Edit], rng: Random) -> str | None:
    count = min(MAX_ERRORS, 1 + len(text.split()) // WORDS_PER_ERROR)
    return apply(text, draw(edits, count, rng)) if edits else None


def _slip(word: str, rng: Random) -> str:
    place = rng.randrange(1, len(word) - 1)
    letter, after = word[place], word[place + 1]
    slips = [
        word[:place] + word[place + 1 :],
        word[:place] + letter + word[place:],
        word[:place] + rng.choice(NEIGHBOURS[letter]) + word[place + 1 :],
    ]
    if letter != after:
        slips.append(word[:place] + after + letter + word[place + 2 :])
    return rng.choice(slips)


def _swapped(match: re.Match[str]) -> Edit:
    """The two groups in the wrong order."""
    return Edit(match.start(1), match.end(2), f"{match[2]} {match[1]}")


def _casual(text: str, rng: Random) -> str | None:
    edits = draw(substitutions(text, lexicon.CASUAL, rng), rng.randint(1, 3), rng)
    return apply(text, edits) if edits else None


def _chatty(text: str, rng: Random) -> str | None:
    if len(text.split()) < MIN_GRAMMAR_WORDS:
        return None
    return rng.choice(phrases.CHATTER) + uncapitalised(text)


def _shouted(text: str, rng: Random) -> str:
    """One to three long words in capitals."""
    edits = [Edit(m.start(), m.end(), m[0].upper()) for m in LONG_WORD.finditer(text)]
    return apply(text, draw(edits, rng.randint(1, 3), rng))


def _careless(text: str, rng: Random) -> str:
    """Small letters throughout and no full stop at the end; a small label gets a capital."""
    return (text.lower().rstrip(".") or text) if text != text.lower() else capitalised(text)


def _excited(text: str, rng: Random) -> str:
    """Full stops become other marks; a text without any gets one at its end."""
    marks = rng.choice(("!", "!!", "...", " :)", "?!"))
    return text[:-1] + marks if text[-1] in ".!" else text + marks

"""Errors of content: a wrong fact, and an unclear one."""

import json
import re
from random import Random

from mediphi.synthesize.corruption import lexicon, phrases
from mediphi.synthesize.corruption.edits import Edit, apply, cased, draw, substitutions
from mediphi.synthesize.corruption.reasoning import negate
from mediphi.synthesize.corruption.source import WORD, Source, words
from mediphi.synthesize.corruption.trees import (
    MAX_PHRASE_WORDS,
    Tree,
    edit_line,
    nodes,
    points,
    replaced,
    strings,
)

NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)\d+(?:[.,]\d+)*(?!\w)")
AMOUNT = re.compile(r"(?<![\w./-])\d+(?:[.,]\d+)*%?(?![\w/-])")
WORDS_PER_BLUR = 12


def factual_inaccuracy(tree: Tree, source: Source) -> Tree | None:
    """One fact is wrong: a number, side, direction or name exchanged for another of its kind.

    A label or choice becomes another allowed one; a term of a list becomes one from the pool or the
    input; a sentence without any of these is denied.
    """
    numbers = [place for place in nodes(tree) if isinstance(place[1], (bool, int, float))]
    if numbers and source.rng.random() < 0.5:
        path, value = source.rng.choice(numbers)
        return replaced(tree, path, _other_value(value, source))

    def edit(text: str) -> str | None:
        others = source.alternatives(text)
        if others:
            return source.rng.choice(others)
        edits = [
            *_numbers(text, source),
            *substitutions(text, lexicon.OPPOSITES, source.rng),
            *_names(text, source),
        ]
        return apply(text, draw(edits, 1, source.rng)) if edits else negate(text)

    changed = edit_line(tree, edit, source.rng)
    if changed is None and isinstance(tree, list) and not tree:
        return _added_label(source)
    return changed if changed is not None else _foreign_term(tree, source)


def ambiguity(tree: Tree, source: Source) -> Tree | None:
    """Precise words become vague: amounts, names, sides, and verbs that state something.

    One blur to twelve words. A label stands beside another one; a term gets a shrug.
    """
    rng = source.rng

    def edit(text: str) -> str | None:
        others = source.alternatives(text)
        if others:
            own, other = text.rstrip("."), rng.choice(others).rstrip(".")
            return rng.choice(phrases.OR_LABELS).format(own, other)
        if len(text.split()) <= MAX_PHRASE_WORDS and text[-1] not in ".!?":
            return rng.choice(phrases.SHRUGS).format(text)
        count = 1 + len(text.split()) // WORDS_PER_BLUR
        blurred = draw(_blurs(text, rng), count, rng)
        return apply(text, blurred) if blurred else None

    return edit_line(tree, edit, rng)


def _other_value(value: float, source: Source) -> float | bool:
    if isinstance(value, bool):
        return not value
    return json.loads(_other_number(json.dumps(value), source))


def _numbers(text: str, source: Source) -> list[Edit]:
    return [
        Edit(m.start(), m.end(), _other_number(m[0], source))
        for m in NUMBER.finditer(text)
        if not text[m.end() :].startswith("%") or m[0] != "100"
    ]


def _other_number(number: str, source: Source) -> str:
    """One of the same form from the input, else the same with its last digits changed."""
    form = re.sub(r"\d", "0", number)
    pool = dict.fromkeys(NUMBER.findall(source.document))
    same = [n for n in pool if n != number and re.sub(r"\d", "0", n) == form and len(n) > 1]
    if same and source.rng.random() < 0.5:
        return source.rng.choice(same)
    if len(number.lstrip("-")) == 1:
        steps = {"0": "12", "1": "23"}.get(number[-1], "")
        return source.rng.choice(steps or (str(int(number) - 1), str(abs(int(number) - 2))))
    digits = [digit for digit in "0123456789" if digit != number[-1]]
    return number[:-1] + source.rng.choice(digits)


def _names(text: str, source: Source) -> list[Edit]:
    """Names told by their ending, for others of that kind in the input or the table."""
    edits = []
    for match in WORD.finditer(text):
        name = match[0].lower()
        for ending, members in lexicon.KINDS.items():
            if name.endswith(ending):
                near = [word for word in words(source.document) if word.endswith(ending)]
                others = [word for word in dict.fromkeys([*near, *members]) if word != name]
                other = cased(source.rng.choice(others), match[0])
                edits.append(Edit(match.start(), match.end(), other))
    return edits


def _foreign_term(tree: Tree, source: Source) -> Tree | None:
    """A short value becomes one that another output of the task holds."""
    own = {text.lower() for text in strings(tree)}
    foreign = [
        phrase
        for text in source.pool_strings
        for phrase in points(text).parts
        if phrase.lower() not in own and len(phrase.split()) <= MAX_PHRASE_WORDS
    ]
    return edit_line(tree, lambda text: _one_like(text, foreign, source.rng), source.rng)


def _one_like(text: str, phrases: list[str], rng: Random) -> str | None:
    short = len(text.split()) <= MAX_PHRASE_WORDS and text[-1] not in ".!?"
    return rng.choice(phrases) if short and phrases else None


def _added_label(source: Source) -> list[str] | None:
    """A list that should be empty names a label that the instruction allows."""
    labels = [text for text in source.pool_strings if text in source.instruction]
    return [source.rng.choice(labels)] if labels else None


def _blurs(text: str, rng: Random) -> list[Edit]:
    edits = substitutions(text, lexicon.HEDGES, rng)
    edits += [
        Edit(m.start(), m.end(), rng.choice(lexicon.VAGUE_AMOUNTS)) for m in AMOUNT.finditer(text)
    ]
    for pattern, vague in lexicon.VAGUE_NAMES:
        for match in re.finditer(pattern, text, re.IGNORECASE):
            edits.append(Edit(match.start(), match.end(), cased(rng.choice(vague), match[0])))
    return edits

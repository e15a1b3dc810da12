"""Errors of reading: the right kind of answer, about something else in the input."""

import re

from mediphi.synthesize.corruption.source import Source, overlap
from mediphi.synthesize.corruption.trees import (
    MAX_PHRASE_WORDS,
    Tree,
    edit_line,
    points,
    strings,
)

MAX_NEIGHBOURS = 3
MAX_LIKENESS = 0.6
"""Overlap from which on a neighbouring sentence says what the output says already."""
_STOPWORDS = """
a an and are as at be by for from had has have in is it no not of on or the this to was were with
"""
STOPWORDS = frozenset(_STOPWORDS.split())


def misinterpretation(tree: Tree, source: Source) -> Tree | None:
    """Answers about what stands beside it: an input sentence next to the one that was meant.

    A term copied from the input is exchanged for the words next to it. Labels, and outputs that
    have no place in the input, are left alone.
    """
    rng = source.rng

    def edit(text: str) -> str | None:
        if len(text.split()) > MAX_PHRASE_WORDS or text[-1] in ".!?":
            return _neighbour_sentence(text, source)
        return None if source.alternatives(text) else _neighbour_words(text, tree, source)

    return edit_line(tree, edit, rng)


def _neighbour_sentence(text: str, source: Source) -> str | None:
    """One sentence of the text for an input sentence next to the one that it resembles most."""
    parts, joiner = points(text)
    given = source.sentences
    places = [place for place, part in enumerate(parts) if part[-1] in ".!?"]
    if len(given) < 2 or not places:
        return None
    place = source.rng.choice(places)
    likeness = [overlap(parts[place], sentence) for sentence in given]
    meant = likeness.index(max(likeness))
    near = [
        given[i]
        for i in range(max(0, meant - 2), min(len(given), meant + 3))
        if i != meant and overlap(given[i], text) < MAX_LIKENESS
    ]
    if not near:
        return None
    parts[place] = source.rng.choice(near)
    return joiner.join(parts)


def _neighbour_words(text: str, tree: Tree, source: Source) -> str | None:
    """As many words as the term has, right before or after it in the input."""
    place = source.document.lower().find(text.lower())
    if place < 0:
        return None
    size = min(MAX_NEIGHBOURS, len(text.split()))
    taken = {value.lower() for value in strings(tree)}
    before = re.split(r"[.;:,()\n]", source.document[:place])[-1].split()
    after = re.split(r"[.;:,()\n]", source.document[place + len(text) :])[0].split()
    windows = [_trimmed(before[-size - 1 :]), _trimmed(after[: size + 1])]
    near = [window for window in windows if len(window) > 3 and window.lower() not in taken]
    return source.rng.choice(near) if near else None


def _trimmed(window: list[str]) -> str:
    """Without small words at either end."""
    while window and window[0].lower() in STOPWORDS:
        window = window[1:]
    while window and window[-1].lower() in STOPWORDS:
        window = window[:-1]
    return " ".join(window)

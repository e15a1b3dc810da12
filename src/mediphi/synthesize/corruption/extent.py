"""Errors of extent: too much, too little, the wrong share, a part missing."""

import re
from typing import Any

from mediphi.synthesize.corruption import lexicon, phrases
from mediphi.synthesize.corruption.edits import Edit, apply, draw, substitutions, uncapitalised
from mediphi.synthesize.corruption.source import Source, overlap
from mediphi.synthesize.corruption.trees import (
    MAX_PHRASE_WORDS,
    Tree,
    edit_line,
    edit_parts,
    points,
)

GROWTH = 1.3
"""An over-verbose line has at least this many times the words."""
MIN_BRIEF_WORDS = 6
MAX_KEPT = 0.7
"""Share of the words that a cut line keeps at most."""
MIN_KEPT_WORDS = 2
PART_FIRST = 0.7
"""How often a whole point goes where a member of an enumeration could go too."""
ENUMERATION = re.compile(r", (?=\w)[^,.;:()]{2,40}(?=,)(?=[^.;:]*,? (?:and|or) )")
CONJUNCT = re.compile(r",? (?:and|or) (?:[\w'-]+ ){0,3}[\w'-]+(?=[.;]|$)")
CLAUSE = re.compile(
    r"(?:,|;|:)? (?:which|who|because|but|although|while|so that|after|when|that|as|since|and|with"
    r"|for|in|of|to|without|due to|by|on|from|is|are|at)\b|[,;:] "
)
DEFINED = re.compile(r"^[^:]{1,40}: ")


def partial_correctness(tree: Tree, source: Source) -> Tree | None:
    """One of several points is missing: an item, a sentence, or a member of an enumeration."""
    rng = source.rng

    def drop_one(parts: list[Any]) -> list[Any] | None:
        answers = [place for place, part in enumerate(parts) if not _is_question(part)]
        if not answers:
            return None
        del parts[rng.choice(answers)]
        return parts

    def drop_member(text: str) -> str | None:
        if len(text.split()) <= MAX_PHRASE_WORDS:
            return None
        spots = [*ENUMERATION.finditer(text), *CONJUNCT.finditer(text)]
        if not spots:
            return None
        spot = rng.choice(spots)
        return text[: spot.start()] + text[spot.end() :]

    changed = edit_parts(tree, drop_one, rng) if rng.random() < PART_FIRST else None
    if changed is None:
        changed = edit_line(tree, drop_member, rng)
    return changed if changed is not None else edit_parts(tree, drop_one, rng)


def over_verbosity(tree: Tree, source: Source) -> Tree | None:
    """Padding until a line has 1.3 times its words: prefaces, asides, repeats, inflated phrases.

    Nothing new is said. A label or term is wrapped into a needless sentence.
    """
    rng = source.rng

    def edit(text: str) -> str:
        if len(text.split()) <= MAX_PHRASE_WORDS and text[-1] not in ".!?":
            templates = phrases.LONG_LABELS if text == tree else phrases.LONG_TERMS
            return rng.choice(templates).format(text)
        padded = text
        moves = rng.sample(range(4), 4)
        for turn in range(40):
            padded = _pad(padded, text, moves[turn % 4], source)
            if len(padded.split()) >= GROWTH * len(text.split()):
                break
        return padded

    return edit_line(tree, edit, rng)


def brevity(tree: Tree, source: Source) -> Tree | None:
    """Only the beginning is left: the first third of a list, the first sentence, the first clause.

    At most 70 % of the words stay. A label or a term cannot be cut.
    """

    def first_third(parts: list[Any]) -> list[Any]:
        count = -(-len(parts) // 3)
        while count < len(parts) and _is_question(parts[count - 1]):
            count += 1
        return parts[:count]

    cut = edit_parts(tree, first_third, source.rng)
    return cut if cut is not None else edit_line(tree, _first_clause, source.rng)


def unbalanced_detail(tree: Tree, source: Source) -> Tree | None:
    """One point swells with a sentence of the input, another shrinks to its clause or is dropped.

    Needs two points in the output and an input sentence that the output does not hold yet.
    """
    rng = source.rng

    def edit(parts: list[Any]) -> list[Any] | None:
        if not all(isinstance(part, str) for part in parts):
            return None
        said = " ".join(parts)
        fresh = [s for s in source.sentences if overlap(s, said) < 0.8]
        if not fresh:
            return None
        grown, cut = rng.sample(range(len(parts)), 2)
        detail = max(fresh, key=lambda sentence: overlap(sentence, parts[grown]))
        parts[grown] = _with_detail(parts[grown], detail)
        shorter = _first_clause(parts[cut])
        parts[cut : cut + 1] = [shorter] if shorter else []
        return parts

    return edit_parts(tree, edit, rng)


def _is_question(part: Any) -> bool:
    """Some answers begin with their question; alone it would be no answer."""
    return isinstance(part, str) and part.rstrip().endswith("?")


def _with_detail(point: str, detail: str) -> str:
    if point[-1:] in (".", "!", "?"):
        return f"{point} {detail}"
    return f"{point} ({uncapitalised(detail).rstrip('.')})"


def _first_clause(text: str) -> str | None:
    """First sentence if the text has more, else what stands before a clause in its first 70 %."""
    limit = MAX_KEPT * len(text.split())
    sentences = points(text).parts
    if len(sentences) > 1 and sentences[0][-1] in ".!" and len(sentences[0].split()) <= limit:
        return sentences[0]
    if len(text.split()) < MIN_BRIEF_WORDS:
        return None
    heading = DEFINED.match(text)
    least = MIN_KEPT_WORDS + (len(heading[0].split()) if heading else 0)
    lengths = {m.start(): len(text[: m.start()].split()) for m in CLAUSE.finditer(text)}
    ends = [end for end, length in lengths.items() if least <= length <= limit]
    if not ends:
        return None
    return text[: ends[-1]].rstrip(",;: ") + (text[-1] if text[-1] in ".!?" else "")


def _pad(text: str, original: str, move: int, source: Source) -> str:
    rng = source.rng
    text = text if text[-1] in ".!?:" else f"{text}."
    if move == 0:
        return f"{rng.choice(phrases.PREFACES)} {text}"
    if move == 1:
        return f"{text} {rng.choice(phrases.CLOSINGS)}"
    if move == 2:
        sentence = rng.choice(points(original).parts)
        return f"{text} {rng.choice(phrases.RESTATEMENTS)}{uncapitalised(sentence)}"
    inflated = substitutions(text, lexicon.PADDED, rng)
    aside = f", {rng.choice(phrases.ASIDES)}"
    stops = [Edit(m.start(), m.start(), aside) for m in re.finditer(r"(?<=[a-z])\.(?= |$)", text)]
    return apply(text, [*draw(inflated, 2, rng), *draw(stops, 1, rng)])

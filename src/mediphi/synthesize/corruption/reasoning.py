"""Errors of reasoning: conclusions that do not follow, and reasons that are none."""

import re
from random import Random

from mediphi.synthesize.corruption import lexicon, phrases
from mediphi.synthesize.corruption.edits import (
    apply,
    capitalised,
    draw,
    substitutions,
    uncapitalised,
)
from mediphi.synthesize.corruption.source import Source, words
from mediphi.synthesize.corruption.trees import (
    MAX_PHRASE_WORDS,
    Tree,
    edit_line,
    nodes,
    points,
    replaced,
)

ENDS = (("head", "tail"), ("subject", "object"), ("source", "target"), ("cause", "effect"))
TRIPLE = re.compile(r"(.+?)( \| .+? \| | -+> )(.+)")
CAUSE = re.compile(r"(.{8,}?),? because ([^.]{8,}?)(\.?)")
AUXILIARY = re.compile(
    r"\b(is|are|was|were|has|have|had|can|could|may|might|will|would|should|must|does|do|did)\b"
    r"( not)?(?! (?:no|never)\b)"
)
REASON = re.compile(
    r"(?:,|;)? (?:because|since|due to|as a result of|given|which|although|though|but|however"
    r"|suggesting|indicating|based on|secondary to|owing to|in view of|while|with|after)\b[^.;]*"
)
STATEMENT = re.compile(r"(?:\S+\s+){4,}\S+\.")
"""Five words: a heading or a finding in two words is no conclusion."""
COPYING_TASKS = frozenset(
    (
        "abbreviation expansion",
        "aspect-oriented keyword extraction",
        "named entity recognition",
        "text expansion",
        "text simplification",
    )
)
MIN_REASONED_WORDS = 8
MIN_CLUE_LETTERS = 6
_NO_CLUES = """
through before should because between during without another further however although therefore
within answer question abstract premise hypothesis statement meaning methods results background
objective conclusion doctor patient patients please either neither whether having others
"""
NO_CLUES = frozenset(_NO_CLUES.split())


def logical_flaws(tree: Tree, source: Source) -> Tree | None:
    """Cause and effect change places, a conclusion contradicts what was said, or does not follow.

    Relations have their ends exchanged. A label or a list of terms holds no reasoning to break.
    """
    rng = source.rng
    ends = _exchange_ends(tree, rng)
    if ends is not None:
        return ends

    def edit(text: str) -> str | None:
        flaws = [_reverse, _reconnect, _contradict, _leap]
        for flaw in rng.sample(flaws, len(flaws)):
            changed = flaw(text, rng)
            if changed is not None:
                return changed
        return None

    return edit_line(tree, edit, rng)


def simplistic_reasoning(tree: Tree, source: Source) -> Tree | None:
    """Reasons and conditions are cut; what is left rests on one word that the input mentions.

    A label gets that word as its only reason. Outputs that copy or rewrite the input state none.
    """
    rng = source.rng
    if source.task_type in COPYING_TASKS:
        return None
    if isinstance(tree, str) and _is_label(tree, source):
        template = rng.choice(phrases.SHALLOW_LABELS)
        clue = _clue(tree, source)
        return template.format(tree.rstrip("."), clue) if clue else None

    def edit(text: str) -> str | None:
        clue = _clue(text, source)
        if len(text.split()) < MIN_REASONED_WORDS or text[-1] != "." or not clue:
            return None
        sentences = [s for s in points(text).parts if s[-1] != "?"]
        kept = sentences if len(sentences) == 1 else rng.choice((sentences[:-1], sentences[-1:]))
        bare = [REASON.sub("", s) if len(REASON.sub("", s).split()) >= 4 else s for s in kept]
        if bare == sentences:
            return None
        return f"{' '.join(bare)} {rng.choice(phrases.SHALLOW).format(clue)}"

    return edit_line(tree, edit, rng)


def negate(text: str) -> str | None:
    """The sentence with its first auxiliary denied, or no longer denied; None without one."""
    match = AUXILIARY.search(text)
    if match is None:
        return None
    new = match[1] if match[2] else f"{match[1]} not"
    return text[: match.start()] + new + text[match.end() :]


def _exchange_ends(tree: Tree, rng: Random) -> Tree | None:
    places = [
        (path, node, first, second)
        for path, node in nodes(tree)
        if isinstance(node, dict)
        for first, second in ENDS
        if {first, second} <= node.keys() and node[first] != node[second]
    ]
    if not places:
        return None
    path, node, first, second = rng.choice(places)
    return replaced(tree, path, node | {first: node[second], second: node[first]})


def _reverse(text: str, rng: Random) -> str | None:
    """`Y because X` from `X because Y`; the first and last of a triple change places."""
    triple = TRIPLE.fullmatch(text)
    if triple:
        return f"{triple[3]}{triple[2]}{triple[1]}"
    cause = CAUSE.fullmatch(text)
    if cause is None:
        return None
    return f"{capitalised(cause[2])} because {uncapitalised(cause[1])}{cause[3]}"


def _reconnect(text: str, rng: Random) -> str | None:
    """A connective says the opposite."""
    if text[-1] == "?":
        return None
    edits = draw(substitutions(text, lexicon.CAUSAL, rng), 1, rng)
    return apply(text, edits) if edits else None


def _contradict(text: str, rng: Random) -> str | None:
    """A last sentence that denies one of the others, drawn as if it followed from them."""
    stated = [s for s in points(text).parts if s[-1] == "." and s.split()[0] and negate(s)]
    if not stated:
        return None
    denied = negate(rng.choice(stated))
    return f"{text} {rng.choice(phrases.CONTRARY)}{uncapitalised(denied or '')}"


def _leap(text: str, rng: Random) -> str | None:
    """An earlier sentence comes last, as a conclusion from those that it does not follow from."""
    parts = points(text).parts
    if len(parts) < 2 or not all(STATEMENT.fullmatch(part) for part in parts):
        return None
    moved = parts.pop(rng.randrange(len(parts) - 1))
    return f"{' '.join(parts)} {rng.choice(phrases.LEAPS)}{uncapitalised(moved)}"


def _is_label(text: str, source: Source) -> bool:
    short = len(text.split()) <= MAX_PHRASE_WORDS and "\n" not in text
    return short and bool(source.alternatives(text))


def _clue(text: str, source: Source) -> str | None:
    """A long word of the input, one that the output does not hold if there is any."""
    given = dict.fromkeys(words(source.document))
    long = [w for w in given if len(w) >= MIN_CLUE_LETTERS and w.isalpha() and w not in NO_CLUES]
    fresh = [word for word in long if word not in words(text)]
    return f"'{source.rng.choice(fresh or long)}'" if long else None

"""An output as a tree of values: plain text is a single string, JSON is what it parses to.

Rules never see brackets or quotes. They ask for one line of text, or for one list of parts, and get
another one when they refuse it.
"""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

from mediphi.synthesize.sentences import split_sentences

Tree = Any
"""A JSON value; a plain text is a string."""

Path = tuple[str | int, ...]

LIST_MARK = re.compile(r"^\s*(?:[-*•·]\s+|\(?\d{1,2}[.)]\s+)?")
NUMBERED = re.compile(r"(\s*\(?)\d{1,2}([.)]\s+)")
MAX_PHRASE_WORDS = 6


class Parts(NamedTuple):
    """Points of a text and what stands between them."""

    parts: list[str]
    joiner: str


def is_json(output: str, output_format: str) -> bool:
    """Whether the output is meant as JSON and is JSON; NaN and Infinity are not."""
    if output_format != "json":
        return False
    try:
        json.dumps(json.loads(output), allow_nan=False)
    except ValueError:
        return False
    return True


def decode(output: str) -> Tree:
    return json.loads(output)


def encode(tree: Tree, *, like: str) -> str:
    """JSON in the layout of another one: its indent, its blanks, its escapes."""
    margin = re.search(r"\n([ \t]+)", like)
    blank = re.search(r'":(\s?)', like)
    colon = f":{blank[1]}" if blank else ": "
    spread = bool(margin) or re.search(r",\s", like) or not re.search(r'[\]}"\d],', like)
    return json.dumps(
        tree,
        indent=margin[1] if margin else None,
        separators=("," if margin or not spread else ", ", colon),
        ensure_ascii="\\u" in like,
    )


def nodes(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Tree]]:
    """Every value with the keys that lead to it, parents first."""
    yield path, tree
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, child in children:
        yield from nodes(child, (*path, key))


def strings(tree: Tree) -> list[str]:
    """All string values in order."""
    return [node for _, node in nodes(tree) if isinstance(node, str)]


def replaced(tree: Tree, path: Path, value: Tree) -> Tree:
    """A copy of the tree with another value at that place."""
    if not path:
        return value
    copy: Tree = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def edit_line(tree: Tree, edit: Callable[[str], str | None], rng: Random) -> Tree | None:
    """Change one line of one string, longer ones more often; marks of a list stay in place."""
    places = [
        (path, number, line)
        for path, node in nodes(tree)
        if isinstance(node, str)
        for number, line in enumerate(node.split("\n"))
        if LIST_MARK.sub("", line, count=1).strip()
    ]
    for path, number, line in shuffled(places, [len(line) for *_, line in places], rng):
        text = LIST_MARK.sub("", line, count=1).rstrip()
        changed = edit(text)
        if changed is not None and changed.split() != text.split():
            lines = at(tree, path).split("\n")
            lines[number] = line.replace(text, changed, 1)
            return replaced(tree, path, "\n".join(lines))
    return None


def edit_parts(tree: Tree, edit: Callable[[list], list | None], rng: Random) -> Tree | None:
    """Change one list of at least two: an array, or the points of a text."""
    places = [(path, node) for path, node in nodes(tree) if isinstance(node, (list, str))]
    weights = [len(json.dumps(node)) for _, node in places]
    for path, node in shuffled(places, weights, rng):
        parts, joiner = (node, "") if isinstance(node, list) else points(node)
        changed = edit(list(parts)) if len(parts) > 1 else None
        if changed and changed != parts:
            value = changed if isinstance(node, list) else join(Parts(changed, joiner))
            return replaced(tree, path, value)
    return None


def points(text: str) -> Parts:
    """Lines, else sentences, else phrases between semicolons or commas; else the whole text."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1:
        return Parts(lines, "\n\n" if text.count("\n\n") >= len(lines) - 1 else "\n")
    sentences = split_sentences(text)
    if len(sentences) > 1:
        return Parts(sentences, "  " if re.search(r"[.!?]  \S", text) else " ")
    for joiner in ("; ", ", ") if text[-1:] not in (".", "!", "?") else ():
        phrases = text.split(joiner)
        if len(phrases) > 1 and all(1 <= len(p.split()) <= MAX_PHRASE_WORDS for p in phrases):
            return Parts(phrases, joiner)
    return Parts([text], "")


def join(points: Parts) -> str:
    """The text of its points; a numbered list is numbered anew, so that a gap does not show."""
    parts = points.parts
    if all(NUMBERED.match(part) for part in parts):
        parts = [NUMBERED.sub(rf"\g<1>{n}\g<2>", part, count=1) for n, part in enumerate(parts, 1)]
    return points.joiner.join(parts)


def at(tree: Tree, path: Path) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def shuffled(items: list, weights: list[int], rng: Random) -> list:
    """Drawn one after the other by weight (Efraimidis & Spirakis 2006, algorithm A)."""
    keys = [rng.random() ** (1 / max(weight, 1)) for weight in weights]
    order = sorted(range(len(items)), key=lambda i: -keys[i])
    return [items[i] for i in order]

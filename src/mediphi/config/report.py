"""The error report of a config: one line a problem, in the user's words.

A line is `key=value: what is allowed; did you mean key?`. Pydantic's and OmegaConf's own messages
speak of unions, tags and structs, which a user never wrote.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mediphi.config.keys import A_SECTION, BY_NAME, Keys

MAX_VALUE = 60
SURE = 0.8
"""Likeness from which on another key is suggested where little else speaks for it."""
NO_SECTION = ("dict_type", "model_type", "model_attributes_type")
"""Pydantic's errors of a plain value in the place of a section."""
SECRET_KEY = re.compile(r"(^|[._\-/+])(\w*_)?(api_?key|key|token|password|passwd|secret)$", re.I)
"""Keys whose value is never echoed; `*_tokens` counts tokens and is no secret."""


def show(key: str, value: object) -> str:
    """`value` on one short line; a secret's is hidden."""
    if SECRET_KEY.search(key):
        return "***"
    text = value if isinstance(value, str) else json.dumps(_without_secrets(value), default=str)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _without_secrets(value: object) -> object:
    if isinstance(value, dict):
        return {
            k: "***" if SECRET_KEY.search(str(k)) else _without_secrets(v) for k, v in value.items()
        }
    return [_without_secrets(v) for v in value] if isinstance(value, list) else value


def line(key: str, value: object, allowed: str, near: str | None = None) -> str:
    """One problem; `value` is `...` where there is none to show."""
    head = key if value is ... else f"{key}={show(key, value)}"
    return f"{head}: {allowed}" + (f"; did you mean {near}?" if near else "")


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word most like `word`, or None when nothing is near."""
    words = sorted(set(known))
    matches = difflib.get_close_matches(word, words, n=1, cutoff=cutoff)
    matches += [k for k in words if word and k.startswith(word)]
    return matches[0] if matches else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key most like `key`: the same leaf elsewhere, a sibling, or any near one."""
    known = sorted(set(known), key=lambda k: (k.count("."), k))
    leaf = key.rpartition(".")[2]
    if elsewhere := [k for k in known if k.rpartition(".")[2] == leaf]:
        return elsewhere[0]
    return _nearest_sibling(key, known) or nearest(key, known, cutoff=SURE)


def _nearest_sibling(key: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    found = nearest(leaf, siblings, cutoff=cutoff)
    return siblings[found] if found else None


def render(error: Mapping[str, Any], plain: object, keys: Keys) -> str:
    """The line of one pydantic error dictionary.

    Args:
        error: an item of `ValidationError.errors()`.
        plain: the config that was validated, to tell keys from the tags of unions.
        keys: that this config may have.
    """
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    key = dotted(error["loc"], plain)
    if kind == "missing":
        return line(key, ..., "missing, and it has no default")
    if kind == "extra_forbidden":
        if whose := keys.foreign.get(key):
            return line(key, value, whose, _nearest_sibling(key, keys.known, cutoff=SURE))
        return line(key, value, "unknown key", nearest_key(key, keys.known))
    if kind == "union_tag_invalid":
        options = re.findall(r"'([^']+)'", ctx["expected_tags"])
        near = nearest(ctx["tag"], options)
        return line(f"{key}.kind", ctx["tag"], f"allowed: {', '.join(options)}", near)
    if kind == "union_tag_not_found":
        return line(f"{key}.kind", ..., _no_kind(key, plain, keys))
    if kind == "literal_error":
        options = re.findall(r"'([^']+)'", ctx["expected"])
        near = nearest(value, options) if isinstance(value, str) else None
        return line(key, value, f"allowed: {', '.join(options)}", near)
    if kind in NO_SECTION:
        return line(key, value, keys.known.get(key) or A_SECTION)
    return line(key, value, _wants(kind, value, ctx) or error["msg"])


def render_all(errors: Iterable[Mapping[str, Any]], plain: object, keys: Keys) -> list[str]:
    """A line for every key; of a union each member says what it wants."""
    lines: dict[str, str] = {}
    for error in errors:
        key, text = dotted(error["loc"], plain), render(error, plain, keys)
        head = line(key, error["input"], "")
        is_member = key in lines and text.startswith(head) and lines[key].startswith(head)
        lines[key] = f"{lines[key]}, or {text[len(head) :]}" if is_member else text
    return list(lines.values())


def dotted(loc: Sequence[str | int], plain: object) -> str:
    """`loc` as the dotted key a user would write, without the tags of unions."""
    parts: list[str] = []
    node: Any = plain
    for part in loc:
        if isinstance(node, dict) and part not in node and node.get("kind") == part:
            continue
        if isinstance(part, str) and not isinstance(node, dict) and node is not None:
            continue  # a member of a union of plain values
        if part == "[key]":
            break
        parts.append(str(part))
        if isinstance(node, dict):
            node = node.get(part)
        else:
            node = node[part] if isinstance(node, list) and isinstance(part, int) else None
    return ".".join(parts)


def broken(key: str, allowed: str, plain: object) -> str:
    """The line of a rule between keys; `key` is the one to change."""
    return line(key, _at(plain, key), allowed)


def _at(plain: object, key: str) -> Any:
    """The value of a dotted key; `...` where there is none."""
    node: Any = plain
    for part in key.split("."):
        node = node.get(part, ...) if isinstance(node, dict) else ...
    return node


def _no_kind(key: str, plain: object, keys: Keys) -> str:
    """A section without a kind; one of several by name may have been meant for another config."""
    parent, _, name = key.rpartition(".")
    if keys.known.get(parent) != BY_NAME:
        return "missing, it says which keys the others are"
    there = [n for n, one in _at(plain, parent).items() if isinstance(one, dict) and "kind" in one]
    return (
        f"missing; {parent} has {', '.join(there) or 'nothing'}: leave out what sets {name} "
        "(an override, the experiment), or give it a kind"
    )


def _wants(kind: str, value: object, ctx: Mapping[str, Any]) -> str | None:
    bounds = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<"}
    bounds["less_than_equal"] = "<="
    if kind in bounds:
        return f"must be {bounds[kind]} {next(iter(ctx.values()))}"
    if kind.startswith("int_"):
        if isinstance(value, float) and value.is_integer():
            return f"must be a whole number, write {int(value)}"
        return "must be a whole number"
    if kind == "string_type":
        quoted = isinstance(value, int | float) and not isinstance(value, bool)
        return "must be text" + (f", write \"'{value}'\"" if quoted else "")
    if kind == "string_pattern_mismatch":
        return f"must match {ctx['pattern']}"
    return {
        "float_type": "must be a number",
        "float_parsing": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "bool_parsing": "must be true or false",
        "tuple_type": "must be a list",
        "too_short": f"must have at least {ctx.get('min_length')} entry",
        "string_too_short": "must not be empty",
    }.get(kind)

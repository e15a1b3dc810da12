"""The error report of a config: one line a problem, in the user's words.

A line is `key=value: what is allowed; did you mean key?`. Pydantic's and OmegaConf's own messages
speak of unions, tags and structs, which a user never wrote.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_VALUE = 60
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


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when nothing is near."""
    words = sorted(set(known))
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    matches += [k for k in words if word and k.startswith(word)]
    return matches[0] if matches else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key most like `key`: the same leaf elsewhere, a sibling, or any near one."""
    known = sorted(set(known), key=lambda k: (k.count("."), k))
    parent, _, leaf = key.rpartition(".")
    if elsewhere := [k for k in known if k.rpartition(".")[2] == leaf]:
        return elsewhere[0]
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if found := nearest(leaf, siblings):
        return siblings[found]
    return nearest(key, known)


def render(error: Mapping[str, Any], plain: object, known: Sequence[str]) -> str:
    """The line of one pydantic error dictionary.

    Args:
        error: an item of `ValidationError.errors()`.
        plain: the config that was validated, to tell keys from the tags of unions.
        known: every dotted key that this config may have.
    """
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    key = dotted(error["loc"], plain)
    if kind == "missing":
        return line(key, ..., "missing, and it has no default")
    if kind == "extra_forbidden":
        return line(key, value, "unknown key", nearest_key(key, known))
    if kind == "union_tag_invalid":
        options = re.findall(r"'([^']+)'", ctx["expected_tags"])
        near = nearest(ctx["tag"], options)
        return line(f"{key}.kind", ctx["tag"], f"allowed: {', '.join(options)}", near)
    if kind == "union_tag_not_found":
        return line(f"{key}.kind", ..., "missing, it says which keys the others are")
    if kind == "literal_error":
        options = re.findall(r"'([^']+)'", ctx["expected"])
        near = nearest(value, options) if isinstance(value, str) else None
        return line(key, value, f"allowed: {', '.join(options)}", near)
    return line(key, value, _wants(kind, value, ctx) or error["msg"])


def render_all(
    errors: Iterable[Mapping[str, Any]], plain: object, known: Sequence[str]
) -> list[str]:
    """A line for every key; of a union each member says what it wants."""
    lines: dict[str, str] = {}
    for error in errors:
        key, text = dotted(error["loc"], plain), render(error, plain, known)
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
    node: Any = plain
    for part in key.split("."):
        node = node.get(part, ...) if isinstance(node, dict) else ...
    return line(key, node, allowed)


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
        "dict_type": "must be a section with keys of its own",
        "model_type": "must be a section with keys of its own",
        "model_attributes_type": "must be a section with keys of its own",
        "too_short": f"must have at least {ctx.get('min_length')} entry",
        "string_too_short": "must not be empty",
    }.get(kind)

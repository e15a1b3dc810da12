"""Every key that a config may have, as the error report needs to know them."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from mediphi.config.strict import Strict

A_SECTION = "must be a section with keys of its own"
BY_NAME = "must be sections by name"
"""What a section wants whose keys are names of the user's choice."""


class Keys(NamedTuple):
    """Dotted keys, given the kinds that a config names.

    Attributes:
        known: a key that may be there -> what its value must be, where that is a section.
        foreign: a key that another kind of its section has -> whose it is.
    """

    known: dict[str, str]
    foreign: dict[str, str]


def keys_of(model: type[Strict], data: Any) -> Keys:
    """All keys of `data`, a plain config, good or not."""
    keys = Keys({}, {})
    _collect(keys, model, data, "")
    return keys


def sections_in(annotation: Any) -> Iterator[type[Strict]]:
    """The sections that a field may hold, itself or as values."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def of_its_kind(sections: list[type[Strict]], data: Any) -> list[type[Strict]]:
    """Those of `sections` that `data` can be by its `kind`; all where it names none of them."""
    if len(sections) == 1:
        return sections
    kind = data.get("kind") if isinstance(data, dict) else None
    return [section for section in sections if kind in _kinds(section)] or sections


def _collect(keys: Keys, model: type[Strict], data: Any, prefix: str) -> None:
    for name, field in model.model_fields.items():
        place = prefix + name
        value = data.get(name) if isinstance(data, dict) else None
        sections = list(sections_in(field.annotation))
        keys.known[place] = _wanted(field.annotation, sections)
        if get_origin(field.annotation) is not dict:
            _descend(keys, sections, value, place)
        elif isinstance(value, dict):
            for key, item in value.items():
                _descend(keys, sections, item, f"{place}.{key}")


def _descend(keys: Keys, sections: list[type[Strict]], data: Any, place: str) -> None:
    members = of_its_kind(sections, data)
    for section in members:
        _collect(keys, section, data, f"{place}.")
    others = {name for section in sections for name in section.model_fields}
    for name in others.difference(*(section.model_fields for section in members)):
        owners = [kind for s in sections if name in s.model_fields for kind in _kinds(s)]
        *first, last = owners
        whose = f"{', '.join(first)} and {last} have" if first else f"{last} has"
        one = "stage" if place == "stage" else "kind"
        keys.foreign[f"{place}.{name}"] = f"{one}={data['kind']} has no such key, {whose}"


def _wanted(annotation: Any, sections: list[type[Strict]]) -> str:
    if get_origin(annotation) is dict:
        return BY_NAME
    if len(sections) != 1:
        return A_SECTION if sections else ""
    null = "null or " if type(None) in get_args(annotation) else ""
    return f"must be {null}a section with keys {', '.join(sections[0].model_fields)}"


def _kinds(section: type[Strict]) -> tuple[Any, ...]:
    field = section.model_fields.get("kind")
    annotation = field.annotation if field else None
    return get_args(annotation) if get_origin(annotation) is Literal else ()

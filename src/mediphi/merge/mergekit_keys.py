"""Keys that mergekit would pass over in silence, by its own definitions of what it reads."""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from mediphi.config.report import nearest
from mediphi.errors import ConfigError
from mediphi.merge.mergekit_yaml import UNUSED


def check_keys(body: Any, config: Any) -> None:
    """Compare a file with what mergekit has read from it.

    Args:
        body: of the file, as YAML holds it.
        config: mergekit's `MergeConfiguration` of it.

    Raises:
        ConfigError: a key that mergekit does not know, a method that it does not have, or a
            parameter that the method does not take there; a line each.
    """
    from mergekit.merge_methods import registered_methods

    methods = {method.spec.name: method.spec for method in registered_methods()}
    name = config.merge_method
    if name not in methods:
        lines = [_line("merge_method", name, "method", methods)]
    else:
        lines = [*_unknown(body, config, "", methods[name])]
    if lines:
        raise ConfigError(list(dict.fromkeys(lines)))


def _unknown(raw: Any, read: Any, place: str, spec: Any) -> Iterator[str]:
    """Lines on what stands in `raw` and not in `read`; short forms, as a path, are let be."""
    if isinstance(read, BaseModel) and isinstance(raw, dict):
        known = type(read).model_fields
        for key, own in raw.items():
            if key not in known:
                yield _line(place, key, "key", known)
                continue
            inner = f"{place}.{key}" if place else key
            if key == "parameters":
                yield from _unknown_parameters(own, inner, spec, of_model="model" in known)
            yield from _unknown(own, getattr(read, key), inner, spec)
    elif isinstance(read, dict) and isinstance(raw, dict):
        for key, own in raw.items():
            yield from _unknown(own, read.get(key), f"{place}.{key}", spec)
    elif isinstance(read, list) and isinstance(raw, list):
        for number, (own, one) in enumerate(zip(raw, read, strict=False)):
            yield from _unknown(own, one, f"{place}[{number}]", spec)


def _unknown_parameters(settings: Any, place: str, spec: Any, *, of_model: bool) -> Iterator[str]:
    """mergekit reads those of all models nowhere but in the wider scopes."""
    everywhere = [own.name for own in spec.parameters]
    known = [own.name for own in spec.input_parameters] if of_model else everywhere
    for name in settings or ():
        if name in everywhere and name not in (*known, *UNUSED):
            yield f"merge.backend=mergekit: {place}.{name}: one for all models, not for one"
        elif name not in known and name not in UNUSED:
            yield _line(place, name, f"parameter of {spec.name}", known)


def _line(place: str, key: object, kind: str, known: Iterable[str]) -> str:
    near = nearest(str(key), known)
    hint = f"; did you mean {near}?" if near else ""
    where = f"{place}: " if place else ""
    allowed = ", ".join(known) or "none"
    return (
        f"merge.backend=mergekit: {where}unknown {kind} {str(key)!r:.80}; allowed: {allowed}{hint}"
    )

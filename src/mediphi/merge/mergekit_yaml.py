"""mergekit's YAML, read into a `Merge`.

Slices that cut all models alike become `layers` of conditionals. What we do not merge
(other methods, slices that move layers about, other tokenizers) is left to
`merge.backend=mergekit`, which gets the file as it is.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from mediphi.config.merging import Merge
from mediphi.config.methods import METHODS
from mediphi.errors import ConfigError
from mediphi.merge.headers import Header, read_header

MAX_BYTES = 1_000_000
TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
MERGEKITS = ("modules", "tokenizer", "tokenizer_source", "chat_template")
SLICE = ("sources", "parameters")
SLICE_MERGEKITS = ("base_model", "residual_weight")
SOURCE = ("model", "layer_range", "parameters")
CONDITIONAL = ("value", "filter")
MAX_LAYERS = 10_000
MAX_VALUES = 100_000
"""In a file whose aliases are written out."""
LONGEST = 300
"""Characters of a problem that are shown."""
UNUSED = ("int8_mask",)
"""A parameter that changes mergekit's memory, not its result."""

THEIR_DENSITY = 1.0
"""mergekit's default of breadcrumbs; ours is the paper's. No other default differs."""

TAKEN = "base"
"""A name that no model gets: it is the base model's."""

Range = tuple[int, int]


class Recipe(NamedTuple):
    """What a file says.

    Attributes:
        num_layers: of the merged model, where the file cuts it into slices; else None.
        header: of a file that we wrote; else None.
    """

    merge: Merge
    num_layers: int | None
    header: Header | None = None


class Slice(NamedTuple):
    """Layers `[first, end)` of all models, or all of them; settings by model, and of the slice."""

    layers: Range | None
    own: dict[str, dict[str, Any]]
    shared: dict[str, Any]


def read_mergekit(path: Path) -> Recipe:
    """The merge that a file tells, judged as if it stood in a config of ours.

    Raises:
        ConfigError: the file cannot be read, or says what only mergekit can do; in one line each.
    """
    text = _text(path)
    body = _mapping(_load(path, text), str(path))
    header = read_header(text, str(path))
    _known_keys(body, TOP, str(path), mergekits=MERGEKITS)
    slices = list(_slices(path, body))
    method = str(body.get("merge_method"))
    base, folders = _base_and_models(path, body, slices)
    whole = _settings(body, str(path))
    if method.startswith("breadcrumbs"):
        whole["density"] = _completed(whole.get("density"), THEIR_DENSITY)
    names = short_names(folders)
    own = {f: _joined([(one.layers, one.own.get(f, {})) for one in slices]) for f in folders}
    values = {
        "method": method,
        "base": base,
        "models": {names[f]: {"path": f, "parameters": own[f]} for f in folders},
        "parameters": _joined([(s.layers, s.shared) for s in slices], below=whole),
        "dtype": None
        if header and header.own_dtypes
        else body.get("out_dtype") or body.get("dtype"),
        "semantics": header.semantics if header else "mergekit",
    }
    try:
        merge = Merge.model_validate(values)
    except ValidationError as error:
        reasons = dict.fromkeys(_reasons(error))
        raise ConfigError([f"{path}: {_one_line(reason)}" for reason in reasons]) from None
    return Recipe(merge, slices[-1].layers[1] if slices[-1].layers else None, header)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refused(path, f"larger than {MAX_BYTES} bytes, not a merge")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _refused(path, "not UTF-8 text") from None
    except OSError as error:
        raise _refused(path, f"merge.config cannot be read: {error.strerror}") from None


def _load(path: Path, text: str) -> Any:
    try:
        loader = yaml.SafeLoader(text)
        if (node := loader.get_single_node()) is None:
            return None
        if _num_values(node, {}) > MAX_VALUES:
            raise _refused(path, f"more than {MAX_VALUES} values, its aliases (*name) written out")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "not YAML"
        place = f"{path}:{mark.line + 1 if mark else 1}"
        raise ConfigError([f"{place}: {_one_line(what)}"]) from None
    except (ValueError, RecursionError) as error:  # a date that is none; thousands of brackets
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _refused(path, f"not a merge: {why}") from None


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes in and below `node` with its aliases written out, each counted once only."""
    if id(node) not in known:
        known[id(node)] = math.inf  # of what holds itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        below = [one for pair in pairs for one in pair]
        below += node.value if isinstance(node, yaml.SequenceNode) else ()
        known[id(node)] = 1 + sum(_num_values(one, known) for one in below)
    return known[id(node)]


def _refused(where: Path | str, why: str) -> ConfigError:
    return ConfigError([f"{where}: {_one_line(why)}"])


def _one_line(text: str) -> str:
    """The file's own words may hold anything."""
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(where, "must be keys with values")
    return {str(key): own for key, own in value.items()}


def _known_keys(
    body: Mapping[str, Any], known: Sequence[str], where: str, *, mergekits: Sequence[str] = ()
) -> None:
    """Refuse other keys than those `known`; `mergekits` are allowed without a value."""
    if unknown := [key for key in body if key not in (*known, *mergekits)]:
        raise _refused(where, f"unknown key {unknown[0]}; allowed: {', '.join(known)}")
    for key in mergekits:
        if body.get(key) is not None and (key, body[key]) != ("tokenizer_source", "base"):
            raise _refused(where, f"{key} is mergekit's alone: merge.backend=mergekit")


def _base_and_models(
    path: Path, body: Mapping[str, Any], slices: Sequence[Slice]
) -> tuple[str | None, list[str]]:
    """Folders of the base, None where the method has none, and of the models, which all slices
    must have, as mergekit takes them."""
    base = None if body.get("base_model") is None else _folder(path, body["base_model"])
    method = METHODS.get(str(body.get("merge_method")))
    models = list(slices[0].own)
    if method is not None and method.base == "none":
        if base is not None and body.get("slices") is None and base not in models:
            models.append(base)
        base = None
    for number, one in enumerate(slices):
        where = f"{path}: slices[{number}]"
        if one.own.keys() != slices[0].own.keys():
            raise _refused(where, "has other models than slices[0]: merge.backend=mergekit")
        if method is not None and base is not None and one.layers and base not in one.own:
            why = f"lacks the base model {base}, which mergekit refuses, too: list it in sources"
            raise _refused(where, why)
    return base, [folder for folder in models if folder != base]


def _folder(path: Path, reference: Any) -> str:
    """mergekit names a model by text, `folder+adapter`, or by nested keys."""
    while isinstance(reference, dict):
        if reference.get("lora") or reference.get("override_architecture"):
            raise _refused(path, "models with adapters are mergekit's alone: merge them first")
        reference = reference.get("model", reference.get("path"))
    if not isinstance(reference, str) or not reference:
        raise _refused(path, "a model must be a folder")
    if "+" in reference and not _exists(reference):
        raise _refused(path, f"{reference}: models with adapters are mergekit's alone")
    return reference


def _exists(folder: str) -> bool:
    try:
        return Path(folder).exists()
    except OSError:  # a name that is too long
        return False


def _slices(path: Path, body: Mapping[str, Any]) -> Iterator[Slice]:
    if (body.get("models") is None) == (body.get("slices") is None):
        raise _refused(path, "give models or slices")
    if (models := body.get("models")) is not None:
        yield Slice(None, _sources(path, models, place="models"), {})
        return
    if not isinstance(body["slices"], list) or not body["slices"]:
        raise _refused(path, "slices must be a list")
    end = 0
    for number, one in enumerate(body["slices"]):
        where = f"{path}: slices[{number}]"
        section = _mapping(one, where)
        _known_keys(section, SLICE, where, mergekits=SLICE_MERGEKITS)
        sources = _sources(path, section.get("sources"), place=f"slices[{number}].sources")
        ranges = {_layer_range(one.get("layer_range"), where) for one in section["sources"]}
        layers = next(iter(ranges))
        if len(ranges) != 1 or layers[0] != end or layers[1] <= end:
            raise _refused(where, "moves layers about: mergekit's alone: merge.backend=mergekit")
        end = layers[1]
        yield Slice(layers, sources, _settings(section, where))


def _layer_range(value: Any, where: str) -> Range:
    whole = isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)
    if not whole or not all(0 <= one <= MAX_LAYERS for one in value):
        raise _refused(where, "layer_range must be [first, end), two whole numbers")
    return value[0], value[1]


def _sources(path: Path, sources: Any, *, place: str) -> dict[str, dict[str, Any]]:
    if not isinstance(sources, list) or not sources:
        raise _refused(path, f"{place} must be a list of models")
    found: dict[str, dict[str, Any]] = {}
    for number, one in enumerate(sources):
        where = f"{path}: {place}[{number}], a model"
        section = _mapping(one, where)
        _known_keys(section, SOURCE, where)
        folder = _folder(path, section.get("model"))
        if folder in found:
            raise _refused(where, f"{folder} is listed twice, which mergekit refuses, too")
        found[folder] = _settings(section, where)
    return found


def _settings(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters of a part of the file; of conditionals only the keys that mergekit knows."""
    found = _mapping(section.get("parameters") or {}, f"{where}: parameters")
    for name, setting in found.items():
        place = f"{where}: parameters.{name}"
        for entry in setting if isinstance(setting, list) else [setting]:
            if isinstance(entry, dict):
                _known_keys(_mapping(entry, where), CONDITIONAL, place)
            if entry is None or (isinstance(entry, dict) and entry.get("value", 0) is None):
                raise _refused(place, "the value is missing")
    return found


def _joined(
    parts: Sequence[tuple[Range | None, Mapping[str, Any]]], below: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings of one scope over all slices; `below` are those of the next wider scope."""
    wider = below or {}
    names = dict.fromkeys([name for _, own in parts for name in own] + list(wider))
    joined: dict[str, Any] = {}
    for name in names:
        if name in UNUSED:
            continue
        scopes = [(layers, own.get(name)) for layers, own in parts]
        scopes += [(layers, wider.get(name)) for layers, _ in parts]
        entries = [e for layers, setting in scopes for e in _entries(setting, layers)]
        plain = len(entries) == 1 and entries[0].keys() == {"value"}
        joined[name] = entries[0]["value"] if plain else tuple(entries)
    return joined


def _entries(setting: Any, layers: Range | None) -> Iterator[dict[str, Any]]:
    """A setting as conditionals."""
    if setting is None:
        return
    entries = [setting] if isinstance(setting, dict) else setting
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        entries = [{"value": setting}]
    for entry in entries:
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if v is not None}
        yield own | ({"layers": layers} if layers else {})


def _completed(setting: Any, default: float) -> Any:
    """A setting of the whole file with the value that it has where no conditional fits."""
    entries = list(_entries(setting, None))
    is_whole = any(entry.get("filter", "*") == "*" for entry in entries)
    return setting if is_whole else [*entries, {"value": default}]


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """A short name for every folder: its last part, with a number where that is taken."""
    found: dict[str, str] = {}
    taken, numbers = {TAKEN}, Counter[str]()
    for folder in folders:
        path = Path(folder)
        name = path.parent.name if path.name == "model" and path.parent.name else path.name
        name = name.replace(".", "_") or "model"
        free = name
        while free in taken:
            numbers[name] += 1
            free = f"{name}_{numbers[name] + 1}"
        taken.add(free)
        found[folder] = free
    return found


def _reasons(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        broken = item.get("ctx", {}).get("broken", ())
        yield from (f"{rule.key}: {rule.allowed}" for rule in broken)
        if broken:
            continue
        loc = [str(part) for part in item["loc"]]
        named = 4 if loc[0] == "models" else 2
        if "parameters" in loc[named - 2 : named - 1]:  # told once for all types of the union
            must = "must be a number, a list of numbers, or a list of {value, filter}"
            yield f"{'.'.join(loc[:named])}: {must}"
        else:
            yield f"{'.'.join(loc[:3])}: {item['msg']}"

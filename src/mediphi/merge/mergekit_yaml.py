"""mergekit's YAML, read into a `Merge` and written from one.

Slices that cut all models alike become `layers` of conditionals, and back. What we do not merge
(other methods, slices that move layers about, other tokenizers) is left to
`merge.backend=mergekit`, which gets the file as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from mediphi.config.merging import Conditional, Merge, Setting, Settings
from mediphi.config.methods import METHODS
from mediphi.errors import ConfigError
from mediphi.merge.settings import place_of, resolve

MAX_BYTES = 1_000_000
TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
MERGEKITS = ("modules", "tokenizer", "tokenizer_source", "chat_template")
SLICE = ("sources", "parameters")
SOURCE = ("model", "layer_range", "parameters")
UNUSED = ("int8_mask",)
"""A parameter that changes mergekit's memory, not its result."""

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""Tensors of a decoder that belong to no layer: a gradient gives them its first number."""
THEIR_DENSITY = 1.0
"""mergekit's default of breadcrumbs; ours is the paper's."""

Range = tuple[int, int]


class Recipe(NamedTuple):
    """What a file says.

    Attributes:
        num_layers: of the merged model, where the file cuts it into slices; else None.
    """

    merge: Merge
    num_layers: int | None


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
    body = _mapping(_load(path), str(path))
    _known_keys(body, (*TOP, *MERGEKITS), str(path))
    for key in MERGEKITS:
        if body.get(key) is not None and (key, body[key]) != ("tokenizer_source", "base"):
            raise _refused(path, f"{key} is mergekit's alone: merge.backend=mergekit")
    base = None if body.get("base_model") is None else _folder(path, body["base_model"])
    slices = list(_slices(path, body))
    folders = list(dict.fromkeys(folder for one in slices for folder in one.own))
    method = str(body.get("merge_method"))
    if method in METHODS and METHODS[method].base == "none":
        folders += [base] if base and base not in folders else []
        base = None
    folders = [folder for folder in folders if folder != base]
    whole = _mapping(body.get("parameters") or {}, f"{path}: parameters")
    if method.startswith("breadcrumbs"):
        whole.setdefault("density", THEIR_DENSITY)
    names = short_names(folders)
    own = {f: _joined([(one.layers, one.own.get(f, {})) for one in slices]) for f in folders}
    values = {
        "method": method,
        "base": base,
        "models": {names[f]: {"path": f, "parameters": own[f]} for f in folders},
        "parameters": _joined([(s.layers, s.shared) for s in slices], below=whole),
        "dtype": body.get("out_dtype") or body.get("dtype"),
    }
    try:
        merge = Merge.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{path}: {text}" for text in _reasons(error)]) from None
    return Recipe(merge, slices[-1].layers[1] if slices[-1].layers else None)


def write_mergekit(
    merge: Merge, *, base: Path | None, models: Mapping[str, Path], num_layers: int, dtype: str
) -> str:
    """The same merge in mergekit's YAML, with float32 arithmetic.

    Args:
        base, models: the folders with weights.
        num_layers: of the models.
        dtype: of the written weights.
    """
    if (merge.method or "").startswith("breadcrumbs") and "density" not in merge.parameters:
        density = METHODS["breadcrumbs"].parameter("density").default
        stated = {**merge.parameters, "density": density}
        merge = merge.model_copy(update={"parameters": stated})
    own = {str(models[name]): model.parameters for name, model in merge.models.items()}
    body: dict[str, Any] = {"merge_method": merge.method}
    if base is not None:
        body["base_model"] = str(base)
    cuts = _cuts([merge.parameters, *own.values()], num_layers)
    if len(cuts) == 2:
        body["models"] = [_entry(folder, settings) for folder, settings in own.items()]
        body["parameters"] = _plain(merge.parameters)
    else:
        inputs = own | ({} if base is None or str(base) in own else {str(base): {}})
        body["slices"] = [
            {
                "sources": [
                    {"layer_range": list(layers), **_entry(folder, _cut(s, layers, num_layers))}
                    for folder, s in inputs.items()
                ],
                "parameters": _plain(_cut(merge.parameters, layers, num_layers)),
            }
            for layers in pairwise(cuts)
        ]
    body |= {"dtype": "float32", "out_dtype": dtype}
    return yaml.safe_dump({k: v for k, v in body.items() if v != {}}, sort_keys=False)


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refused(path, f"larger than {MAX_BYTES} bytes, not a merge")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise _refused(path, "aliases (*name) are not allowed, write it out")
        return yaml.safe_load(text)
    except UnicodeDecodeError:
        raise _refused(path, "not UTF-8 text") from None
    except OSError as error:
        raise _refused(path, f"merge.config cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "not YAML"
        raise ConfigError([f"{path}:{mark.line + 1 if mark else 1}: {what}"]) from None


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError([f"{path}: {why}"])


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError([f"{where}: must be keys with values"])
    return {str(key): own for key, own in value.items()}


def _known_keys(body: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := [key for key in body if key not in known]:
        raise ConfigError([f"{where}: unknown key {unknown[0]}; allowed: {', '.join(known)}"])


def _folder(path: Path, reference: Any) -> str:
    """mergekit names a model by text, `folder+adapter`, or by nested keys."""
    while isinstance(reference, dict):
        if reference.get("lora") or reference.get("override_architecture"):
            raise _refused(path, "models with adapters are mergekit's alone: merge them first")
        reference = reference.get("model", reference.get("path"))
    if not isinstance(reference, str) or not reference:
        raise _refused(path, "a model must be a folder")
    if "+" in reference and not Path(reference).exists():
        raise _refused(path, f"{reference}: models with adapters are mergekit's alone")
    return reference


def _slices(path: Path, body: Mapping[str, Any]) -> Iterator[Slice]:
    if (body.get("models") is None) == (body.get("slices") is None):
        raise _refused(path, "give models or slices")
    if (models := body.get("models")) is not None:
        yield Slice(None, _sources(path, models), {})
        return
    end = 0
    for number, one in enumerate(body["slices"]):
        where = f"{path}: slices[{number}]"
        section = _mapping(one, where)
        _known_keys(section, SLICE, where)
        ranges = {tuple(_mapping(s, where).get("layer_range") or ()) for s in section["sources"]}
        layers = next(iter(ranges))
        if len(ranges) != 1 or len(layers) != 2 or layers[0] != end or layers[1] <= end:
            raise ConfigError(
                [f"{where}: moves layers about: mergekit's alone: merge.backend=mergekit"]
            )
        end = layers[1]
        shared = _mapping(section.get("parameters") or {}, where)
        yield Slice(layers, _sources(path, section["sources"]), shared)


def _sources(path: Path, sources: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(sources, list) or not sources:
        raise _refused(path, "models and sources must be lists")
    found: dict[str, dict[str, Any]] = {}
    for one in sources:
        section = _mapping(one, f"{path}: a model")
        _known_keys(section, SOURCE, f"{path}: a model")
        found[_folder(path, section.get("model"))] = _mapping(
            section.get("parameters") or {}, f"{path}: parameters"
        )
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


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """A short name for every folder: its last part that tells it from the others."""
    found: dict[str, str] = {}
    for folder in folders:
        path = Path(folder)
        name = path.parent.name if path.name == "model" and path.parent.name else path.name
        name = name.replace(".", "_") or "model"
        taken = set(found.values())
        found[folder] = name if name not in taken else f"{name}_{len(taken)}"
    return found


def _reasons(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        broken = item.get("ctx", {}).get("broken", ())
        yield from (f"{rule.key}: {rule.allowed}" for rule in broken)
        if not broken:
            yield f"{'.'.join(map(str, item['loc'][:3]))}: {item['msg']}"


def _cuts(scopes: Sequence[Settings], num_layers: int) -> list[int]:
    """Where slices begin and end, so that inside one every conditional holds or does not."""
    cuts = {0, num_layers}
    for settings in scopes:
        for setting in settings.values():
            for entry in _conditionals(setting):
                cuts |= {min(int(end), num_layers) for end in entry.get("layers", ())}  # type: ignore[union-attr]
    return sorted(cuts)


def _conditionals(setting: Setting) -> tuple[Conditional, ...]:
    is_list = isinstance(setting, tuple) and setting and isinstance(setting[0], dict)
    return setting if is_list else ()  # type: ignore[return-value]


def _cut(settings: Settings, layers: Range, num_layers: int) -> Settings:
    """What `settings` say within `layers`."""
    return {
        name: cut
        for name, setting in settings.items()
        if (cut := _cut_setting(setting, layers, num_layers)) is not None
    }


def _cut_setting(setting: Setting, layers: Range, num_layers: int) -> Any:
    if not _conditionals(setting):
        return _spelled((0, num_layers), setting, layers, num_layers)
    entries: list[Any] = []
    for entry in _conditionals(setting):
        first, end = map(int, entry.get("layers", (0, num_layers)))  # type: ignore[arg-type]
        if first <= layers[0] and layers[1] <= end:
            value = _spelled((first, end), entry["value"], layers, num_layers)  # type: ignore[arg-type]
            if "filter" in entry and _is_spelled(value):
                wanted, (inside, outside) = str(entry["filter"]), value
                own = [name for name in OUTSIDE if wanted == "*" or wanted in name]
                entries += [{"value": outside["value"], "filter": name} for name in own]
                entries.append({"value": inside["value"], "filter": wanted})
            elif "filter" in entry:
                entries.append({"value": value, "filter": entry["filter"]})
            else:
                entries += value if _is_spelled(value) else [{"value": value}]
    return entries or None


def _spelled(over: Range, value: Any, layers: Range, num_layers: int) -> Any:
    """A gradient over the layers of `over`, as numbers for each of `layers`; others as they are."""
    if not isinstance(value, tuple) or (over == layers == (0, num_layers)):
        return list(value) if isinstance(value, tuple) else value
    gradient = ({"value": value, "layers": over},)
    inside = [
        resolve(gradient, place_of(f"layers.{layer}.", num_layers=num_layers))
        for layer in range(*layers)
    ]
    return [{"value": inside, "filter": "layers."}, {"value": value[0]}]


def _is_spelled(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


def _entry(folder: str, settings: Settings) -> dict[str, Any]:
    plain = _plain(settings)
    return {"model": folder, **({"parameters": plain} if plain else {})}


def _plain(value: Any) -> Any:
    """Lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, tuple | list) else value

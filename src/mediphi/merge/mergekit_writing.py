"""A `Merge`, written in mergekit's YAML: `layers` of conditionals become slices."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mediphi.config.merging import Conditional, Merge, Setting, Settings
from mediphi.config.methods import METHODS
from mediphi.merge.settings import place_of, resolve

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""Tensors of a decoder that belong to no layer: a gradient gives them its first number."""

Range = tuple[int, int]


def write_mergekit(
    merge: Merge, *, base: Path | None, models: Mapping[str, Path], num_layers: int, dtype: str
) -> str:
    """The same merge in mergekit's YAML, with float32 arithmetic.

    Args:
        base, models: the folders with weights.
        num_layers: of the models.
        dtype: of the written weights.
    """
    if merge.method == "uniform_soup":  # mergekit has no word for it
        merge = merge.model_copy(update={"method": "linear", "parameters": {"weight": 1.0}})
    if (merge.method or "").startswith("breadcrumbs"):
        stated = {**merge.parameters, "density": _whole_density(merge.parameters.get("density"))}
        merge = merge.model_copy(update={"parameters": stated})
    own = [(str(models[name]), model.parameters) for name, model in merge.models.items()]
    body: dict[str, Any] = {"merge_method": merge.method}
    if base is not None:
        body["base_model"] = str(base)
    cuts = _cuts([merge.parameters, *(settings for _, settings in own)], num_layers)
    if len(cuts) == 2:
        whole = (0, num_layers)
        body["models"] = [_entry(folder, _cut(s, whole, num_layers)) for folder, s in own]
        body["parameters"] = _plain(_cut(merge.parameters, whole, num_layers))
    else:
        if base is not None and str(base) not in dict(own):
            own.append((str(base), {}))
        body["slices"] = [
            {
                "sources": [
                    {"layer_range": list(layers), **_entry(folder, _cut(s, layers, num_layers))}
                    for folder, s in own
                ],
                "parameters": _plain(_cut(merge.parameters, layers, num_layers)),
            }
            for layers in pairwise(cuts)
        ]
    body |= {"dtype": "float32", "out_dtype": dtype}
    return yaml.safe_dump({k: v for k, v in body.items() if v != {}}, sort_keys=False)


def _whole_density(setting: Setting | None) -> Any:
    """With our default where no conditional fits: mergekit has another one."""
    default = METHODS["breadcrumbs"].parameter("density").default
    if setting is None:
        return default
    entries = _conditionals(setting)
    return (*entries, {"value": default}) if entries else setting


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
            if entry.get("filter", "*") == "*":
                break  # nothing after it is ever reached
    if len(entries) == 1 and entries[0].keys() == {"value"}:
        return entries[0]["value"]
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

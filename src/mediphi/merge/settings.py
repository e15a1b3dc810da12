"""What a parameter of a merge is for one tensor: numbers, gradients over layers, conditionals.

The rules are mergekit's, so that its YAML means the same here: a gradient runs from the first layer
to the last; embeddings count to the first layer, the final norm and the head to the last, and both
take a gradient's first number; of several conditionals the first counts that fits; where none fits,
the next wider scope speaks, at last the method's default.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mediphi.config.merging import Merge, Setting, Settings
from mediphi.config.methods import METHODS, Parameter
from mediphi.errors import DataError, UserError

Values = Mapping[str, float | bool | tuple[float, ...]]
"""Parameter -> its value; of a parameter that each model has for itself one number per model."""

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
EMBEDDING = re.compile(r"embed|(^|\.)wte\.|(^|\.)wpe\.")


class Place(NamedTuple):
    """Where a tensor stands.

    Attributes:
        layer: its layer; of embeddings 0, of what follows the layers the last one.
        in_layer: whether it belongs to a layer.
    """

    name: str
    layer: int
    in_layer: bool
    num_layers: int


def place_of(name: str, *, num_layers: int) -> Place:
    """Where the tensor of that name stands in a model of so many layers."""
    found = LAYER.search(name)
    if found:
        return Place(name, int(found[1]), True, num_layers)
    return Place(name, 0 if EMBEDDING.search(name) else num_layers - 1, False, num_layers)


def resolve(setting: Setting, place: Place) -> float | bool | None:
    """The value of a setting for a tensor; None where no conditional fits."""
    return _resolve(setting, place, (0, place.num_layers))


def _resolve(setting: Setting, place: Place, layers: tuple[int, int]) -> float | bool | None:
    if not isinstance(setting, tuple):
        return setting
    if not isinstance(setting[0], dict):
        return _gradient(setting, _share(place, layers))  # type: ignore[arg-type]
    for entry in setting:
        first, end = map(int, entry.get("layers", layers))  # type: ignore[union-attr,arg-type]
        wanted = entry.get("filter", "*")  # type: ignore[union-attr]
        if first <= place.layer < end and (wanted == "*" or str(wanted) in place.name):
            return _resolve(entry["value"], place, (first, end))  # type: ignore[index]
    return None


def _share(place: Place, layers: tuple[int, int]) -> float:
    """How far through `layers` a tensor stands, from 0 to 1."""
    if not place.in_layer:
        return 0.0
    first, end = layers
    return (place.layer - first) / (end - first - 1) if end - first > 1 else 1.0


def _gradient(values: Sequence[float | bool], share: float) -> float | bool:
    """Linear between the neighbouring numbers; of switches the one at or before."""
    at = share * (len(values) - 1)
    low = int(at)
    if isinstance(values[0], bool):
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (at - low)) * values[low] + (at - low) * values[high]


def check_layers(merge: Merge, *, num_layers: int) -> None:
    """Refuse `layers` beyond the models' last one.

    Raises:
        UserError: naming the key.
    """
    scopes = {f"merge.models.{name}.parameters": m.parameters for name, m in merge.models.items()}
    for place, settings in ({"merge.parameters": merge.parameters} | scopes).items():
        for name, setting in settings.items():
            for entry in setting if isinstance(setting, tuple) else ():
                layers = entry.get("layers", (0, 0)) if isinstance(entry, dict) else (0, 0)
                first, end = map(int, layers)  # type: ignore[arg-type]
                if end > num_layers:
                    raise UserError(
                        f"{place}.{name}: layers=[{first}, {end}]: the models have {num_layers} "
                        f"layers; allowed: [first, end) with end up to {num_layers}"
                    )


def values_of(merge: Merge, *, num_layers: int) -> Callable[[str], Values]:
    """The values of every parameter of `merge.method`, by the name of a tensor.

    Raises:
        DataError: (when called) no conditional fits a tensor, and the method has no default.
    """
    assert merge.method is not None
    parameters = METHODS[merge.method].parameters
    own = [model.parameters for model in merge.models.values()]

    def values(name: str) -> Values:
        place = place_of(name, num_layers=num_layers)
        return {
            p.name: tuple(float(_value(p, (one, merge.parameters), place)) for one in own)
            if p.per_model
            else _value(p, (merge.parameters,), place)
            for p in parameters
        }

    return values


def _value(parameter: Parameter, scopes: Sequence[Settings], place: Place) -> float | bool:
    for scope in scopes:
        if parameter.name in scope:
            value = resolve(scope[parameter.name], place)
            if value is not None:
                return _whole(parameter, value, place)
    if parameter.default is None:
        raise DataError(
            f"merge.parameters.{parameter.name}: no entry fits {place.name}; "
            "add one without filter and layers"
        )
    return parameter.default


def _whole(parameter: Parameter, value: float | bool, place: Place) -> float | bool:
    """A gradient between whole numbers passes others."""
    if parameter.is_whole and not float(value).is_integer():
        raise DataError(
            f"merge.parameters.{parameter.name}: {value:g} for {place.name}; whole numbers only: "
            "give one number in place of the gradient"
        )
    return value

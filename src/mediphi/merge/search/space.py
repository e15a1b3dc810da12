"""What a search moves: some parameters of a merge method, within bounds.

A candidate has two faces. The strategy sees a point of the unit cube, one coordinate after the
other; everybody else sees its genome, `{"weight/pubmed": 0.31, "lambda": 1.05}`, rounded, so that
equal candidates are equal to the last bit, also after JSON.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mediphi.config.methods import METHODS, Method, Parameter
from mediphi.errors import UserError

Genome = Mapping[str, float]
Value = float | bool | tuple[float, ...]
Given = float | bool | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Coordinate:
    """One number that the search moves.

    Attributes:
        model: whose it is; None: it belongs to all models.
        group: layer group, from 0; None: one value for all layers.
        low, high: bounds, both included.
        start: where the search begins.
    """

    parameter: str
    model: str | None
    group: int | None
    low: float
    high: float
    start: float

    @property
    def name(self) -> str:
        """`density/pubmed@1`: parameter, model, layer group, as far as they are told apart."""
        of_model = "" if self.model is None else f"/{self.model}"
        return f"{self.parameter}{of_model}" + ("" if self.group is None else f"@{self.group}")

    def rounded(self, value: float, digits: int) -> float:
        """As it is evaluated: to that many decimals, and within the bounds."""
        return min(max(round(value, digits), self.low), self.high) + 0.0


@dataclass(frozen=True, slots=True)
class SpaceOptions:
    """What of a method is searched.

    Attributes:
        searched: parameters to move; None: all that the method's table gives bounds.
        fixed: values of parameters that are not moved, one for all models or one by model name;
            the others keep their default.
        bounds: (low, high) in place of those in the table.
        shared: parameters of each model that get one value for all models.
        start: where to begin, by coordinate without its layer group (`weight/pubmed`, `lambda`);
            what is not named begins as in mergekit-evolve. What lies outside of its bounds begins
            at the nearest.
        num_layer_groups: 1: one value for all layers; more: a value for each group of consecutive
            layers.
        digits: decimal places of a genome's numbers.
    """

    searched: Collection[str] | None = None
    fixed: Mapping[str, Given] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shared: Collection[str] = ()
    start: Mapping[str, float] = field(default_factory=dict)
    num_layer_groups: int = 1
    digits: int = 4


class Space:
    """The coordinates of a search over one method's parameters.

    Args:
        method: key of `METHODS`.
        models: names of the merged models, in order; the base is not among them.

    Raises:
        UserError: in one line, where the options do not fit the method.
    """

    def __init__(
        self, method: str, models: Sequence[str], options: SpaceOptions | None = None
    ) -> None:
        self.options = options or SpaceOptions()
        self.method, self.models = _method(method, models), tuple(models)
        self.searched = _searched(self.method, self.options)
        self.fixed = {
            own.name: self._fixed(own) for own in self.method.parameters if own not in self.searched
        }
        self.coordinates = tuple(self._coordinates())
        self._low = np.array([own.low for own in self.coordinates])
        self._high = np.array([own.high for own in self.coordinates])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the coordinates, in the order of a point's numbers."""
        return tuple(own.name for own in self.coordinates)

    @property
    def start(self) -> NDArray[np.float64]:
        """Where a search begins, `[coordinates]` in the unit cube.

        As the options say, else as in mergekit-evolve: weights 1 over the number of models, other
        parameters their default, 1 where they have none; all brought within the bounds.
        """
        return self.encode({own.name: own.start for own in self.coordinates})

    def decode(self, point: NDArray[np.float64]) -> dict[str, float]:
        """The genome of a point `[coordinates]`; what lies outside of the cube is brought to it."""
        share = np.clip(point, 0.0, 1.0)
        inside = self._low * (1 - share) + self._high * share  # exact at both ends
        return self.rounded(dict(zip(self.names, inside.tolist(), strict=True)))

    def encode(self, genome: Genome) -> NDArray[np.float64]:
        """The point `[coordinates]` of a genome; `decode` gives the same genome back."""
        values = np.array([genome[name] for name in self.names])
        return np.clip((values - self._low) / (self._high - self._low), 0.0, 1.0)

    def rounded(self, genome: Genome) -> dict[str, float]:
        """A genome as it is evaluated and recorded: in order, rounded, within the bounds."""
        return {
            own.name: own.rounded(genome[own.name], self.options.digits) for own in self.coordinates
        }

    def tensor_values(self, genome: Genome) -> tuple[dict[str, Value], ...]:
        """For each layer group all parameters of the method, as the operators take them.

        A parameter of each model is a tuple in the models' order.
        """
        return tuple(
            {own.name: self._value(own, genome, group) for own in self.method.parameters}
            for group in range(self.options.num_layer_groups)
        )

    def description(self) -> dict[str, Any]:
        """All that makes one space differ from another, as JSON takes it."""
        return {
            "method": self.method.name,
            "models": list(self.models),
            "coordinates": {c.name: [c.low, c.high, c.start] for c in self.coordinates},
            "fixed": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.fixed.items()
            },
            "digits": self.options.digits,
        }

    def _owners(self, own: Parameter) -> tuple[str | None, ...]:
        is_one = not own.per_model or own.name in self.options.shared
        return (None,) if is_one else self.models

    def _coordinates(self) -> list[Coordinate]:
        many = self.options.num_layer_groups > 1
        groups = range(self.options.num_layer_groups) if many else (None,)
        found = []
        for own in self.searched:
            low, high = _bounds(own, self.options)
            begin = 1 / len(self.models) if own.name == "weight" else own.default
            for model in self._owners(own):
                name = own.name if model is None else f"{own.name}/{model}"
                start = self.options.start.get(name, 1.0 if begin is None else float(begin))
                start = min(max(start, low), high)
                found += [Coordinate(own.name, model, group, low, high, start) for group in groups]
        return found

    def _value(self, own: Parameter, genome: Genome, group: int) -> Value:
        if own not in self.searched:
            return self.fixed[own.name]
        suffix = f"@{group}" if self.options.num_layer_groups > 1 else ""
        values = [
            genome[f"{own.name}{suffix}" if model is None else f"{own.name}/{model}{suffix}"]
            for model in self._owners(own)
        ]
        if not own.per_model:
            return values[0]
        return tuple(values * len(self.models) if len(values) == 1 else values)

    def _fixed(self, own: Parameter) -> Value:
        given = self.options.fixed.get(own.name, own.default)
        if given is None:
            raise UserError(
                f"merge method {self.method.name}: {own.name} is neither searched nor given; "
                f"give it a value or search it"
            )
        if not isinstance(given, Mapping):
            _refuse_outside(own, float(given))
            return (float(given),) * len(self.models) if own.per_model else given
        if not own.per_model or set(given) != set(self.models):
            raise UserError(
                f"merge method {self.method.name}: {own.name} has values for {_list(given)}; "
                f"allowed is {'one number' if not own.per_model else _list(self.models)}"
            )
        for value in given.values():
            _refuse_outside(own, value)
        return tuple(float(given[model]) for model in self.models)


def _method(name: str, models: Sequence[str]) -> Method:
    if name not in METHODS:
        raise UserError(f"merge method {name} is not known; there are {_list(METHODS)}")
    method = METHODS[name]
    most = len(models) if method.max_models is None else method.max_models
    if not method.min_models <= len(models) <= most or len(set(models)) < len(models):
        upper = "" if method.max_models is None else f" and at most {method.max_models}"
        raise UserError(
            f"merge method {name} was given models {_list(models)}; it takes at least "
            f"{method.min_models}{upper}, with names that differ"
        )
    return method


def _searched(method: Method, options: SpaceOptions) -> tuple[Parameter, ...]:
    """Parameters to move, in the table's order."""
    known = {own.name: own for own in method.parameters}
    named = [*(options.searched or ()), *options.fixed, *options.bounds, *options.shared]
    if wrong := [name for name in named if name not in known]:
        raise UserError(
            f"merge method {method.name} has no parameter {wrong[0]}; it has {_list(known)}"
        )
    if options.searched is None:
        found = [own for own in known.values() if own.searched and own.name not in options.fixed]
    else:
        found = [own for own in known.values() if own.name in options.searched]
    if not found:
        raise UserError(f"merge method {method.name}: nothing is left to search")
    if twice := [own.name for own in found if own.name in options.fixed]:
        raise UserError(f"{twice[0]} is both searched and fixed; leave it out of one of them")
    if options.num_layer_groups < 1 or not 1 <= options.digits <= 10:
        raise UserError(
            f"num_layer_groups={options.num_layer_groups} must be at least 1, "
            f"digits={options.digits} between 1 and 10"
        )
    return tuple(found)


def _bounds(own: Parameter, options: SpaceOptions) -> tuple[float, float]:
    given = options.bounds.get(own.name, own.searched)
    if given is None or own.is_switch:
        raise UserError(f"{own.name} has no bounds to search within; fix it or give its bounds")
    low, high = map(float, given)
    if not own.low <= low < high <= own.high:
        raise UserError(
            f"bounds of {own.name} are [{low:g}, {high:g}]; they must rise and lie within "
            f"[{own.low:g}, {own.high:g}]"
        )
    return low, high


def _refuse_outside(own: Parameter, value: float) -> None:
    if not math.isfinite(value) or not own.low <= value <= own.high:
        raise UserError(f"{own.name}={value:g} must lie within [{own.low:g}, {own.high:g}]")


def _list(names: Collection[str]) -> str:
    return ", ".join(names) or "none"

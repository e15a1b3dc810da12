"""Schema of a merge: which models, by which method, with which numbers."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    PositiveFloat,
    model_validator,
)

from mediphi.config.methods import METHODS, Method, Parameter, Semantics
from mediphi.config.report import nearest
from mediphi.config.strict import BrokenRule, Strict

Conditional = dict[str, str | float | bool | tuple[bool, ...] | tuple[float, ...]]
"""`value`, a number or a gradient, for tensors whose name contains `filter` and for layers
`[first, end)` of `layers`; either may be left out."""

_ALLOWED = "must be a finite number, true or false, a list of numbers or of {value, filter, layers}"


def _told_once(union: Any, handler: GetCoreSchemaHandler) -> Any:
    """One sentence for all members of the union, of which each would tell its own."""
    said = {"custom_error_type": "setting", "custom_error_message": _ALLOWED}
    return {**handler(union), **said}


Setting = Annotated[
    bool | float | tuple[bool, ...] | tuple[float, ...] | tuple[Conditional, ...],
    GetPydanticSchema(_told_once),
]
"""A number; a gradient, interpolated over the layers; or conditionals, of which the first counts
that fits. The forms of mergekit's YAML, with `layers` in place of its slices."""

LISTS = (tuple, list)
"""Rules are judged of plain JSON, too, where another rule or key is broken."""

Settings = dict[str, Setting]
DType = Literal["float32", "bfloat16", "float16"]


class MergedModel(Strict):
    """A model that is merged. Its parameters go before those of the whole merge."""

    path: Annotated[str, Field(min_length=1)]
    """Run directory or local folder with weights."""
    parameters: Settings = Field(default={})
    """Of this model; see `merge.parameters`."""


class Merge(Strict):
    """Which models become one, and how. A `config` in mergekit's YAML can say all of it."""

    method: str | None = None
    """Name of the method."""
    config: str | None = None
    """File in mergekit's YAML, instead of method, models, base and parameters."""
    base: str | None = None
    """Run directory or local folder of the base model; null: the one that all models were trained
    from, as their manifests say."""
    models: dict[str, MergedModel] = Field(default={})
    """The models by a name of your choice: `merge.models.medcode.path=runs/pit/...`."""
    parameters: Settings = Field(default={})
    """Of all models: a number, a list of numbers (a gradient over the layers), or a list of
    `{value, filter, layers}`."""
    semantics: Semantics = "mergekit"
    """Whose reading where mergekit and a method's paper differ (docs/merging.md)."""
    backend: Literal["mediphi", "mergekit"] = "mediphi"
    """mergekit: let it do the merge, for its other methods and as a check."""
    dtype: DType | None = None
    """Of the written weights; null: the base's. Arithmetic is always float32."""
    max_shard_gb: PositiveFloat = 5.0
    """Largest file of weights, in 1e9 bytes."""

    @model_validator(mode="after")
    def _keep_switches(self) -> Self:
        """A switch that was told as 0 or 1 is false or true from here on."""
        method = METHODS.get(self.method or "")
        for parameter in method.parameters if method else ():
            if parameter.is_switch and parameter.name in self.parameters:
                self.parameters[parameter.name] = _switched(self.parameters[parameter.name])
        return self

    def broken_rules(self) -> Iterator[BrokenRule]:
        if (self.method is None) == (self.config is None):
            yield BrokenRule("method", "give either a method (merge=slerp) or merge.config=FILE")
        elif self.config is not None:
            if self.models or self.parameters or self.base:
                key = "models" if self.models else "parameters" if self.parameters else "base"
                yield BrokenRule(key, "merge.config says it, leave it out here")
        else:
            yield from self._broken_by_method()

    def _broken_by_method(self) -> Iterator[BrokenRule]:
        assert self.method is not None
        method = METHODS.get(self.method)
        if method is None:
            if self.backend == "mergekit":
                yield from _broken_conditionals(self.parameters, "parameters")
                for name, model in self.models.items():
                    yield from _broken_conditionals(model.parameters, f"models.{name}.parameters")
                return
            near = nearest(self.method, METHODS)
            yield BrokenRule(
                "method",
                f"allowed: {', '.join(METHODS)}{f'; did you mean {near}?' if near else ''}; others "
                "by merge.backend=mergekit",
            )
            return
        if self.backend == "mergekit" and self.semantics == "paper":
            yield BrokenRule("semantics", "backend=mergekit has its own reading only")
        yield from _broken_counts(method, len(self.models))
        if method.base == "none" and self.base is not None:
            yield BrokenRule("base", f"{method.name} has none; list it among the models")
        for parameter in method.parameters:
            own = [m for m in self.models.values() if parameter.name in m.parameters]
            all_own = parameter.per_model and self.models and len(own) == len(self.models)
            if parameter.default is None and parameter.name not in self.parameters and not all_own:
                yield BrokenRule(
                    f"parameters.{parameter.name}", f"needs a value: {parameter.meaning}"
                )
        yield from _broken_settings(method, self.parameters, "parameters")
        for name, model in self.models.items():
            place = f"models.{name}.parameters"
            yield from _broken_settings(method, model.parameters, place, own=True)


def _switched(setting: Any) -> Any:
    if isinstance(setting, LISTS):
        return tuple(_switched(one) for one in setting)
    if isinstance(setting, dict):
        return setting | {"value": _switched(setting["value"])}
    return bool(setting)


def _broken_counts(method: Method, count: int) -> Iterator[BrokenRule]:
    most = method.max_models
    if count < method.min_models:
        yield BrokenRule(
            "models",
            f"{method.name} needs {method.min_models} or more; give "
            "merge.models.NAME.path=RUN_DIRECTORY for each",
        )
    elif most is not None and count > most:
        yield BrokenRule("models", f"{method.name} merges {most} with the base, here are {count}")


def _broken_settings(
    method: Method, settings: Mapping[str, Setting], place: str, *, own: bool = False
) -> Iterator[BrokenRule]:
    known = {parameter.name: parameter for parameter in method.parameters}
    for name, setting in settings.items():
        parameter = known.get(name)
        if parameter is None:
            near = nearest(name, known)
            allowed = f"{method.name} has {', '.join(known) or 'no parameter'}"
            yield BrokenRule(f"{place}.{name}", allowed + (f"; did you mean {near}?" * bool(near)))
        elif own and not parameter.per_model:
            yield BrokenRule(f"{place}.{name}", f"one for all models: merge.parameters.{name}")
        elif wrong := _wrong(parameter, setting):
            yield BrokenRule(f"{place}.{name}", wrong)


def _broken_conditionals(settings: Settings, place: str) -> Iterator[BrokenRule]:
    """Of a method that we do not know: only the form can be judged."""
    for name, setting in settings.items():
        for entry in setting if isinstance(setting, LISTS) else ():
            if isinstance(entry, dict) and (wrong := _wrong_form(entry)):
                yield BrokenRule(f"{place}.{name}", wrong)


def _wrong(parameter: Parameter, setting: Setting) -> str | None:
    """What a setting must be, if it is not."""
    if not isinstance(setting, LISTS):
        return _wrong_value(parameter, setting)
    if not setting:
        return "must have at least one entry"
    if isinstance(setting[0], dict):
        found = (_wrong_conditional(parameter, entry) for entry in setting)  # type: ignore[arg-type]
    else:
        found = (_wrong_value(parameter, value) for value in setting)  # type: ignore[arg-type]
    return next(filter(None, found), None)


def _wrong_conditional(parameter: Parameter, entry: Conditional) -> str | None:
    if wrong := _wrong_form(entry):
        return wrong
    value = entry["value"]
    return _wrong(parameter, value) if not isinstance(value, str) else "value must be a number"


def _wrong_form(entry: Conditional) -> str | None:
    if "value" not in entry or entry.keys() - {"value", "filter", "layers"}:
        return "an entry has value, and may have filter and layers"
    layers = entry.get("layers", (0, 1))
    if not (
        isinstance(layers, LISTS)
        and len(layers) == 2
        and all(float(one).is_integer() for one in layers)
        and 0 <= layers[0] < layers[1]
    ):
        return "layers must be [first, end), two whole numbers"
    if not isinstance(entry.get("filter", ""), str):
        return "filter must be text"
    return None


def _wrong_value(parameter: Parameter, value: object) -> str | None:
    if parameter.is_switch:
        return None if value in (False, True) else "must be true or false"  # so are 0 and 1
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number, a list of numbers, or a list of {value, filter, layers}"
    whole = "a whole number " if parameter.is_whole else ""
    is_fraction = parameter.is_whole and not float(value).is_integer()
    if is_fraction or not parameter.low <= value <= parameter.high:
        return f"must be {whole}from {parameter.low:g} to {parameter.high:g}: {parameter.meaning}"
    return None

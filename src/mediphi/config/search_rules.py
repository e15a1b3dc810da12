"""What a search asks of its merge, and of the names and numbers that it begins with."""

import re
from collections.abc import Iterator

from mediphi.config.merging import Merge, Setting
from mediphi.config.methods import METHODS, Method, Parameter
from mediphi.config.stages import SearchStage
from mediphi.config.strict import BrokenRule


def moved_parameters(stage: SearchStage, method: Method) -> list[Parameter]:
    """Those that `stage.searched` names, else `stage.grid`, else all that the table gives bounds
    for."""
    named = stage.searched or [re.split("[/@]", name)[0] for name in stage.grid]
    return [own for own in method.parameters if (own.name in named if named else own.searched)]


def broken_search(stage: SearchStage, merge: Merge) -> Iterator[BrokenRule]:
    """The rules between `stage` and `merge`."""
    searchable = [own.name for own in METHODS.values() if any(p.searched for p in own.parameters)]
    if merge.backend != "mediphi":
        yield BrokenRule("merge.backend", "a search builds its candidates itself; allowed: mediphi")
    if merge.config is not None:
        told = f"a search takes no file; say it here: merge={', '.join(searchable)}"
        yield BrokenRule("merge.config", told)
    elif merge.method in METHODS and merge.method not in searchable:
        told = f"has nothing to search; allowed: {', '.join(searchable)}"
        yield BrokenRule("merge.method", told)
    elif merge.method in METHODS:  # of any other the merge's own rules tell
        method = METHODS[merge.method]
        found = [*_broken_names(stage, method), *_broken_bounds(stage, method)]
        yield from found or _broken_starts(stage, merge, method)
        yield from _broken_strategy(stage, method)


def _broken_names(stage: SearchStage, method: Method) -> Iterator[BrokenRule]:
    numbers = [own.name for own in method.parameters if not own.is_switch]
    lists = {
        "searched": stage.searched or (),
        "bounds": stage.bounds,
        "grid": stage.grid,
        "one_for_all": stage.one_for_all,
    }
    for key, names in lists.items():
        for name in names:
            parameter = re.split("[/@]", name)[0] if key == "grid" else name
            if parameter not in numbers:
                at = f"{key}.{name}" if isinstance(names, dict) else key
                told = f"unknown parameter {name}; {method.name} has {', '.join(numbers)}"
                yield BrokenRule(f"stage.{at}", told)


def _broken_bounds(stage: SearchStage, method: Method) -> Iterator[BrokenRule]:
    for own in method.parameters:
        if own.is_switch or own.name not in stage.bounds:
            continue
        low, high = stage.bounds[own.name]
        if not own.low <= low < high <= own.high:
            told = f"must be [low, high] within {own.low:g} and {own.high:g}"
            yield BrokenRule(f"stage.bounds.{own.name}", told)


def _broken_starts(stage: SearchStage, merge: Merge, method: Method) -> Iterator[BrokenRule]:
    """A list has no place in a genome; only CMA-ES begins somewhere."""
    moved = moved_parameters(stage, method)
    for own in moved:
        rest = ",".join(other.name for other in moved if other is not own)
        low, high = stage.bounds.get(own.name, own.searched or (own.low, own.high))
        range_ = f"one number from {low:g} to {high:g}"
        is_shared = own.per_model and own.name in stage.one_for_all
        for key, value in _starts(merge, own, is_shared=is_shared).items():
            if is_shared and key.startswith("merge.models."):
                told = f"stage.one_for_all has one {own.name}; give merge.parameters.{own.name}"
                yield BrokenRule(key, told)
            elif not isinstance(value, int | float):
                keep = f", or leave {own.name} out: stage.searched=[{rest}]" if rest else ""
                yield BrokenRule(key, f"{own.name} is searched: give {range_}{keep}")
            elif stage.strategy == "cmaes" and not low <= value <= high:
                told = f"the search begins here: give {range_}, or set stage.bounds.{own.name}"
                yield BrokenRule(key, told)


def _starts(merge: Merge, own: Parameter, *, is_shared: bool) -> dict[str, Setting]:
    """By key, what is said of a parameter; not the merge's own where every model has its own."""
    name = own.name
    found = {
        f"merge.models.{model}.parameters.{name}": of_model.parameters[name]
        for model, of_model in merge.models.items()
        if name in of_model.parameters
    }
    if name in merge.parameters and (is_shared or len(found) < len(merge.models)):
        found[f"merge.parameters.{name}"] = merge.parameters[name]
    return found


def _broken_strategy(stage: SearchStage, method: Method) -> Iterator[BrokenRule]:
    if stage.strategy == "grid" and not stage.grid:
        yield BrokenRule("stage.grid", "strategy=grid needs values: stage.grid.t=[0.1,0.25,0.5]")
    if stage.strategy == "greedy" and method.name != "linear":
        yield BrokenRule("stage.strategy", "greedy makes a soup: merge=linear")
    if stage.strategy != "grid" and stage.grid:
        yield BrokenRule("stage.grid", f"strategy={stage.strategy} has none; grid has")

"""From a genome to a merge: what the search moves takes the place of what the config says."""

from collections.abc import Sequence

from mediphi.config.merging import Conditional, Merge, Setting, Settings
from mediphi.merge.search.space import Genome, Space


def merge_of(merge: Merge, space: Space, genome: Genome, *, num_layers: int) -> Merge:
    """`merge` with the genome's values; what is not searched stays, gradients and filters too."""
    groups = space.tensor_values(genome)
    shared: Settings = dict(merge.parameters)
    models = dict(merge.models)
    for parameter in space.searched:
        values = [group[parameter.name] for group in groups]
        if not parameter.per_model:
            shared[parameter.name] = _setting(values, num_layers)  # type: ignore[arg-type]
            continue
        shared.pop(parameter.name, None)  # every model has its own now
        for place, name in enumerate(space.models):
            own = [of_models[place] for of_models in values]  # type: ignore[index]
            settings = models[name].parameters | {parameter.name: _setting(own, num_layers)}
            models[name] = models[name].model_copy(update={"parameters": settings})
    return merge.model_copy(update={"parameters": shared, "models": models})


def _setting(values: Sequence[float], num_layers: int) -> Setting:
    """One number, or one for each group of neighbouring layers."""
    if len(values) == 1:
        return values[0]
    ends = [float(number * num_layers // len(values)) for number in range(len(values) + 1)]
    entries: list[Conditional] = [
        {"value": value, "layers": (first, end)}
        for value, first, end in zip(values, ends[:-1], ends[1:], strict=True)
    ]
    return tuple(entries)

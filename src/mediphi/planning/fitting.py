"""Which changes would make a run fit: the combinations that are known, the cheapest first."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mediphi.config.schema import Config
from mediphi.config.stages import ChatStage, DpoStage, Lora
from mediphi.planning.plan import Change, Plan, Planner
from mediphi.strategies.memory import splits

DEVICES = (2, 4, 8)
"""Of a machine: numbers that are proposed where fewer are asked for."""


class Fit(NamedTuple):
    """A change, and the plan of the run with it."""

    change: Change
    plan: Plan


def cheapest_fit(planner: Planner) -> Fit | None:
    """The first combination that fits, or None.

    In order of cost: a smaller micro-batch, recomputed activations, the model split over the
    devices asked for, offload, more devices; and adapters after all of these.
    """
    run = planner.run
    savings = list(savings_of(run.config))
    layouts = list(layouts_of(run.config, on_gpu=run.device.type == "cuda"))
    for adapters in adapters_of(run.config):
        for layout in layouts:
            change = {**layout, **adapters}
            if _planned(planner, {**savings[-1], **change}) is None:
                continue  # nor does anything that saves less
            for saving in savings:
                plan = _planned(planner, {**saving, **change})
                if plan is not None:
                    return Fit({**saving, **change}, plan)
    return None


def savings_of(config: Config) -> Iterator[Change]:
    """What the devices asked for can do without sharing the model; the last saves most."""
    size = config.hardware.micro_batch
    sizes = [n for n in range(size, 0, -1) if size % n == 0]
    smaller: list[Change] = [{"hardware.micro_batch": n} if n < size else {} for n in sizes]
    yield from smaller
    if config.hardware.activation_checkpointing is not True:  # a plan's choice may be fewer layers
        for change in smaller:
            yield {**change, "hardware.activation_checkpointing": True}


def layouts_of(config: Config, *, on_gpu: bool) -> Iterator[Change]:
    """How the model can lie on devices; a CPU's processes share one memory, so only by splitting.

    A live reference cannot be split, and gives way to cached log-probabilities.
    """
    hardware, stage = config.hardware, config.stage
    yield {}
    needed: dict[str, Any] = {"hardware.compile": False} if hardware.compile else {}
    if isinstance(stage, DpoStage) and stage.reference == "live":
        yield (cached := {"stage.reference": "cached"})
        needed |= cached
    strategies = [hardware.strategy] if splits(hardware.strategy) else []
    strategies += [name for name in ("fsdp2", "zero3") if name not in strategies]
    more = [n for n in DEVICES if n > hardware.devices] if on_gpu else []
    for devices in (hardware.devices, *more):
        count = {"hardware.devices": devices} if devices > hardware.devices else {}
        if devices * hardware.num_nodes > 1:
            for name in strategies:
                other = {"hardware.strategy": name} if name != hardware.strategy else {}
                kept = {"hardware.offload": False} if hardware.offload and other else {}
                if count or other:
                    yield {**count, **other, **kept, **needed}
        if on_gpu and not hardware.offload:
            other = {"hardware.strategy": "zero3"} if hardware.strategy != "zero3" else {}
            yield {**count, **other, "hardware.offload": True, **needed}


def adapters_of(config: Config) -> Iterator[Change]:
    """None, and those that would be trained in place of all parameters: another training."""
    yield {}
    if isinstance(config.stage, ChatStage) and config.stage.lora is None:
        yield {"stage.lora.rank": Lora().rank}


def _planned(planner: Planner, change: Change) -> Plan | None:
    """The plan of the run with a change; None where it does not fit or cannot be."""
    changed = planner.changed(change)
    if changed is None:
        return None
    plan = planner.plan(changed)
    return plan if plan.fits else None

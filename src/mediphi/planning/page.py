"""The page that `check_only=true` prints."""

from collections.abc import Sequence
from typing import Any

from mediphi.budget import Budget
from mediphi.engine import Device
from mediphi.phases import PhasePlan
from mediphi.planning.memory import Memory
from mediphi.planning.plan import Change, Plan, Planner


def show_plan(planner: Planner, *, free_bytes: int) -> None:
    """Print memory, speed, time and disk of the planner's run, and what would make it fit."""
    run = planner.run
    plan = planner.plan()
    show_sizes(run.budget)
    show_phases(run.phases)
    where = "" if run.device.is_here else ", which is not here"
    print(
        f"device      {run.config.world_size} x {run.device.name}{where} ({run.device.precision})"
    )
    show_memory(plan.memory, available=plan.available, num_devices=run.config.hardware.devices)
    if recomputed := run.budget.recomputed_layers:
        layers = run.budget.model_config.num_hidden_layers
        print(f"            {recomputed} of {layers} layers are recomputed in backward")
    show_time(plan, device=run.device, num_devices=run.config.world_size)
    print(
        f"disk        about {run.budget.disk_bytes / 1e9:.2f} GB in the run directory, "
        f"{free_bytes / 1e9:.2f} GB free"
    )
    if not plan.fits:
        print(f"does not fit: {advice(planner.fitting_change())}")
    print("check only: nothing was trained and no run directory was made")


def show_sizes(budget: Budget) -> None:
    trained = budget.num_trained
    adapters = "" if trained == budget.num_parameters else f", {trained:,} of adapters trained"
    print(f"parameters  {budget.num_parameters:,}{adapters}")


def show_phases(phases: Sequence[PhasePlan]) -> None:
    """A line per phase: steps, tokens, epochs, packing, accumulation."""
    for phase in phases:
        plan = phase.data.train_plan
        print(
            f"{phase.name:<11} {plan.num_steps:,} steps  {plan.num_tokens:,} tokens  "
            f"{plan.settings.epochs} epochs  warm-up {phase.phase.warmup_steps}  "
            f"packing {plan.fill:.4f}  "
            f"accumulate {plan.accumulate}",
            flush=True,
        )


def show_memory(memory: Memory, *, available: float, num_devices: int) -> None:
    """A line per item, in GB of 1e9 bytes; what is offloaded by all processes of a machine."""
    print("memory      of a process at its largest moment, GB")
    for name, size in memory.items.items():
        print(f"  {name:<18}{size / 1e9:>9.3f}")
    fits = "fits" if memory.total <= available else "DOES NOT FIT"
    print(f"  {'total':<18}{memory.total / 1e9:>9.3f}  of {available / 1e9:.1f}: {fits}")
    for name, size in memory.host.items():
        print(f"  {name:<18}{size / 1e9:>9.3f}  in the machine's memory")
    if memory.host:
        offloaded = sum(memory.host.values())
        print(
            f"  {'total':<18}{offloaded / 1e9:>9.3f}  in the machine's memory, "
            f"{num_devices * offloaded / 1e9:.1f} of all its processes"
        )


def show_time(plan: Plan, *, device: Device, num_devices: int) -> None:
    """Tokens a second, hours; and what of the roofline is assumed."""
    hours = plan.seconds / 3600
    print(
        f"time        about {_duration(plan.seconds)} of steps, "
        f"{plan.tokens / plan.seconds:,.0f} tokens/s, {hours * num_devices:.2f} device-hours"
    )
    rates, factors = plan.rates, plan.factors
    kind = "CPU" if device.type == "cpu" else "GPU"
    reached = (
        "were reached by steps measured on a"
        if factors.measured
        else ("are assumed to be reached, not yet measured on a")
    )
    print(
        f"            from {rates.flops / 1e12:.3g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s "
        f"({rates.source}), of which {factors.products:.0%} and {factors.traffic:.0%} "
        f"{reached} {kind}"
    )


def advice(change: Change | None) -> str:
    """The overrides that would make it fit."""
    if change is None:
        return "no change of hardware that this program knows would make it fit"
    return f"it would with {' '.join(f'{key}={_word(value)}' for key, value in change.items())}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

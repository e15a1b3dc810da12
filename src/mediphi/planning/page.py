"""The page that `check_only=true` prints."""

from collections.abc import Sequence
from typing import Any

from mediphi.artifacts import free_space, preflight_space
from mediphi.budget import Budget
from mediphi.config.schema import Config
from mediphi.engine import Device
from mediphi.errors import MachineError
from mediphi.phases import PhasePlan, Training
from mediphi.planning.fitting import Fit, cheapest_fit
from mediphi.planning.plan import Change, Plan, Planner


def show_plan(planner: Planner) -> None:
    """Print memory, speed, time and disk of the planner's run, and what would make it fit."""
    run = planner.run
    plan = planner.plan()
    show_sizes(run.budget)
    show_phases(run.phases)
    where = "" if run.device.is_here else ", which is not here"
    print(
        f"device      {run.config.world_size} x {run.device.name}{where} ({run.device.precision})"
    )
    if run.device.kernel == "flash" and not run.device.is_here:
        print("attention   flash: flash-attn must be installed on the machine of that GPU")
    show_memory(plan)
    if recomputed := run.budget.recomputed_layers:
        layers = run.budget.model_config.num_hidden_layers
        print(f"            {recomputed} of {layers} layers are recomputed in backward")
    show_time(plan, device=run.device, config=run.config)
    show_disk(run)
    if not plan.fits:
        print(f"does not fit: {advice(cheapest_fit(planner))}")
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


def show_memory(plan: Plan) -> None:
    """A line per item, in GB of 1e9 bytes; what is offloaded by all processes of a machine."""
    memory = plan.memory
    print("memory      of a process at its largest moment, GB")
    for name, size in memory.items.items():
        print(f"  {name:<18}{size / 1e9:>9.3f}")
    fits = "fits, but closely" if plan.is_close else "fits"
    if memory.total > plan.available:
        fits = "DOES NOT FIT"
    print(f"  {'total':<18}{memory.total / 1e9:>9.3f}  of {plan.available / 1e9:.1f}: {fits}")
    for name, size in memory.host.items():
        print(f"  {name:<18}{size / 1e9:>9.3f}  in the machine's memory")
    if memory.host:
        offloaded = sum(memory.host.values())
        print(
            f"  {'total':<18}{offloaded / 1e9:>9.3f}  in the machine's memory, "
            f"{plan.host / 1e9:.1f} of all its processes: {_host_verdict(plan)}"
        )


def _host_verdict(plan: Plan) -> str:
    if plan.host_free is None:
        return "so much must be free there"
    fits = "fits" if plan.host_fits else "DOES NOT FIT"
    return f"{plan.host_free / 1e9:.1f} are free: {fits}"


def show_time(plan: Plan, *, device: Device, config: Config) -> None:
    """Tokens a second, hours; and what of the roofline is assumed."""
    hours, num_devices = plan.seconds / 3600, config.world_size
    print(
        f"time        about {_duration(plan.seconds)} of steps, "
        f"{plan.tokens / plan.seconds:,.0f} tokens/s, {hours * num_devices:.2f} device-hours"
    )
    rates, factors = plan.rates, plan.factors
    one = " of one process" if num_devices > 1 else ""
    reached = (
        f"were reached by steps{one} measured on a CPU"
        if factors.measured
        else f"are assumed to be reached, not yet measured on a {_kind(device)}"
    )
    print(
        f"            from {rates.flops / 1e12:.3g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s "
        f"({rates.source}), of which {factors.products:.0%} and {factors.traffic:.0%} {reached}"
    )
    if num_devices > 1:
        link = plan.link
        apart = ", and that they do not slow one another" if device.type == "cpu" else ""
        print(
            f"            {num_devices} processes send one another {link.rate / 1e9:.3g} GB/s each "
            f"over {link.name}: assumed{apart}"
        )


def show_disk(run: Training) -> None:
    """What the run directory will take; and what a run would end with, were it too much."""
    needed = run.budget.disk_bytes
    print(
        f"disk        about {needed / 1e9:.2f} GB in the run directory, "
        f"{free_space(run.folder) / 1e9:.2f} GB free"
    )
    if (told := _refused(run, needed)) is not None:
        keep = run.config.hardware.checkpoints.keep
        fewer = needed - (keep - 1) * run.budget.state_bytes
        helps = keep > 1 and _refused(run, fewer) is None
        remedy = "hardware.checkpoints.keep=1, or " if helps else ""
        print(f"disk        a run would end with: {told}, or set {remedy}another paths.runs")


def _refused(run: Training, needed: int) -> str | None:
    try:
        preflight_space(run.folder, needed)
    except MachineError as error:
        return str(error)
    return None


def advice(fit: Fit | None) -> str:
    """The overrides that would make it fit, and what is no change of hardware among them."""
    if fit is None:
        return "no change that this program knows would make it fit"
    change, plan = fit
    closely = ", closely" if plan.is_close else ""
    told = (
        f"it would with {words(change)} "
        f"({plan.memory.total / 1e9:.1f} of {plan.available / 1e9:.1f} GB{closely}"
    )
    told += f"; {plan.host / 1e9:.1f} GB in the machine's memory)" if plan.host else ")"
    if "stage.lora.rank" in change:
        told += (
            "\nstage.lora.rank trains adapters alone: another training, with another result "
            "and a run of its own; no change of hardware that this program knows is enough"
        )
    elif "stage.reference" in change:
        told += "\nstage.reference=cached trains alike, in a run of its own"
    return told


def words(change: Change) -> str:
    """As they are typed."""
    return " ".join(f"{key}={_word(value)}" for key, value in change.items())


def _kind(device: Device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

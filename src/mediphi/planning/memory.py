"""What one process keeps in its device's memory, item by item, under every strategy."""

from dataclasses import dataclass, field

from mediphi.budget import Budget
from mediphi.config.schema import Config
from mediphi.engine import Device
from mediphi.planning.dry_run import Footprint
from mediphi.planning.ledger import PASSING, Peak
from mediphi.strategies.memory import (
    FLOAT32,
    ZERO3_BUCKET,
    Sizes,
    added,
    master_copy,
    reserved,
    splits,
)

HEAP = "heap, libraries"
ACTIVATION_GAPS = 0.106
"""Of what a micro-batch takes from glibc's heap, what stays behind in gaps. Like the next two what
`benchmarks/planner_fit.py` prints, of those lines of its results that say `fitted`."""
WEIGHT_GAPS = 2.18
"""The same of weights: products pack them, autocast rounds them, in every pass anew."""
LIBRARIES = {"bf16-mixed": 92.2e6, "32-true": 60.9e6}
"""Bytes that libraries take once training starts: oneDNN compiles a product for every shape."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process.

    Attributes:
        items: on the device.
        host: in the machine's memory besides, offloaded.
    """

    items: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.items.values())


def memory_of(footprint: Footprint, *, config: Config, device: Device) -> Memory:
    """What a rank needs at the largest moment of training.

    A strategy that splits the model leaves what a micro-batch brings as it is, but for the weights
    that autocast has rounded: FSDP2 gathers them so and frees them after use, DeepSpeed's linear
    layer keeps the gathered ones for backward and rounds them anew.
    """
    hardware, peak = config.hardware, footprint.peak
    if splits(hardware.strategy):
        peak = footprint.passing_peak
    state = _state(footprint, peak, config=config)
    passing = {use: float(peak[use]) for use in PASSING}
    if splits(hardware.strategy):
        passing["rounded weights"] = 0.0
    passing |= added(footprint, strategy=hardware.strategy, precision=device.precision)
    if device.type == "cpu":
        passing["gloo"] = _sent_by_gloo(footprint, strategy=hardware.strategy)
    host: dict[str, float] = {}
    if hardware.offload and device.type != "cpu":  # a CPU's own memory is the machine's
        host, state = state, {}
    items = {**state, "reference": float(peak["reference"]), **passing}
    items |= _around(footprint, passing, device=device)
    return Memory(_without_zeros(items), _without_zeros(host))


def _state(footprint: Footprint, peak: Peak, *, config: Config) -> dict[str, float]:
    """Weights, gradients, moments, and what ZeRO-3 keeps of them twice: one rank's share."""
    hardware = config.hardware
    state = {use: float(peak[use]) for use in ("weights", "gradients", "moments")}
    state["master copy"] = master_copy(footprint, strategy=hardware.strategy)
    if hardware.offload:  # gathered in one buffer, stepped with from another
        state["gradient copy"] = state["gradients"]
    share = 1 / config.world_size if splits(hardware.strategy) else 1
    return {name: size * share for name, size in state.items()}


def _sent_by_gloo(sizes: Sizes, *, strategy: str) -> float:
    """What gloo sends and has received: FSDP2's root; a copy of the bucket that ZeRO-3 reduces."""
    if strategy == "fsdp2":
        return 2.0 * FLOAT32 * sizes.root
    if strategy == "zero3":
        return float(FLOAT32 * min(ZERO3_BUCKET, sizes.trained))
    return 0.0


def _without_zeros(items: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in items.items() if size}


def least_state(budget: Budget, *, config: Config, device: Device) -> float:
    """Bytes of weights, gradients and moments on a device: no micro-batch is so small."""
    if config.hardware.offload and device.type == "cuda":
        return 0.0
    whole = FLOAT32 * (budget.num_parameters + 3.0 * budget.num_trained)
    return whole / (config.world_size if splits(config.hardware.strategy) else 1)


def _around(footprint: Footprint, passing: dict[str, float], *, device: Device) -> dict[str, float]:
    if device.type == "cuda":
        return {"context, allocator": reserved(sum(passing.values()))}
    return {HEAP: heap_of(footprint.in_heap, footprint.weights_in_heap, precision=device.precision)}


def heap_of(in_heap: float, weights_in_heap: float, *, precision: str) -> float:
    """Bytes that a CPU's process holds beside what is alive."""
    return LIBRARIES[precision] + ACTIVATION_GAPS * in_heap + WEIGHT_GAPS * weights_in_heap

"""What one process keeps in its device's memory, item by item, under every strategy."""

from dataclasses import dataclass, field

from mediphi.budget import Budget
from mediphi.config.schema import Config
from mediphi.engine import Device
from mediphi.planning.dry_run import Footprint
from mediphi.planning.ledger import PASSING
from mediphi.strategies.memory import FLOAT32, added, reserved, splits

ACTIVATION_GAPS = 0.4
"""Of what a micro-batch takes from glibc's heap, what stays behind in gaps: fitted to
benchmarks/planner_memory.py, like the next two."""
WEIGHT_GAPS = 1.2
"""The same of weights: products pack them, autocast rounds them, in every pass anew."""
LIBRARIES = {"bf16-mixed": 50e6, "32-true": 12e6}
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
    that autocast has rounded: they are gathered so, and freed after use.
    """
    hardware, peak = config.hardware, footprint.peak
    if splits(hardware.strategy):
        peak = footprint.passing_peak
    state = {use: float(peak[use]) for use in ("weights", "gradients", "moments")}
    passing = {use: float(peak[use]) for use in PASSING}
    host: dict[str, float] = {}
    if splits(hardware.strategy):
        state = {use: size / config.world_size for use, size in state.items()}
        passing["rounded weights"] = 0.0
    passing |= added(footprint, strategy=hardware.strategy, precision=device.precision)
    if hardware.strategy == "fsdp2" and device.type == "cpu":
        passing["gloo"] = 2.0 * FLOAT32 * footprint.root  # what it sends and has received
    if hardware.offload:
        host, state = state, {}
    items = {**state, "reference": float(peak["reference"]), **passing}
    items |= _around(footprint, passing, device=device)
    return Memory({name: size for name, size in items.items() if size}, host)


def least_state(budget: Budget, *, config: Config) -> float:
    """Bytes of weights, gradients and moments on a device: no micro-batch is so small."""
    if config.hardware.offload:
        return 0.0
    whole = FLOAT32 * (budget.num_parameters + 3.0 * budget.num_trained)
    return whole / (config.world_size if splits(config.hardware.strategy) else 1)


def _around(footprint: Footprint, passing: dict[str, float], *, device: Device) -> dict[str, float]:
    if device.type == "cuda":
        return {"context, allocator": reserved(sum(passing.values()))}
    gaps = ACTIVATION_GAPS * footprint.in_heap + WEIGHT_GAPS * footprint.weights_in_heap
    return {"heap, libraries": LIBRARIES[device.precision] + gaps}

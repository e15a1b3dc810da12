"""What one process keeps in its device's memory, item by item, under every strategy."""

from dataclasses import dataclass, field

from mediphi.budget import Budget
from mediphi.config.schema import Config, Hardware
from mediphi.engine import Device
from mediphi.planning.dry_run import Footprint
from mediphi.planning.ledger import PASSING

FLOAT32 = 4
ZERO3_LIVE = 1_050_000_000
"""Parameters that DeepSpeed keeps gathered at most: `stage3_max_live_parameters` and a prefetch."""
ZERO3_BUCKET = 50_000_000
"""Gradients that our ZeRO-3 strategy reduces at a time."""
CUDA_CONTEXT = 1.0e9
"""Bytes of a CUDA context with its libraries' workspaces: assumed, not measured."""
ALLOCATOR_SHARE = 0.05
"""Of what passes through PyTorch's CUDA allocator and is lost to its rounding: assumed."""
ACTIVATION_GAPS = 0.3
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
    if hardware.strategy in ("fsdp2", "zero3"):
        peak = footprint.passing_peak
    state = {use: float(peak[use]) for use in ("weights", "gradients", "moments")}
    passing = {use: float(peak[use]) for use in PASSING}
    host: dict[str, float] = {}
    if hardware.strategy == "fsdp2":
        state = {use: size / config.world_size for use, size in state.items()}
        passing |= {"rounded weights": 0.0, "gathered layers": _fsdp2_gathered(footprint, device)}
        if device.type == "cpu":
            passing["gloo"] = 2.0 * FLOAT32 * footprint.root  # what it sends and has received
    elif hardware.strategy == "zero3":
        state = {use: size / config.world_size for use, size in state.items()}
        passing |= {"rounded weights": 0.0, "gathered layers": _zero3_gathered(footprint, device)}
        passing["buckets"] = FLOAT32 * min(ZERO3_BUCKET, footprint.trained) * 2.0
        if hardware.offload:
            host, state = state, {}
    elif config.world_size > 1:
        passing["buckets"] = float(FLOAT32 * footprint.trained)  # DDP's copies of the gradients
    items = {**state, "reference": float(peak["reference"]), **passing}
    items |= _around(footprint, passing, device=device)
    return Memory({name: size for name, size in items.items() if size}, host)


def least_state(budget: Budget, *, config: Config) -> float:
    """Bytes of weights, gradients and moments on a device: no micro-batch is so small."""
    if config.hardware.offload:
        return 0.0
    whole = FLOAT32 * (budget.num_parameters + 3.0 * budget.num_trained)
    return whole / (config.world_size if splits(config.hardware) else 1)


def splits(hardware: Hardware) -> bool:
    """Whether no process holds the whole model."""
    return hardware.strategy in ("fsdp2", "zero3")


def _around(footprint: Footprint, passing: dict[str, float], *, device: Device) -> dict[str, float]:
    if device.type == "cuda":
        lost = ALLOCATOR_SHARE * sum(passing.values())
        return {"context, allocator": CUDA_CONTEXT + lost}
    gaps = ACTIVATION_GAPS * footprint.in_heap + WEIGHT_GAPS * footprint.weights_in_heap
    return {"heap, libraries": LIBRARIES[device.precision] + gaps}


def _fsdp2_gathered(footprint: Footprint, device: Device) -> float:
    """Root whole during a step, with its gradient; two layers, one with its gradient.

    What is gathered arrives in one buffer and is copied into the weights. The gradient of a layer
    exists as it was computed, and in float32 as it is reduced.
    """
    width = 2 if device.precision == "bf16-mixed" else FLOAT32
    is_trained = footprint.trained > footprint.root  # else adapters: small
    root = FLOAT32 * footprint.root * (3 if is_trained else 2)
    gradient = (width + FLOAT32) * footprint.largest_layer if is_trained else 0
    return float(root + 3 * width * footprint.largest_layer + gradient)


def _zero3_gathered(footprint: Footprint, device: Device) -> float:
    """Weights stay gathered until so many are."""
    width = 2 if device.precision == "bf16-mixed" else FLOAT32
    in_layers = footprint.parameters - footprint.root
    return float(FLOAT32 * footprint.root + width * min(ZERO3_LIVE, in_layers))

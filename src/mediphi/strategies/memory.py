"""Bytes that strategies add to their share of the state: what they gather, send and reserve."""

from dataclasses import dataclass
from typing import Any, Literal

FLOAT32 = 4
ZERO3_LIVE = 1_050_000_000
"""Parameters that DeepSpeed keeps gathered at most: `stage3_max_live_parameters` and a prefetch."""
ZERO3_PREFETCH = 50_000_000
"""Parameters that arrive at a time at most: `stage3_prefetch_bucket_size`."""
ZERO3_BUCKET = 50_000_000
"""Gradients that ZeRO-3 reduces at a time: 200 MB of float32."""
CUDA_CONTEXT = 1.0e9
"""Bytes of a CUDA context with its libraries' workspaces: assumed, not measured."""
ALLOCATOR_SHARE = 0.05
"""Of what passes through PyTorch's CUDA allocator and is lost to its rounding: assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        parameters: all of them, of the model that is trained.
        trained: those with a gradient.
        largest_layer: of the largest decoder layer.
        root: outside of the decoder's layers.
    """

    parameters: int
    trained: int
    largest_layer: int
    root: int


def splits(strategy: str) -> bool:
    """Whether no process holds the whole model."""
    return strategy in ("fsdp2", "zero3")


def layer_sizes(model: Any) -> dict[str, int]:
    """`parameters`, `largest_layer` and `root` of a causal LM."""
    found = getattr(model.get_decoder(), "layers", ())  # not every architecture names them so
    layers = [sum(p.numel() for p in layer.parameters()) for layer in found]
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "largest_layer": max(layers, default=0),
        "root": parameters - sum(layers),
    }


def added(sizes: Sizes, *, strategy: str, precision: str) -> dict[str, float]:
    """By item, on each device; empty where every process keeps the whole model."""
    width = 2 if precision == "bf16-mixed" else FLOAT32
    if strategy == "fsdp2":
        return {"gathered layers": _fsdp2_gathered(sizes, width)}
    if strategy == "zero3":
        buckets = 2.0 * FLOAT32 * min(ZERO3_BUCKET, sizes.trained)
        return {"gathered layers": _zero3_gathered(sizes, width), "buckets": buckets}
    return {}


def master_copy(sizes: Sizes, *, strategy: str) -> float:
    """Bytes of the weights that ZeRO-3's AdamW steps, of all ranks together.

    DeepSpeed would step float32 weights in place, but compares their device with the device's name,
    which are never equal, and copies them (0.19.8, `_create_fp32_partitions`).
    """
    return float(FLOAT32 * sizes.trained) if strategy == "zero3" else 0.0


def reserved(passing: float) -> float:
    """What a CUDA context takes, and its allocator loses of a micro-batch's `passing` bytes."""
    return CUDA_CONTEXT + ALLOCATOR_SHARE * passing


def _fsdp2_gathered(sizes: Sizes, width: Literal[2, 4]) -> float:
    """Root whole during a step, with its gradient; two layers, one with its gradient.

    What is gathered arrives in one buffer and is copied into the weights. The gradient of a layer
    exists as it was computed, and in float32 as it is reduced.
    """
    is_trained = sizes.trained > sizes.root  # else adapters: small
    root = FLOAT32 * sizes.root * (3 if is_trained else 2)
    gradient = (width + FLOAT32) * sizes.largest_layer if is_trained else 0
    return float(root + 3 * width * sizes.largest_layer + gradient)


def _zero3_gathered(sizes: Sizes, width: Literal[2, 4]) -> float:
    """Weights stay gathered until so many are, in float32 whatever they were sent in."""
    in_layers = sizes.parameters - sizes.root
    live = sizes.root + min(ZERO3_LIVE, in_layers)
    return float(FLOAT32 * live + width * min(ZERO3_PREFETCH, in_layers))

"""How long a run takes, from a roofline: operations over a peak rate, bytes over a bandwidth."""

import time
from dataclasses import dataclass

import torch

from mediphi import engine
from mediphi.config.schema import Config
from mediphi.engine import Device
from mediphi.strategies.memory import FLOAT32, splits

MATMUL_SHARE = {"cuda": 0.7, "cpu": 0.7}
"""Of the peak rate that a step's products reach: assumed."""
BANDWIDTH_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of the memory's bandwidth that the other operations reach: assumed."""
LINK = 300e9
"""Bytes a second between GPUs of one machine (NVLink), in use: assumed."""
HOST_LINK = 40e9
"""Bytes a second between a GPU and the machine's memory (PCIe 5), in use: assumed."""


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of a large product, bytes a second of the memory; `source` says where from."""

    flops: float
    bandwidth: float
    source: str


@dataclass(frozen=True, slots=True)
class Work:
    """Of one optimizer step on one rank.

    Attributes:
        flops: of products, recomputation included.
        traffic: bytes that all operations read and write.
        sent: bytes between devices.
        offloaded: bytes between device and host.
    """

    flops: float
    traffic: float
    sent: float
    offloaded: float

    def seconds(self, rates: Rates, *, device_type: str) -> float:
        """Products and memory in turns; what is sent hides behind them as far as it can."""
        computed = self.flops / (rates.flops * MATMUL_SHARE[device_type])
        moved = self.traffic / (rates.bandwidth * BANDWIDTH_SHARE[device_type])
        return max(computed + moved, self.sent / LINK) + self.offloaded / HOST_LINK


def work_of(
    *,
    flops: float,
    traffic: float,
    num_parameters: int,
    num_trained: int,
    recomputed_share: float,
    config: Config,
) -> Work:
    """Work of a step.

    Args:
        flops: of a micro-batch without recomputation.
        traffic: bytes of a micro-batch.
        recomputed_share: of the layers.
    """
    hardware, times = config.hardware, config.accumulate
    recomputed = 1 + recomputed_share / 3  # a forward pass once more
    sent = offloaded = 0.0
    if splits(hardware.strategy):  # weights twice in bfloat16, gradients once in float32
        sent = times * (2 * 2.0 * num_parameters + FLOAT32 * num_trained)
    elif config.world_size > 1:
        sent = 2.0 * FLOAT32 * num_trained  # a ring all-reduce
    if hardware.offload:
        share = 1 / config.world_size
        offloaded = FLOAT32 * share * (times * 2 * num_parameters + (times + 1) * num_trained)
    adamw = 28.0 * num_trained / (config.world_size if splits(hardware.strategy) else 1)
    return Work(flops * recomputed * times, traffic * times + adamw, sent, offloaded)


def rates_of(device: Device) -> Rates:
    """The data sheet's for a known GPU, else measured here in under a second."""
    sheet = engine.data_sheet(device.name) if device.type == "cuda" else None
    if sheet is not None:
        flops = sheet.bf16_flops if device.precision == "bf16-mixed" else sheet.bf16_flops / 16
        return Rates(flops, sheet.bandwidth, "data sheet")
    return Rates(engine.peak_flops(device), _bandwidth(device), "measured now")


def _bandwidth(device: Device) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.ones(1 << 24, device=device.type)
    target, fastest = torch.empty_like(source), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * source.nbytes / fastest

"""How long a run takes, from a roofline: operations over a peak rate, bytes over a bandwidth."""

import time
from dataclasses import astuple, dataclass

import torch

from mediphi import engine
from mediphi.budget import Budget
from mediphi.config.schema import Config
from mediphi.engine import Device
from mediphi.strategies.memory import FLOAT32, splits

LINK = 300e9
"""Bytes a second between GPUs of one machine (NVLink), in use: assumed."""
HOST_LINK = 40e9
"""Bytes a second between a GPU and the machine's memory (PCIe 5), in use: assumed."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What a step makes of a device's peak rates.

    Attributes:
        products: share of the peak FLOP/s; a fit's, so that it may be a little above 1.
        traffic: share of the memory's bandwidth.
        operation: seconds that an operation takes before any work is done.
        measured: else assumed.
    """

    products: float
    traffic: float
    operation: float
    measured: bool


ASSUMED = Factors(0.7, 0.8, 0.0, measured=False)
"""A GPU's, until `benchmarks/gpu` has run."""
FACTORS = {
    ("cpu", "bf16-mixed"): Factors(0.933, 0.244, 0.0, measured=True),
    ("cpu", "32-true"): Factors(1.158, 0.244, 0.0, measured=True),
    ("cuda", "bf16-mixed"): ASSUMED,
    ("cuda", "32-true"): ASSUMED,
}
"""By device type and precision. A CPU's are what `benchmarks/planner_fit.py` prints, of those lines
of benchmarks/results/planner_memory.jsonl that say `fitted`."""


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of a large product, bytes a second of the memory; `source` says where from."""

    flops: float
    bandwidth: float
    source: str


@dataclass(frozen=True, slots=True)
class Work:
    """Of optimizer steps on one rank.

    Attributes:
        flops: of products, recomputation included.
        traffic: bytes that all operations read and write.
        sent: bytes between devices.
        offloaded: bytes between device and host.
        operations: PyTorch's, of any size.
    """

    flops: float
    traffic: float
    sent: float
    offloaded: float
    operations: float

    def times(self, steps: int) -> "Work":
        return Work(*(steps * amount for amount in astuple(self)))

    def seconds(self, rates: Rates, factors: Factors) -> float:
        """Products and memory in turns; what is sent hides behind them as far as it can."""
        computed = self.flops / (rates.flops * factors.products)
        moved = self.traffic / (rates.bandwidth * factors.traffic)
        busy = computed + moved + self.operations * factors.operation
        return max(busy, self.sent / LINK) + self.offloaded / HOST_LINK


def work_of(
    *,
    flops: float,
    traffic: float,
    operations: int,
    budget: Budget,
    recomputed_share: float,
    config: Config,
) -> Work:
    """Work of a step.

    Args:
        flops: of a micro-batch without recomputation.
        traffic: bytes of a micro-batch.
        operations: of a micro-batch.
        recomputed_share: of the layers.
    """
    hardware, times = config.hardware, config.accumulate
    num_parameters, num_trained = budget.num_parameters, budget.num_trained
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
    traffic = traffic * times + adamw
    return Work(flops * recomputed * times, traffic, sent, offloaded, operations * times)


def rates_of(device: Device) -> Rates:
    """The data sheet's for a known GPU, else measured here in under a second."""
    sheet = engine.data_sheet(device.name) if device.type == "cuda" else None
    if sheet is not None:
        flops = sheet.bf16_flops if device.precision == "bf16-mixed" else sheet.bf16_flops / 16
        return Rates(flops, sheet.bandwidth, "data sheet")
    fastest = max(engine.peak_flops(device) for _ in range(3))
    return Rates(fastest, _bandwidth(device), "measured now")


def _bandwidth(device: Device) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.ones(1 << 24, device=device.type)
    target, fastest = torch.empty_like(source), float("inf")
    for _ in range(16):
        start = time.perf_counter()
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * source.nbytes / fastest

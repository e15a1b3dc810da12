"""How long a run takes, from a roofline: operations over a peak rate, bytes over a bandwidth."""

import time
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from mediphi import engine
from mediphi.budget import Budget
from mediphi.config.schema import Config
from mediphi.engine import Device
from mediphi.strategies.memory import FLOAT32, splits

LINK_SHARE = 2 / 3
"""Of what a data sheet gives a link, what is reached: assumed."""
UNKNOWN_PCIE = 32e9
"""Bytes a second of a GPU without a data sheet here: PCIe 4."""
NETWORK = 50e9
"""Bytes a second of each GPU to those of other machines (InfiniBand NDR, a port a GPU): assumed."""
GLOO = 1e9
"""Bytes a second of each process that sends through gloo, in a machine or between: assumed."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What a step makes of a device's peak rates.

    Attributes:
        products: share of the peak FLOP/s; a fit's, so that it may be a little above 1.
        traffic: share of the memory's bandwidth.
        measured: else assumed.
    """

    products: float
    traffic: float
    measured: bool


ASSUMED = Factors(0.7, 0.8, measured=False)
"""A GPU's, until `benchmarks/gpu` has run."""
FACTORS = {
    ("cpu", "bf16-mixed"): Factors(1.117, 0.2333, measured=True),
    ("cpu", "32-true"): Factors(1.179, 0.2333, measured=True),
    ("cuda", "bf16-mixed"): ASSUMED,
    ("cuda", "32-true"): ASSUMED,
}
"""By device type and precision. A CPU's are what `benchmarks/planner_fit.py` prints, of those lines
of benchmarks/results/planner_memory.jsonl that say `fitted`."""


class Link(NamedTuple):
    """What devices send one another over; bytes a second of each, in use."""

    name: str
    rate: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device can do.

    Attributes:
        flops: FLOP/s of a large product.
        bandwidth: bytes a second of the memory.
        source: where these are from.
        link: to the devices of the same machine, in use.
        host: bytes a second to the machine's memory, in use.
    """

    flops: float
    bandwidth: float
    source: str
    link: Link
    host: float


@dataclass(frozen=True, slots=True)
class Work:
    """Of optimizer steps on one rank.

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

    def times(self, steps: int) -> "Work":
        return Work(*(steps * amount for amount in astuple(self)))

    def seconds(self, rates: Rates, factors: Factors, *, link: Link) -> float:
        """Products and memory in turns; what is sent hides behind them as far as it can."""
        computed = self.flops / (rates.flops * factors.products)
        moved = self.traffic / (rates.bandwidth * factors.traffic)
        return max(computed + moved, self.sent / link.rate) + self.offloaded / rates.host


def work_of(
    *,
    flops: float,
    traffic: float,
    budget: Budget,
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
    return Work(flops * recomputed * times, traffic, sent, offloaded)


def rates_of(device: Device) -> Rates:
    """The data sheet's for a known GPU, else measured here in under a second; links' assumed."""
    sheet = engine.data_sheet(device.name) if device.type == "cuda" else None
    if sheet is not None:
        own = Link("NVLink", sheet.nvlink) if sheet.nvlink else Link("PCIe", sheet.pcie)
        link = own._replace(rate=LINK_SHARE * own.rate)
        return Rates(
            sheet.flops(device.precision),
            sheet.bandwidth,
            "data sheet",
            link,
            LINK_SHARE * sheet.pcie,
        )
    fastest, bandwidth = max(engine.peak_flops(device) for _ in range(3)), _bandwidth(device)
    if device.type == "cpu":  # its own memory is the host's
        return Rates(fastest, bandwidth, "measured now", Link("gloo", GLOO), bandwidth)
    pcie = LINK_SHARE * UNKNOWN_PCIE
    return Rates(fastest, bandwidth, "measured now", Link("PCIe", pcie), pcie)


def link_of(rates: Rates, *, config: Config) -> Link:
    """The slowest that a step's sending passes: between machines the network."""
    if config.hardware.num_nodes == 1 or rates.link.rate <= NETWORK:
        return rates.link
    return Link("the network between machines", NETWORK)


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

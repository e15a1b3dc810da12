"""What the GPU benchmarks share: model and data of Phi-3.5-mini's shapes, clocks, turns, lines.

They run on one CUDA device. `--toy` runs the same code on the tiny model, on a CPU where there is
no GPU: correctness only, nothing is written.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # the CPU benchmarks

import sides
from turns import Deadline

PHI = sides.ROOT / "assets" / "models" / "phi35_mini"
STRIDE = 1009
"""A prime, so that elements of all rows and columns are among them; gigabytes become megabytes."""
PACKAGES = (*sides.PACKAGES, "triton", "flash_attn", "liger_kernel")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def installed(package: str) -> bool:
    return find_spec(package) is not None


def random_model(folder: str, *, implementation: str = "sdpa", seed: int = 0) -> Any:
    """Float32 weights drawn on the device itself: the same for the same seed, in train mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import mediphi.attention  # noqa: F401  registers its kernels

    torch.manual_seed(seed)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder),
            attn_implementation=implementation,
            dtype=torch.float32,
        )
    return model.train()


def random_ids(lengths: Sequence[int], *, vocab: int = 4000, seed: int = 0) -> list[list[int]]:
    """Tokens without any control token among them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


def random_lengths(count: int, *, median: int, longest: int, seed: int = 0) -> list[int]:
    """Log-normal with a sigma of 0.8: many short documents and a few long ones."""
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log(median), 0.8, count))
    return drawn.astype(int).clip(max(2, median // 20), longest).tolist()


# ---------------------------------------------------------------------------------- one process
class Cost(NamedTuple):
    """Seconds of a call, MiB of device memory that it allocates on top of what is there."""

    seconds: float
    mib: float


def cost(call: Callable[[], Any], *, repeat: int) -> Cost:
    """Mean seconds of `repeat` calls after one that warms up, and the peak of one.

    The host only waits at the end, as in training.
    """
    import torch

    call()
    synchronize()
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize()
    seconds = (time.perf_counter() - start) / repeat
    return Cost(seconds, (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0)


def in_turns(
    calls: dict[str, Callable[[], Any]], *, toy: bool, deadline: Deadline, repeat: int = 10
) -> dict[str, list[Cost]]:
    """Costs of every call: once if `toy`, else five times in turns A-B-C, C-B-A.

    No call begins that would end after the deadline; those without any turn have no costs.
    """
    found: dict[str, list[Cost]] = {name: [] for name in calls}
    longest = dict.fromkeys(calls, 0.0)
    for turn in range(1 if toy else 5):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            if not deadline.leaves(longest[name]):
                return found
            start = time.monotonic()
            found[name].append(cost(calls[name], repeat=1 if toy else repeat))
            longest[name] = max(longest[name], time.monotonic() - start)
    return found


def seconds_ratio(ours: Sequence[Cost], peer: Sequence[Cost]) -> dict[str, Any]:
    """Peer over ours: the median of paired turns with their spread; nothing without a pair."""
    pairs = min(len(ours), len(peer))
    if not pairs:
        return {}
    own, other = ours[:pairs], peer[:pairs]
    return sides.ratio(own, other, lambda one: one.seconds, name="wall")  # type: ignore[arg-type]


def median_ms(costs: Sequence[Cost]) -> float:
    return round(1e3 * median(one.seconds for one in costs), 3)


# ---------------------------------------------------------------------------------- processes
class DeviceMeter(sides.Meter):
    """Clocks that wait for the device, and its allocator's peak instead of resident memory.

    Args:
        what: `parity`, one optimizer step on the first documents; `time`, all of them.

    Attributes:
        gradient: that the step of a parity run took, see `sampled`; None in a timed run.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.step_losses: list[Any] = []
        self.gradient: Any = None
        self._hook: Any = None
        if device() == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before_mib = torch.cuda.memory_allocated() / 2**20

    def watch(self, model: Any) -> None:
        """Before a parity run: of this model the gradient is kept."""
        if self.what != "parity":
            return
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def take(*_: Any) -> None:
            self.gradient = sampled(model)

        self._hook = register_optimizer_step_post_hook(take)

    def apart(self) -> "DeviceMeter":
        return DeviceMeter(self.what)

    def start(self) -> None:
        synchronize()
        super().start()

    def stop(self) -> None:
        synchronize()
        super().stop()
        if self._hook is not None:
            self._hook.remove()
        self.losses = [float(loss) for loss in self.step_losses]

    def peak_mib(self) -> float:
        if device() == "cpu":
            return super().peak_mib()
        import torch

        return torch.cuda.max_memory_allocated() / 2**20

    def release(self) -> None:
        gc.collect()  # trainers and modules know one another
        if device() == "cuda":
            import torch

            torch.cuda.empty_cache()


def sampled(model: Any) -> Any:
    """Every `STRIDE`-th element of each parameter's gradient, float32 on the CPU."""
    import torch

    grads = [p.grad.detach().flatten()[::STRIDE] for p in model.parameters()]
    return torch.cat(grads).float().cpu()


def distance(found: Any, wanted: Any) -> float:
    """Norm of the difference, as a share of the norm that is wanted."""
    return float((found - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------------------------- lines
def environment() -> dict[str, Any]:
    """Versions, the GPU's name, the rate that MFU divides by."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "versions": {package: found for package, found in versions.items() if found},
        "cuda": torch.version.cuda,
        "python": ".".join(map(str, sys.version_info[:3])),
        "device": name,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_flops() -> float:
    """FLOP/s of the data sheet, or of a matrix product here where the device is unknown."""
    from mediphi import engine
    from mediphi.config.schema import Hardware

    return engine.peak_flops(engine.resolve(Hardware()))


def device_bandwidth(mib: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written."""
    import torch

    source = torch.rand(mib * 2**18, device=device())
    copy = torch.empty_like(source)
    seconds = cost(partial(copy.copy_, source), repeat=5).seconds
    return 2 * source.numel() * 4 / seconds


class Options(NamedTuple):
    """Of a benchmark's command line."""

    toy: bool
    folder: str
    deadline: Deadline
    rows: int
    only: tuple[str, ...]


Figures = Callable[[Options], Iterable[dict[str, Any]]]


def run_benchmark(figures: Figures, *, doc: str | None, results: str) -> None:
    """Print the lines; unless it is a toy run, keep them in place of older ones of like name."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="correctness only, writes nothing")
    parser.add_argument(
        "--deadline", type=float, default=540.0, help="seconds after which nothing is measured"
    )
    parser.add_argument("--rows", type=int, default=2, help="packed rows per forward pass")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of figures")
    arguments = parser.parse_args()
    if not arguments.toy and device() == "cpu":
        parser.error("no CUDA device: only --toy runs here")
    folder = sides.TINY if arguments.toy else PHI
    deadline = Deadline(arguments.deadline)
    options = Options(arguments.toy, str(folder), deadline, arguments.rows, tuple(arguments.only))
    lines = []
    try:
        for figure in figures(options):
            line = {**figure, **environment()}
            lines.append(line)
            print(json.dumps(line), flush=True)
    finally:  # what was measured before a side of ours failed, or before Ctrl-C, counts
        if lines and not arguments.toy:
            _keep(lines, sides.RESULTS / results)


def _keep(lines: list[dict[str, Any]], path: Path) -> None:
    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["figure"], line.get("data"), line["side"], line["device"]

    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    new = {key(line) for line in lines}
    kept = [line for line in map(json.loads, known) if key(line) not in new]
    text = "\n".join(json.dumps(line) for line in [*kept, *lines])
    path.write_text(text + "\n", encoding="utf-8")


def sides_here(names: Iterable[str], options: Options) -> list[str]:
    """Ours, and those that `--only` asks for and whose libraries are there."""
    needs = {"trl": "trl", "liger": "liger_kernel", "compiled": "triton"}
    found = []
    for name in names:
        there = all(installed(p) for part, p in needs.items() if part in name)
        is_asked_for = not options.only or any(part in name for part in options.only)
        on_cpu = device() == "cpu" and ("liger" in name or "compiled" in name)
        if name == "ours" or (there and is_asked_for and not on_cpu):
            found.append(name)
    return found

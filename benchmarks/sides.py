"""What the step benchmarks share: sides as processes, clocks, FLOPs, ratios, result lines.

A side is a worker process that stays alive, in the environment that `train.py` makes for itself. It
trains once for every line that it reads, each time with a fresh trainer on the same initial
weights, and answers with a `Run`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mediphi.door import PROCESS_SETTINGS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "models" / "tiny"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mediphi", "torch", "lightning", "transformers", "trl", "datasets", "accelerate")


class Reference(NamedTuple):
    """What log-probabilities of a reference model cost before training; 0 where there are none."""

    wall: float
    cpu: float
    flops: float


class Run(NamedTuple):
    """One training run; `heldout` is the loss of the trained weights, MiB are resident.

    `tokens` are real, `positions` padding too; `losses` are those of the micro-batches.
    """

    wall: float
    cpu: float
    tokens: int
    positions: int
    pairs: int
    steps: int
    losses: list[float]
    flops: float
    attention_flops: float
    heldout: float
    before_mib: float
    peak_mib: float
    reference: Reference


class Meter:
    """Starts and stops the clocks; counts tokens and FLOPs of what lies between."""

    def __init__(self, *, count_flops: bool = False) -> None:
        self.count_flops = count_flops
        self.counter = flop_counter() if count_flops else None
        self.tokens = self.positions = self.pairs = self.steps = 0
        self.losses: list[float] = []
        self.wall = self.cpu = 0.0
        self.reference = Reference(0.0, 0.0, 0.0)
        self.before_mib = resident_mib("VmRSS")

    def peak_mib(self) -> float:
        return resident_mib("VmHWM")

    def release(self) -> None:
        """Give back what the next side will need; on a CPU nothing."""

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()
        if self.counter is not None:
            self.counter.__enter__()

    def stop(self) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
        self.wall, self.cpu = time.perf_counter() - self.wall, cpu_seconds() - self.cpu

    def flops(self) -> tuple[float, float]:
        """All, and attention's share."""
        counts = self.counter.get_flop_counts() if self.counter is not None else {}
        per_op = counts.get("Global", {})
        return sum(per_op.values()), sum(n for op, n in per_op.items() if "attention" in str(op))

    def apart(self) -> "Meter":
        """A meter of its own for the reference pass."""
        return Meter(count_flops=self.count_flops)

    def take_reference(self, meter: "Meter") -> None:
        self.reference = Reference(meter.wall, meter.cpu, meter.flops()[0])


Train = Callable[[Meter], Any]
"""Trains once from the initial weights and returns the transformers model."""


def flop_counter() -> Any:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def products(q: Any, k: Any, is_causal: bool) -> int:
        batch, heads, queries, dim = q
        pairs = queries * (queries + 1) // 2 if is_causal else queries * k[2]
        return 2 * batch * heads * dim * pairs

    def forward(q: Any, k: Any, v: Any, p: float = 0.0, causal: bool = False, **_: Any) -> int:
        return 2 * products(q, k, causal)

    def backward(grad: Any, q: Any, k: Any, *rest: Any, **_: Any) -> int:
        return 5 * products(q, k, rest[4])  # value, out, logsumexp, dropout, is_causal

    def in_place(total: Any, left: Any, right: Any, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    aten = torch.ops.aten
    formulas = {
        aten.addmm_: in_place,  # in TRL's loss; the counter knows only the other one
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident_mib(field: str) -> float:
    """`VmHWM`: the highest so far, `VmRSS`: now."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{field}:") + 1]) / 1024


def serve(
    make: Callable[[Path], Train],
    heldout: Callable[[Any], float],
    *,
    meters: Callable[[str], Meter] = lambda what: Meter(count_flops=what == "flops"),
) -> None:
    """Train once per line on stdin (`time` or `flops`), answer with a `Run` per line.

    Args:
        make: prepares the side in a folder of its own.
        heldout: loss of a trained model, by the same code for all sides.
        meters: makes the meter of a run of that kind.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as name:
        work = make(Path(name))
        for line in sys.stdin:
            meter = meters(line.strip())
            model = work(meter)
            counts = (meter.tokens, meter.positions, meter.pairs, meter.steps, meter.losses)
            measured = (meter.wall, meter.cpu, *counts, *meter.flops(), heldout(model))
            run = Run(*measured, meter.before_mib, meter.peak_mib(), meter.reference)
            del model
            meter.release()
            print(json.dumps(run), file=answers, flush=True)


class Side:
    """A worker process and its runs."""

    def __init__(self, name: str, script: str, task_file: Path, *, threads: int) -> None:
        self.name, self.runs = name, []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        own = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, script, name, str(task_file)],
            env={**PROCESS_SETTINGS, **os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def run(self, what: str) -> Run:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self.errors.read()[-3000:]}")
        *fields, reference = json.loads(answer)
        run = Run(*fields, Reference(*reference))
        print(f"{what} {self.name}: {run.wall:.1f} s, cpu {run.cpu:.1f} s", file=sys.stderr)
        return run

    def end(self) -> None:
        self.process.communicate()
        self.errors.close()


Measured = tuple[Run, list[Run]]
"""The run that counted FLOPs (it warms up too) and the timed ones."""


def measure(
    names: Iterable[str], script: str, task: Sequence[Any], *, toy: bool, threads: int
) -> dict[str, Measured]:
    """All sides in turns, A-B-C-D, D-C-B-A: one timed round if `toy`, else five."""
    with tempfile.TemporaryDirectory() as folder:
        task_file = Path(folder) / "task.json"
        task_file.write_text(json.dumps(task))
        workers = [Side(name, script, task_file, threads=threads) for name in names]
        counted = {side.name: side.run("flops") for side in workers}
        for number in range(1 if toy else 5):
            for side in workers if number % 2 == 0 else workers[::-1]:
                side.runs.append(side.run("time"))
        for side in workers:
            side.end()
    steps = {name: run.steps for name, run in counted.items()}
    assert len(set(steps.values())) == 1, f"the sides differ in optimizer steps: {steps}"
    return {side.name: (counted[side.name], side.runs) for side in workers}


Cost = Callable[[Run], float]


def ratio(ours: Sequence[Run], peer: Sequence[Run], cost: Cost, *, name: str) -> dict[str, Any]:
    """Peer over ours: the median of paired runs with their spread."""
    paired = [cost(b) / cost(a) for a, b in zip(ours, peer, strict=True)]
    spread = [round(min(paired), 2), round(max(paired), 2)]
    return {f"{name}_ratio": round(median(paired), 2), f"{name}_ratio_spread": spread}


def token_ratios(ours: Measured, peer: Measured) -> dict[str, Any]:
    """Peer over ours per real token."""
    wall = ratio(ours[1], peer[1], lambda run: run.wall / run.tokens, name="wall")
    cpu = ratio(ours[1], peer[1], lambda run: run.cpu / run.tokens, name="cpu")
    a, b = (run.flops / run.tokens for run in (ours[0], peer[0]))
    return {**wall, **cpu, "flops_ratio": round(b / a, 2)}


def token_figures(counted: Run, runs: list[Run], *, floor: float, peak: float) -> dict[str, Any]:
    """Per real token; `floor` is FLOPs a token that nobody can save, `peak` FLOP/s."""
    wall = median(run.wall / run.tokens for run in runs)
    return {
        "tokens_per_s": round(1 / wall),
        "cpu_us_per_token": round(1e6 * median(run.cpu / run.tokens for run in runs), 2),
        "kflop_per_token": round(counted.flops / counted.tokens / 1e3, 1),
        "attention_kflop_per_token": round(counted.attention_flops / counted.tokens / 1e3, 1),
        "flops_over_floor": round(counted.flops / counted.tokens / floor, 3),
        "wall_over_floor": round(wall * peak / floor, 2),
        "positions_per_token": round(counted.positions / counted.tokens, 3),
        "tokens_per_step": round(counted.tokens / counted.steps),
        "steps": counted.steps,
        "heldout_loss": round(runs[-1].heldout, 4),
        **memory(counted, runs),
    }


def memory(counted: Run, runs: list[Run]) -> dict[str, int]:
    peak = max(run.peak_mib for run in runs)
    return {"peak_mib": round(peak), "peak_mib_above_start": round(peak - counted.before_mib)}


def peak_rate(precision: str, *, threads: int) -> float:
    """FLOP/s of a large matrix product here, in this precision."""
    import torch

    from mediphi.engine import Device, peak_flops

    torch.set_num_threads(threads)
    return max(peak_flops(Device("cpu", "", precision, "sdpa")) for _ in range(5))


def environment(threads: int) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": threads,
        "load_average_before": load_average(),
    }


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


Figures = Callable[..., Iterable[dict[str, Any]]]
"""`figures(precision, toy=..., threads=...)`: the lines of a benchmark."""


def run_benchmark(figures: Figures, *, doc: str | None, results: Path) -> None:
    """Read the command line, print the lines; keep them unless it is a toy run."""
    from mediphi.config.schema import Hardware
    from mediphi.engine import resolve

    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="correctness only, writes nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto")
    options = parser.parse_args()
    precision = resolve(Hardware(accelerator="cpu", precision=options.precision)).precision
    lines = []
    for figure in figures(precision, toy=options.toy, threads=options.threads):
        lines.append(json.dumps(figure))
        print(lines[-1], flush=True)
    if not options.toy:
        known = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        others = [line for line in known if json.loads(line)["precision"] != precision]
        results.write_text("\n".join([*others, *lines]) + "\n", encoding="utf-8")

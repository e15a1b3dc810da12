"""The planner's constants for a CPU, from what `planner_memory.py` has measured.

    python benchmarks/planner_fit.py

Prints the constants that the lines with `fitted` give, beside those that `mediphi.planning` holds,
and makes all predictions of the file anew with the latter: nothing is measured again. Then a
summary of the lines that the constants were made from, and of those that they were not.

Memory: what was measured beyond the counted items is a constant of the precision and shares of what
micro-batch and weights take from glibc's heap. Speed: a step's seconds are products at a share of
the peak rate (one for each precision) and bytes at a share of the bandwidth. Least squares of the
relative errors, no constant below zero.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import sides

from mediphi.planning import memory, speed

RESULTS = sides.RESULTS / "planner_memory.jsonl"
PRECISIONS = ("bf16-mixed", "32-true")
MIB = 2**20

Line = dict[str, Any]


def read() -> list[Line]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def write(lines: Iterable[Line]) -> None:
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def predicted(lines: Iterable[Line]) -> list[Line]:
    """The lines with what `mediphi.planning` makes of their quantities."""
    lines = list(lines)
    makers = {"planner memory": _predicted_memory, "planner speed": _predicted_speed}
    return [x | makers[x["figure"]](y) for x, y in zip(lines, with_rates(lines), strict=True)]


def with_rates(lines: Iterable[Line]) -> list[Line]:
    """The fastest rates that a process saw, for all: others on the machine only slow them."""
    lines = list(lines)
    timed = [line for line in lines if line["figure"] == "planner speed"]
    bandwidth = max((line["bandwidth"] for line in timed), default=0.0)
    flops = {
        name: max((x["peak_flops"] for x in timed if x["precision"] == name), default=0.0)
        for name in PRECISIONS
    }

    def best(line: Line) -> Line:
        return {"peak_flops": flops[line["precision"]], "bandwidth": bandwidth}

    return [line | (best(line) if line in timed else {}) for line in lines]


def _predicted_memory(line: Line) -> Line:
    inputs = (MIB * line["in_heap_mib"], MIB * line["weights_in_heap_mib"])
    heap = memory.heap_of(*inputs, precision=line["precision"]) / MIB
    items = line["items_mib"] | {memory.HEAP: round(heap, 1)}
    total = round(sum(items.values()), 1)
    ratio = round(total / line["measured_mib"], 3)
    return {"items_mib": items, "predicted_mib": total, "ratio": ratio}


def _predicted_speed(line: Line) -> Line:
    bandwidth, gloo = line["bandwidth"], speed.Link("gloo", speed.GLOO)
    rates = speed.Rates(line["peak_flops"], bandwidth, "", link=gloo, host=bandwidth)
    factors = speed.FACTORS["cpu", line["precision"]]
    work = speed.Work(**{field.name: line["work"][field.name] for field in fields(speed.Work)})
    rate = line["tokens"] / work.seconds(rates, factors, link=gloo)
    ratio = round(line["measured_tokens_per_s"] / rate, 3)
    return {"predicted_tokens_per_s": round(rate, 1), "measured_over_predicted": ratio}


def told(line: Line) -> str:
    group = "fitted" if line["fitted"] else "not fitted"
    start = f"{line['configuration']:<22}{group:<12}"
    if line["figure"] == "planner memory":
        numbers = (
            f"{line['predicted_mib']:>9.1f} MiB predicted{line['measured_mib']:>9.1f} measured"
        )
        return f"{start}{numbers}{line['ratio']:>7.3f}"
    ours, real = line["predicted_tokens_per_s"], line["measured_tokens_per_s"]
    ratio = line["measured_over_predicted"]
    return f"{start}{ours:>9.1f} tokens/s predicted{real:>9.1f} measured{ratio:>7.3f}"


def heap_constants(lines: Sequence[Line]) -> dict[str, float]:
    """ACTIVATION_GAPS, WEIGHT_GAPS and LIBRARIES (MB), from lines of memory."""

    def row(line: Line) -> list[float]:
        libraries = [1e6 / MIB * (line["precision"] == name) for name in PRECISIONS]
        return [line["in_heap_mib"], line["weights_in_heap_mib"], *libraries]

    def rest(line: Line) -> float:
        counted = (size for name, size in line["items_mib"].items() if name != memory.HEAP)
        return line["measured_mib"] - sum(counted)

    names = ("activation gaps", "weight gaps", *(f"libraries {name}" for name in PRECISIONS))
    found = _least_squares(lines, row, rest, size=lambda line: line["measured_mib"])
    return dict(zip(names, found, strict=True))


def speed_factors(lines: Sequence[Line]) -> dict[str, float]:
    """Shares: products (of each precision) and traffic, from lines of speed."""

    def row(line: Line) -> list[float]:
        work = line["work"]
        products = work["flops"] / line["peak_flops"]
        shares = [products * (line["precision"] == name) for name in PRECISIONS]
        return [*shares, work["traffic"] / line["bandwidth"]]

    def seconds(line: Line) -> float:
        return line["tokens"] / line["measured_tokens_per_s"]

    inverse = _least_squares(lines, row, seconds, size=seconds)
    names = (*(f"products {name}" for name in PRECISIONS), "traffic")
    return {name: 1 / n if n else float("inf") for name, n in zip(names, inverse, strict=True)}


def _least_squares(
    lines: Sequence[Line],
    row: Callable[[Line], list[float]],
    wanted: Callable[[Line], float],
    *,
    size: Callable[[Line], float],
) -> list[float]:
    """Coefficients of `row`, none below zero, that give `wanted`; errors relative to `size`.

    Some are zero: of the least squares over every choice of the others the best counts.
    """
    left = np.array([[n / size(line) for n in row(line)] for line in lines])
    right = np.array([wanted(line) / size(line) for line in lines])
    width = left.shape[1]
    best = np.zeros(width)
    for count in range(1, width + 1):
        for columns in map(list, combinations(range(width), count)):
            found = np.zeros(width)
            found[columns] = np.linalg.lstsq(left[:, columns], right, rcond=None)[0]
            if found.min() >= 0 and _error(left, right, found) < _error(left, right, best):
                best = found
    return best.tolist()


def _error(left: np.ndarray, right: np.ndarray, found: np.ndarray) -> float:
    return float(np.linalg.norm(left @ found - right))


def fitted_constants(lines: Sequence[Line]) -> dict[str, float]:
    """From the lines that say `fitted`."""
    chosen = [line for line in with_rates(lines) if line["fitted"]]
    heap = heap_constants([line for line in chosen if line["figure"] == "planner memory"])
    return heap | speed_factors([line for line in chosen if line["figure"] == "planner speed"])


def held_constants() -> dict[str, float]:
    """Those of `mediphi.planning`."""
    factors = {name: speed.FACTORS["cpu", name] for name in PRECISIONS}
    return {
        "activation gaps": memory.ACTIVATION_GAPS,
        "weight gaps": memory.WEIGHT_GAPS,
        **{f"libraries {name}": memory.LIBRARIES[name] / 1e6 for name in PRECISIONS},
        **{f"products {name}": factors[name].products for name in PRECISIONS},
        "traffic": factors["bf16-mixed"].traffic,
    }


def main() -> None:
    lines = predicted(read())
    write(lines)
    for line in lines:
        print(told(line))
    held = held_constants()
    for name, value in fitted_constants(lines).items():
        print(f"{name:<24}{value:>10.4g} fitted{held[name]:>10.4g} held")
    for figure, key in (("memory", "ratio"), ("speed", "measured_over_predicted")):
        for fitted in (True, False):
            own = [x for x in lines if x["figure"] == f"planner {figure}" and x["fitted"] == fitted]
            ratios = [line[key] for line in own]
            if not own:
                continue
            near = sum(0.9 <= n <= 1.1 for n in ratios)
            print(
                f"{figure}, {'fitted' if fitted else 'not fitted'}: {key} {median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f}), {near} of {len(own)} within 10 %"
            )


if __name__ == "__main__":
    main()

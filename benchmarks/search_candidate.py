"""What a candidate of a search costs before it is scored: built in memory, against mergekit's way.

python benchmarks/search_candidate.py [--methods breadcrumbs ties] [--models 4] [--candidates 4]

Ours: `merge.candidates.Candidates` over checkpoints of half a billion parameters, one thread (or
with `--device cuda` a GPU, which has not been measured); the
deltas and the order of their magnitudes are made once (told apart), then a new density, gamma and
weight for every candidate. mergekit 0.1.5, as its evolutionary search does without vLLM in memory:
merge to disk, then load the files; in one process, imports not counted. Ratios of CPU-seconds
(user+sys). Checkpoints as in `merge.py`. One JSON line a method, printed and written to
`results/search_candidate.jsonl`, where others' lines stay.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import merge as checkpoints

RESULTS = checkpoints.ROOT / "benchmarks" / "results" / "search_candidate.jsonl"
DENSITIES = (0.5, 0.35, 0.8, 0.2, 0.65, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["breadcrumbs", "ties"])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--theirs", type=int, default=1, help="candidates of mergekit")
    parser.add_argument("--layers", type=int, default=checkpoints.LAYERS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--side", choices=("ours", "mergekit"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        names = ["base", *(f"expert{n}" for n in range(arguments.models))]
        count = checkpoints.write_checkpoints(folder, names, layers=arguments.layers)
        for method in arguments.methods:
            if arguments.side:
                if arguments.side == "ours":
                    device, number = arguments.device, arguments.candidates
                    told = ours(folder, names, method, count=number, device=device)
                else:
                    told = theirs(folder, names, method, count=arguments.theirs)
                print(json.dumps(told))
                continue
            keep({"method": method, "parameters": count, **compare(folder, method, sys.argv[1:])})


def compare(folder: Path, method: str, given: list[str]) -> dict[str, Any]:
    """Both sides, each in a process of its own, one after the other."""
    load, found = os.getloadavg()[0], {}
    for side in ("ours", "mergekit"):
        program = [sys.executable, __file__, *given, "--side", side, "--folder", str(folder)]
        done = subprocess.run([*program, "--methods", method], capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.decode()[-800:])
        found[side] = json.loads(done.stdout.decode().splitlines()[-1])
    median = statistics.median
    cpu = {side: median(found[side]["cpu"]) for side in found}
    wall = {side: median(found[side]["wall"]) for side in found}
    return {
        **found,
        **{f"cpu_{side}": cpu[side] for side in cpu},
        "prepared_cpu": found["ours"]["prepared"][0],
        "cpu_ratio": round(cpu["mergekit"] / cpu["ours"], 1),
        "wall_ratio": round(wall["mergekit"] / wall["ours"], 1),
        "environment": {
            "versions": {name: version(name) for name in checkpoints.PACKAGES},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average_before": round(load, 2),
        },
    }


def settings(method: str, number: int) -> dict[str, float]:
    """A candidate's numbers, other ones for each."""
    known = dict(checkpoints.PARAMETERS[method])
    known["weight"] = 0.1 + 0.05 * number
    if "density" in known:
        known["density"] = DENSITIES[number % len(DENSITIES)]
    if "gamma" in known:
        known["gamma"] = 0.01 + 0.02 * number
    return known


def ours(folder: Path, names: list[str], method: str, *, count: int, device: str) -> dict[str, Any]:
    import torch

    from mediphi.merge.candidates import Candidates
    from mediphi.merge.engine import Job, open_parents

    torch.set_num_threads(1)
    models = {name: folder / name for name in names[1:]}
    job = Job(
        method=method,
        models=models,
        base=folder / "base",
        dtype="bfloat16",
        device="cuda" if device == "cuda" else "cpu",
    )
    parents = open_parents(job)
    first = parents.checkpoints[0]
    targets = {
        name: torch.empty(own.shape, dtype=torch.bfloat16, device=device)
        for name, own in first.tensors.items()
    }
    clock = Clock()
    candidates = Candidates(job, parents, targets)
    prepared = clock.lap()
    costs = []
    for number in range(count):
        values = {
            name: (value,) * len(models) if name in ("weight", "density", "gamma") else value
            for name, value in settings(method, number).items()
        }
        clock.lap()
        candidates.build(lambda _, values=values: values)
        if device == "cuda":
            torch.cuda.synchronize()
        costs.append(clock.lap())
    kept = candidates.keeps_deltas
    candidates.close()
    return {"prepared": prepared, "kept_deltas": kept, **split(costs)}


def theirs(folder: Path, names: list[str], method: str, *, count: int) -> dict[str, Any]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file

    target, costs, clock = folder / "mergekit_candidate", [], None
    for number in range(count):
        shutil.rmtree(target, ignore_errors=True)
        body = {
            "merge_method": method,
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / name)} for name in names[1:]],
            "parameters": settings(method, number),
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        clock = Clock()
        options = MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(body), str(target), options)
        for file in target.glob("*.safetensors"):
            load_file(file)
        costs.append(clock.lap())
    shutil.rmtree(target)
    return split(costs)


class Clock:
    """CPU-seconds and seconds since the last lap."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> tuple[float, float]:
        before, self._last = self._last, self._now()
        return round(self._last[0] - before[0], 2), round(self._last[1] - before[1], 2)

    @staticmethod
    def _now() -> tuple[float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime, time.perf_counter()


def split(costs: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {"cpu": [cpu for cpu, _ in costs], "wall": [wall for _, wall in costs]}


def keep(line: dict[str, Any]) -> None:
    """Write the line in the place of the method's earlier one."""
    line = {"figure": "search candidate", **line}
    print(json.dumps(line, indent=1), flush=True)
    text = RESULTS.read_text() if RESULTS.exists() else ""
    kept = [one for one in map(json.loads, text.splitlines()) if one["method"] != line["method"]]
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in [*kept, line]))


if __name__ == "__main__":
    main()

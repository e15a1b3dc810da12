"""Merging models with half a billion parameters: ours against mergekit 0.1.5.

python benchmarks/merge.py [--figures merge candidate] [--methods breadcrumbs ties slerp linear]
                           [--pairs 3] [--models 5] [--candidates 4]

Both sides read the same random bfloat16 checkpoints (a Phi-3 of 0.54 B parameters; experts are the
base plus noise), compute in float32 and write bfloat16.

`merge`: `train.py stage=merge` against `mergekit-yaml`, each in a process of its own, whole,
interleaved (A-B-B-A). Before each process its inputs are read, so that neither side finds them
colder than the other. Told: CPU-seconds (user+sys), seconds, the highest anonymous memory of the
process (beside it that of a process that has imported torch, nothing else), the ratios mergekit /
ours (median of paired ratios), the seconds that a plain read of all inputs and write of one output
take (the floor), and whether both outputs are equal.

`candidate`: what one more candidate of a search costs, see `merge_candidates.py`; of those methods
among the chosen that sum deltas. It needs `pip install lm-eval==0.4.13`.

One JSON line a figure and method, printed and written to `results/merge.jsonl`, where others stay.
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
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import merge_candidates
import yaml
from merge_checkpoints import LAYERS, PACKAGES, PARAMETERS, ROOT, write_checkpoints
from safetensors import safe_open

RESULTS = ROOT / "benchmarks" / "results" / "merge.jsonl"


class Cost(NamedTuple):
    """Of one process: seconds of CPU and wall, MiB of anonymous memory at its highest."""

    cpu: float
    wall: float
    anonymous_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    figures = ["merge", "candidate"]
    parser.add_argument("--figures", nargs="+", choices=figures, default=figures)
    parser.add_argument("--methods", nargs="+", default=["breadcrumbs", "ties", "slerp", "linear"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there")
    merge_candidates.add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        names = ["base", *(f"expert{n}" for n in range(options.models))]
        count = write_checkpoints(folder, names, layers=options.layers)
        for figure in options.figures:
            for method in options.methods:
                told = {"figure": figure, "method": method, "parameters": count}
                if figure == "merge":
                    used = names[:2] if method == "slerp" else names
                    keep({**told, **compare(folder, used, method, pairs=options.pairs)})
                elif "density" in PARAMETERS[method]:
                    keep({**told, **merge_candidates.compare(folder, names, method, options)})


def compare(folder: Path, names: list[str], method: str, *, pairs: int) -> dict[str, Any]:
    """Costs of both sides, interleaved, and whether they agree."""
    sides: dict[str, Callable[[], Cost]] = {
        "ours": lambda: run_ours(folder, names, method),
        "mergekit": lambda: run_mergekit(folder, names, method),
    }
    load = os.getloadavg()[0]
    costs: dict[str, list[Cost]] = {"ours": [], "mergekit": []}
    for number in range(pairs):
        order = ("ours", "mergekit") if number % 2 == 0 else ("mergekit", "ours")
        for side in order:
            read_inputs(folder, names)
            costs[side].append(sides[side]())
            print(method, side, costs[side][-1], file=sys.stderr, flush=True)
    floor = [io_floor(folder, names) for _ in range(2)][-1]
    told: dict[str, Any] = {"models": len(names), "settings": PARAMETERS[method], "pairs": pairs}
    for field in Cost._fields:
        ours = [getattr(cost, field) for cost in costs["ours"]]
        theirs = [getattr(cost, field) for cost in costs["mergekit"]]
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        told |= {
            f"{field}_ours": round(statistics.median(ours), 2),
            f"{field}_mergekit": round(statistics.median(theirs), 2),
            f"{field}_ratio": round(statistics.median(ratios), 2),
            f"{field}_ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
    told["floor_wall"] = round(floor, 2)
    told["anonymous_mib_torch"] = round(importing_torch(), 1)
    told["checkpoint_mib"] = round(weights(folder / names[0]).stat().st_size / 2**20)
    told["output"] = difference(weights(folder / "ours_model"), weights(folder / "mergekit_model"))
    told["environment"] = {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load, 2),
    }
    return told


def run_ours(folder: Path, names: list[str], method: str) -> Cost:
    """`train.py`, with the base and each expert by name; keeps the output as `ours_model`."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    models = [f"merge.models.{name}.path={folder / name}" for name in names[1:]]
    base = [] if method == "linear" else [f"merge.base={folder / 'base'}"]
    if method == "linear":
        models.append(f"merge.models.first.path={folder / 'base'}")
    parameters = [f"merge.parameters.{k}={str(v).lower()}" for k, v in PARAMETERS[method].items()]
    chosen = [f"merge={method}", "name=it", f"paths.runs={runs}", "hardware=cpu", *base]
    program = [sys.executable, str(ROOT / "train.py"), "stage=merge"]
    cost = measured([*program, *chosen, *models, *parameters])
    shutil.rmtree(folder / "ours_model", ignore_errors=True)
    (runs / "merge" / "it" / "model").rename(folder / "ours_model")
    return cost


def run_mergekit(folder: Path, names: list[str], method: str) -> Cost:
    """`mergekit-yaml`, with the same numbers; keeps the output as `mergekit_model`."""
    target = folder / "mergekit_model"
    shutil.rmtree(target, ignore_errors=True)
    used = [*names[1:], "base"] if method == "linear" else names[1:]
    body: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder / name)} for name in used],
        "parameters": PARAMETERS[method],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        body["base_model"] = str(folder / "base")
    recipe = folder / "recipe.yml"
    recipe.write_text(yaml.safe_dump(body))
    program = [str(Path(sys.executable).parent / "mergekit-yaml"), str(recipe), str(target)]
    return measured([*program, "--no-write-model-card", "--quiet"])


def measured(command: list[str]) -> Cost:
    """Run a process to its end; SystemExit where it fails."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    highest = 0.0

    def watch() -> None:
        nonlocal highest
        while process.poll() is None:
            highest = max(highest, anonymous_mib(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}: {output.decode()[-800:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, wall, highest)


def anonymous_mib(pid: int) -> float:
    """Memory that is no file's, now; 0 where the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().split()
        return int(status[status.index("RssAnon:") + 1]) / 1024
    except (OSError, ValueError):
        return 0.0


def importing_torch() -> float:
    """MiB of anonymous memory of a process that has imported torch."""
    program = "import torch; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    status = done.stdout.decode().split()
    return int(status[status.index("RssAnon:") + 1]) / 1024


def read_inputs(folder: Path, names: list[str], out: BinaryIO | None = None) -> None:
    """Read every input once; the first is written to `out` as it comes."""
    block = bytearray(1 << 24)
    for name in names:
        with weights(folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(block):
                if out is not None and name == names[0]:
                    out.write(memoryview(block)[:count])


def io_floor(folder: Path, names: list[str]) -> float:
    """Seconds to read every input once and to write one output, with nothing in between."""
    begun = time.perf_counter()
    with (folder / "floor").open("wb", buffering=0) as out:
        read_inputs(folder, names, out)
        os.fsync(out.fileno())
    (folder / "floor").unlink()
    return time.perf_counter() - begun


def weights(folder: Path) -> Path:
    """The one file of a model folder; mergekit names it as the first of one shard."""
    (found,) = folder.glob("*.safetensors")
    return found


def difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """How many numbers differ between two checkpoints, and by how much at most."""
    differing, total, largest = 0, 0, 0.0
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
            differing += int((x != y).sum())
            total += x.numel()
            largest = max(largest, float((x - y).abs().max()))
    return {"numbers": total, "differing": differing, "largest_difference": largest}


def keep(line: dict[str, Any]) -> None:
    """Write the line in the place of the method's earlier one."""
    print(json.dumps(line, indent=1), flush=True)
    before = (
        [json.loads(one) for one in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    same = (line["figure"], line["method"])
    kept = [one for one in before if (one["figure"], one["method"]) != same]
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in [*kept, line]))


if __name__ == "__main__":
    main()

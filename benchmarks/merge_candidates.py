"""What a candidate of a search costs: built in memory and scored, against mergekit's way.

A part of `merge.py`, which starts this file once for each side.

Ours: `merge.candidates.Candidates` (with `--device cuda` on a GPU, which has not been measured);
what all candidates share is made once (told apart), then a new density, gamma and weight for every
candidate, written over the model in memory, which answers questions of the default validation sets.
mergekit 0.1.5, as its evolutionary search does without vLLM: merge to disk, load the folder by
transformers, score by lm-evaluation-harness. Imports are not counted. Both score the same tokens of
the same questions with weights in bfloat16. Ratios mergekit / ours of CPU-seconds (user+sys) and
seconds, of the merge alone (here build, there merge, write and load) and of all.
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
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from merge_checkpoints import PACKAGES, PARAMETERS

PARTS = ("merge", "score", "whole")
DENSITIES = (0.5, 0.35, 0.8, 0.2, 0.65, 0.95)
SIDES = ("ours", "mergekit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `compare` wants to know."""
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--theirs", type=int, default=1, help="candidates of mergekit")
    parser.add_argument("--questions", type=int, default=4, help="of each validation set")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def main() -> None:
    """One side, in this process; its figures are the last line printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("method")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    add_options(parser)
    options = parser.parse_args()
    side = ours if options.side == "ours" else theirs
    print(json.dumps(side(options.folder, options.names, options.method, options)))


def compare(
    folder: Path, names: list[str], method: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Both sides, each in a process of its own, one after the other."""
    load, found = os.getloadavg()[0], {}
    chosen = [
        f"--{name}={getattr(options, name)}" for name in ("candidates", "theirs", "questions")
    ]
    chosen.append(f"--device={options.device}")
    for side in SIDES:
        program = [sys.executable, __file__, *chosen, side, method, str(folder), *names]
        done = subprocess.run(program, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.decode()[-800:])
        found[side] = json.loads(done.stdout.decode().splitlines()[-1])
    told: dict[str, Any] = {**found}
    for kind in ("cpu", "wall"):
        for part in PARTS:
            own = {s: statistics.median(one[part][kind] for one in found[s]["laps"]) for s in found}
            told |= {f"{part}_{kind}_{side}": value for side, value in own.items()}
            told[f"{part}_{kind}_ratio"] = round(own["mergekit"] / own["ours"], 1)
    first = [found[side]["logps"] for side in SIDES]
    told["largest_logp_difference"] = max(abs(x - y) for x, y in zip(*first, strict=True))
    told["environment"] = {
        "versions": {name: version(name) for name in (*PACKAGES, "lm-eval")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load, 2),
    }
    return {key: value for key, value in told.items() if key not in SIDES} | {
        side: {k: v for k, v in one.items() if k != "logps"} for side, one in found.items()
    }


def settings(method: str, number: int) -> dict[str, float]:
    """A candidate's numbers, other ones for each."""
    known = dict(PARAMETERS[method])
    known["weight"] = 0.1 + 0.05 * number
    if "density" in known:
        known["density"] = DENSITIES[number % len(DENSITIES)]
    if "gamma" in known:
        known["gamma"] = 0.01 + 0.02 * number
    return known


def questions(count: int) -> list[Any]:
    """The first of each default validation set's search part."""
    from merged_experts import composed

    from mediphi.data.validation_sets import build_sets

    config = composed()
    sets = build_sets(config.validation, seed=config.seed)
    return [question for one in sets for question in one.search[:count]]


def ours(folder: Path, names: list[str], method: str, options: argparse.Namespace) -> Any:
    import torch

    from mediphi import engine
    from mediphi.backbone import BackboneSpec, build_model, load_tokenizer, original_positions
    from mediphi.candidate_bench import targets_of
    from mediphi.fitness import encode_sets, score_sets
    from mediphi.merge.candidates import Candidates
    from mediphi.merge.engine import Job, open_parents

    asked = questions(options.questions)
    kernel = "sdpa" if options.device == "cpu" else "varlen"
    device = engine.Device(options.device, "benchmark", "bf16-mixed", kernel)
    models = {name: folder / name for name in names[1:]}
    job = Job(method, models, base=folder / "base", dtype="bfloat16", device=options.device)
    base = str(folder / "base")
    spec = BackboneSpec(folder=base, init="pretrained", revision="main", kernel=device.kernel)
    model = build_model(spec).eval().to(torch.device(options.device))
    sets = encode_sets(
        {"all": asked},
        tokenizer=load_tokenizer(base),
        device=device,
        long_above=original_positions(model.config),
    )
    parents = open_parents(job)
    targets = targets_of(model, parents, job)
    clock, laps, logps = Clock(), [], []
    candidates = Candidates(job, parents, targets)
    prepared = clock.lap()
    for number in range(options.candidates):
        values = {
            name: (value,) * len(models) if name in ("weight", "density", "gamma") else value
            for name, value in settings(method, number).items()
        }
        clock.lap()
        candidates.build(lambda _, values=values: values)
        if options.device == "cuda":
            torch.cuda.synchronize()
        built = clock.lap()
        score_sets(model, sets)
        laps.append(of_parts(built, clock.lap()))
        if number == 0:
            logps = option_logps(model, sets)
    kept = {"deltas": candidates.keeps_deltas, "order": candidates.keeps_order}
    candidates.close()
    return {"prepared": prepared, "kept": kept, "laps": laps, "logps": logps}


def option_logps(model: Any, sets: Any) -> list[float]:
    """The sum of each option's token log-probabilities, question by question."""
    import numpy as np

    from mediphi.fitness import _logps

    found: dict[int, list[float]] = {}
    for one, logps in zip(sets.passes, _logps(model, sets), strict=True):
        sums = iter([float(row.sum()) for row in np.split(logps, np.cumsum(one.lengths)[:-1])])
        for place in one.places:
            found[place] = [next(sums) for _ in sets.questions[place].options]
    return [value for place in sorted(found) for value in found[place]]


def theirs(folder: Path, names: list[str], method: str, options: argparse.Namespace) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from transformers import AutoModelForCausalLM

    from mediphi.backbone import load_tokenizer
    from mediphi.evaluate.multiple_choice import encode

    tokenizer = load_tokenizer(str(folder / "base"))
    encoded = [encode(one, tokenizer=tokenizer) for one in questions(options.questions)]
    requests = [
        (("", ""), list(ids[: one.num_shared]), list(ids[one.num_shared :]))
        for one in encoded
        for ids in one.sequences
    ]
    target, laps, logps = folder / "mergekit_candidate", [], []
    for number in range(options.theirs):
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
        merging = MergeOptions(write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(body), str(target), merging)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
        peer: Any = cast(Any, HFLM)(
            pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=8
        )
        built = clock.lap()
        answers = peer._loglikelihood_tokens(requests, disable_tqdm=True)
        laps.append(of_parts(built, clock.lap()))
        if number == 0:
            logps = [value for value, _ in answers]
    shutil.rmtree(target)
    return {"laps": laps, "logps": logps}


def of_parts(
    built: tuple[float, float], scored: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """CPU-seconds and seconds of each of PARTS."""
    whole = (built[0] + scored[0], built[1] + scored[1])
    values = zip(PARTS, (built, scored, whole), strict=True)
    return {part: {"cpu": round(c, 2), "wall": round(w, 2)} for part, (c, w) in values}


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


if __name__ == "__main__":
    main()

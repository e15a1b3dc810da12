"""The recipe's first half on the bundled data: base, PIT experts, SLERP, BreadCrumbs, a table.

python benchmarks/merged_experts.py [--runs runs/experts] [--corpora medcode medwiki guidelines]
    [--evaluations 150]

Every run is a command of `train.py`, printed before it is started; this script again goes on.
Then every model answers the hold-out part of the validation sets, which no search has chosen by.
The table goes to `results/merged_experts.jsonl` and between the marks in docs/merging.md:
accuracies with intervals, and the difference from the base, paired by question.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "merged_experts.jsonl"
PAGE = ROOT / "docs" / "merging.md"
MARKS = ("<!-- experts:start -->", "<!-- experts:end -->")
PACKAGES = ("mediphi", "torch", "transformers", "cma")
COMMON = ("logger=csv", "model=tiny")
BASE = ("stage=pit", "corpus=medcode")
"""A small model learns little in minutes but codes: so the base knows some."""
STEPS = (
    "stage.phase1.lr=1e-3",
    "stage.phase1.max_steps=100",
    "stage.phase2.lr=1e-3",
    "stage.phase2.max_steps=300",
)
"""Of an expert: few and small ones, so that it stays near the base, as a merge needs."""
SHARES = "stage.grid.t=[0.1,0.25,0.5]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experts"))
    parser.add_argument("--corpora", nargs="+", default=["medcode", "medwiki", "guidelines"])
    parser.add_argument("--evaluations", type=int, default=150)
    arguments = parser.parse_args()
    runs = arguments.runs
    seconds = {
        name: run(runs, name, overrides)
        for name, overrides in commands(runs, arguments.corpora, arguments.evaluations).items()
    }
    models = {name: runs / kind / name / "model" for name, kind in kinds(arguments.corpora).items()}
    rows = score(models)
    surroundings = environment()
    lines = [
        {**row, **shown(row), "seconds": seconds.get(row["model"]), "environment": surroundings}
        for row in rows
    ]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(table(rows))
    print(table(rows))


def commands(runs: Path, corpora: list[str], evaluations: int) -> dict[str, list[str]]:
    """Overrides of every run by its name, in order."""
    base = f"{runs}/pit/base"
    found = {"base": [*BASE]}
    for corpus in corpora:
        found[corpus] = ["stage=pit", f"corpus={corpus}", f"model.path={base}", *STEPS]
    for corpus in corpora:
        found[f"{corpus}_slerp"] = [
            "stage=search",
            "merge=slerp",
            f"merge.models.{corpus}.path={runs}/pit/{corpus}",
            "stage.strategy=grid",
            SHARES,
        ]
    slerped = [f"merge.models.{c}.path={runs}/search/{c}_slerp" for c in corpora]
    search = [f"merge.base={base}", f"stage.evaluations={evaluations}"]
    found["breadcrumbs"] = ["stage=search", "merge=breadcrumbs", *slerped, *search]
    found["soup"] = ["stage=merge", "merge=uniform_soup", *slerped]
    return found


def kinds(corpora: list[str]) -> dict[str, str]:
    """Stage of every run whose model is scored."""
    experts = {corpus: "pit" for corpus in corpora}
    slerped = {f"{corpus}_slerp": "search" for corpus in corpora}
    return {"base": "pit", **experts, **slerped, "soup": "merge", "breadcrumbs": "search"}


def run(runs: Path, name: str, overrides: list[str]) -> float | None:
    """Start `train.py` and wait; seconds, None of a run that was done before.

    Raises:
        SystemExit: it failed.
    """
    was_done = any(runs.glob(f"*/{name}/manifest.json"))
    command = ["train.py", *overrides, f"name={name}", f"paths.runs={runs}", *COMMON]
    print(f"$ python {shlex.join(command)}", flush=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return None if was_done else round(time.monotonic() - begun, 1)


def score(models: dict[str, Path]) -> list[dict[str, Any]]:
    """Hold-out accuracy of every model on every set, and the difference from the first one."""
    from mediphi import engine
    from mediphi.backbone import BackboneSpec, build_model, load_tokenizer
    from mediphi.data.validation_sets import build_sets
    from mediphi.evaluate.scores import improvement, summarise
    from mediphi.fitness import encode_sets, score_sets

    config = composed()
    sets = build_sets(config.validation, seed=config.seed)
    device = engine.resolve(config.hardware, shares_prompts=True)
    encoded = encode_sets(
        {one.name: one.holdout for one in sets},
        tokenizer=load_tokenizer(str(models["base"])),
        device=device,
    )
    rows, first = [], None
    for name, folder in models.items():
        spec = BackboneSpec(
            folder=str(folder), init="pretrained", revision="main", kernel=device.kernel
        )
        scored = score_sets(build_model(spec).eval(), encoded).scored
        items = [one for own in scored.values() for one in own]
        first = items if first is None else first
        gains = improvement(first, items, seed=config.seed, overall=True)
        results = summarise(items, overall=True, seed=config.seed)
        told = {r.group: {**r._asdict(), "gain": gains[r.group]._asdict()} for r in results}
        rows.append({"model": name, "sets": told})
    return rows


def composed() -> Any:
    """The search's own config, for its validation sets."""
    from mediphi.config import load
    from mediphi.door.compose import compose, make_loader
    from mediphi.door.files import tame_hydra

    os.environ.setdefault("MEDIPHI_ROOT", str(ROOT))
    tame_hydra()
    models = ["++merge.models.a.path=a", "++merge.base=b"]
    overrides = ["stage=search", "merge=slerp", *models, *COMMON]
    return load(compose(make_loader(ROOT / "conf"), "config", overrides))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a model, a column a set."""
    cells = [{"model": row["model"], **shown(row)} for row in rows]
    lines = [
        [name.replace("_", " ") for name in cells[0]],
        ["---"] * len(cells[0]),
        *(list(one.values()) for one in cells),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A model's cells, by set; the last one is the difference over all questions."""
    found = {name: cell(result) for name, result in row["sets"].items()}
    gain = list(row["sets"].values())[-1]["gain"]
    mean, low, high = (f"{100 * gain[key]:+.1f}" for key in ("mean", "low", "high"))
    return found | {"difference_from_the_base": f"{mean} [{low}, {high}]"}


def cell(result: dict[str, Any]) -> str:
    return f"{100 * result['score']:.1f} % [{100 * result['low']:.1f}, {100 * result['high']:.1f}]"


def write_page(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")


def environment() -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    main()

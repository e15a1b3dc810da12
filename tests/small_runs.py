"""SFT and DPO runs on a few bundled rows, set up as the program does, for tests of their parts."""

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

from composing import composed
from small_models import ASSETS

from mediphi import training
from mediphi.config import load, run_dir
from mediphi.launch import rank
from mediphi.phases import Training

CORPORA = {"sft": "mediflow", "dpo": "mediflow_dpo"}


def write_rows(path: Path, stage: str, *, count: int, start: int = 0) -> Path:
    """Short rows of the bundled held-out set, one after another from different task types."""
    source = ASSETS.parent / "corpora" / CORPORA[stage] / "heldout.jsonl.xz"
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if len(row["input"]) < 500]
    rows.sort(key=lambda row: len(row["output"]))
    chosen = rows[start :: max(1, (len(rows) - start) // count)][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return path


def set_up(folder: Path, stage: str, *overrides: str, model: Path) -> Training:
    """Everything before the first step: config, data, plan. Rows are written where none are."""
    corpus = CORPORA[stage]
    folder.mkdir(exist_ok=True)
    arguments = [f"stage={stage}", f"corpus={corpus}", f"paths.cache={folder / 'cache'}"]
    for name, side, start in ((corpus, "train", 0), (f"{corpus}_heldout", "heldout", 3)):
        path = folder / f"{stage}_{side}.jsonl"
        if not path.is_file():
            write_rows(path, stage, count=12, start=start)
        arguments.append(f"corpus.sources.{name}.path={path}")
    arguments += [
        f"paths.runs={folder / 'runs'}",
        f"model.architecture={model}",
        "hardware=cpu",
        "hardware.precision=32-true",
        "hardware.num_threads=1",
        "hardware.micro_batch=1",
        "logger=csv",
        "stage.max_length=600",
        "stage.global_batch=2",
        "stage.phase.warmup_steps=0",
    ]
    config = load(composed(*arguments, *overrides))
    if rank() == 0:  # a run directory as it is before its first start
        shutil.rmtree(run_dir(config), ignore_errors=True)
        run_dir(config).mkdir(parents=True)
    return training._set_up(config)


def first_backbone(run: Training) -> Any:
    return training._first_backbone(run)

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


def is_short(row: dict[str, Any]) -> bool:
    """Whether a pair of it fits into the 600 tokens of `set_up`, its prompt once for each side."""
    prompt, answers = row["instruction"] + row["input"], (row["output"], row["rejected_output"])
    length = 2 * len(prompt) + sum(len(answer or "") for answer in answers)
    return len(row["input"]) < 500 and length < 1600


def write_rows(path: Path, stage: str, *, count: int, start: int = 0) -> Path:
    """Short rows of the bundled held-out set, one after another from different task types."""
    source = ASSETS.parent / "corpora" / CORPORA[stage] / "heldout.jsonl.xz"
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if is_short(row)]
    rows.sort(key=lambda row: len(row["output"]))
    chosen = rows[start :: max(1, (len(rows) - start) // count)][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return path


def small_sources(folder: Path, stage: str) -> list[str]:
    """Overrides for a corpus of a few rows. Rows are written where none are."""
    corpus = CORPORA[stage]
    folder.mkdir(exist_ok=True)
    arguments = ["~corpus.sources.questions", "~corpus.sources.questions_heldout"]
    for name, side, start in ((corpus, "train", 0), (f"{corpus}_heldout", "heldout", 3)):
        path = folder / f"{stage}_{side}.jsonl"
        if not path.is_file():
            write_rows(path, stage, count=12, start=start)
        arguments.append(f"corpus.sources.{name}.path={path}")
    return arguments


def set_up(folder: Path, stage: str, *overrides: str, model: Path) -> Training:
    """Everything before the first step: config, data, plan, on a few rows."""
    return set_up_bundled(folder, stage, *small_sources(folder, stage), *overrides, model=model)


def set_up_bundled(folder: Path, stage: str, *overrides: str, model: Path) -> Training:
    """The same on the whole corpus as it is committed."""
    arguments = [
        f"stage={stage}",
        f"corpus={CORPORA[stage]}",
        f"paths.assets={ASSETS.parent}",
        f"paths.cache={folder / 'cache'}",
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

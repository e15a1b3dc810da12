"""From a trained run to an artifact: metrics, report, model card, and last of all the manifest."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

from mediphi import tracking
from mediphi.announcement import announce, read_exams
from mediphi.artifacts import publish, write_atomic
from mediphi.backbone import original_positions
from mediphi.config import config_hash
from mediphi.config.schema import Config
from mediphi.evaluate.scores import Scored
from mediphi.examination import Exam, headline, marks
from mediphi.launch import RunResult, rank
from mediphi.model_card import write_card
from mediphi.phases import Training
from mediphi.report import Table, write_report

Answers = dict[str, list[Scored]]
"""Moment (`before`, `after phase1`, ...) -> what an exam gave then; empty on other ranks than 0."""


def publish_run(run: Training, sat: list[tuple[Exam, Answers]], *, seconds: float) -> RunResult:
    """Write everything that is there to look at; the run is done when the manifest is.

    Args:
        sat: the exams, the one that sweeps compare first.
    """
    metrics = _metrics(run, sat)
    if rank() != 0:
        return RunResult(metrics["objective"]["value"], run.folder)
    config, folder = run.config, run.folder
    tables = read_exams(metrics)
    facts = _facts(run)
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_report(
        folder,
        title=f"{config.stage.kind} on {config.corpus.name}",
        metrics_csv=folder / tracking.METRICS_CSV,
        tables=[Table(table.title, table.rows[0], table.rows[1:]) for table in tables],
        facts=facts,
    )
    counts = _counts(run)
    write_card(folder, config=config, counts=counts, facts=facts, exams=tables)
    publish(
        folder,
        config_hash=config_hash(config),
        parents=run.parents,
        data={
            "fingerprint": run.data.fingerprint,
            "counts": counts,
            "licences": {n: s.licence.model_dump() for n, s in config.corpus.sources.items()},
        },
        extra={
            **facts,
            "seconds": round(seconds, 1),
            "attention": run.device.kernel,
            "longrope": _longrope_policy(run),
            "next": next_command(config, folder),
        },
    )
    return announce(folder)


def _metrics(run: Training, sat: list[tuple[Exam, Answers]]) -> dict[str, Any]:
    """`metrics.json`: what sweeps compare, the last held-out loss, the exams, what was left out."""
    with (run.folder / tracking.METRICS_CSV).open(newline="", encoding="utf-8") as file:
        losses = [float(r["heldout/loss"]) for r in csv.DictReader(file) if r["heldout/loss"]]
    heldout = losses[-1] if losses else None
    exams = {e.metric: marks(e, answers, seed=run.config.seed) for e, answers in sat if answers}
    objective = {"name": "heldout/loss", "value": heldout}
    if exams:
        first = sat[0][0]
        objective = headline(first, exams[first.metric])
    too_long = {side: sum(own.values()) for side, own in run.too_long.items()}
    return {
        "objective": objective,
        "heldout/loss": heldout,
        "exams": exams,
        "too_long": too_long,
    }


def _counts(run: Training) -> dict[str, Any]:
    """What became of each source's rows; those too long for a row are still part of their side."""
    left_out = run.too_long
    counts = {name: dict(count) for name, count in run.data.counts.items()}
    for name in run.config.corpus.sources:
        counts[name] |= {f"{side}_too_long": own.get(name, 0) for side, own in left_out.items()}
    return counts


def _facts(run: Training) -> dict[str, object]:
    plans = [plan.data.train_plan for plan in run.phases]
    return {
        "stage": run.config.stage.kind,
        "corpus": run.config.corpus.name,
        "model": run.config.model.name,
        "parameters": f"{run.budget.num_parameters:,}",
        "steps": f"{sum(plan.num_steps for plan in plans):,}",
        "tokens": f"{sum(plan.num_tokens for plan in plans):,}",
        "device": run.device.name,
        "precision": run.device.precision,
    }


def _longrope_policy(run: Training) -> str:
    """Which rotary factors the tokens were trained with: transformers chooses by micro-batch."""
    boundary = original_positions(run.budget.model_config)
    if boundary is None:
        return "none"
    return f"sequences up to {boundary} tokens by short factors, longer ones apart by long factors"


def next_command(config: Config, folder: Path) -> str:
    """The recipe's next stage from the model in `folder`; behind the last one a sweep over beta.

    The bundled corpora are for the tiny model: too few steps for another's warm-up.
    """
    model, start = config.model, str(folder)
    edition = "" if model.name == "tiny" else "paper/"
    match config.stage.kind:
        case "sft":
            what = f"stage=dpo corpus={edition}mediflow_dpo"
        case "dpo":
            sweep = "--config-dir sweeps --config-name dpo_beta"
            what, start = f"{sweep} stage=dpo corpus={edition}mediflow_dpo", model.path
        case _:
            what = f"stage=sft corpus={edition}mediflow"
    path = shlex.quote(f"model.path={start}") if start else ""
    return f"python train.py {what} model={model.name} {path}".rstrip()

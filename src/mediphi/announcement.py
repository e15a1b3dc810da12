"""The last lines of a run: what came out, where it is, its hash, and the next command."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mediphi.artifacts import manifest_hash, read_manifest
from mediphi.evaluate.scores import Difference, GroupResult, exam_table, format_table
from mediphi.launch import RunResult

TO_LOOK_AT = ("report.html", "search.html", "metrics.csv", "merge.yml", "README.md")


class ExamTable(NamedTuple):
    """What a run was examined in; `rows` are text, header first."""

    title: str
    rows: list[tuple[str, ...]]


def announce(folder: Path) -> RunResult:
    """Print the last lines of a finished run; needs no torch, so that a second start is quick.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    extra = read_manifest(folder)["extra"]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for exam in read_exams(metrics):
        print(f"{exam.title}\n{format_table(exam.rows)}")
    if "search" in metrics:
        print(_search_line(metrics["search"]))
    there = [name for name in TO_LOOK_AT if (folder / name).is_file()]
    print(f"done    {folder}  ({', '.join(there)})")
    print(f"model   {folder / 'model'}")
    print(f"sha256  {manifest_hash(folder)}")
    for offline in sorted(folder.glob("wandb/offline-run-*")):
        print(f"wandb   offline; to upload it: wandb sync {offline}")
    print(f"next    {extra['next']}")
    return RunResult(metrics["objective"]["value"], folder)


def _search_line(found: Mapping[str, Any]) -> str:
    """What the winner of a search is worth."""

    def told(one: Mapping[str, float]) -> str:
        return f"{100 * one['mean']:.1f} % [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"

    parts = [f"search      the best of {found['evaluations']:,}: {100 * found['fitness']:.1f} %"]
    if found["corrected"]:
        parts.append(f"corrected for the choice {told(found['corrected'])}")
    if found["holdout"]:
        parts.append(f"on the hold-out part {told(found['holdout'])}")
    return ", ".join(parts)


def read_exams(metrics: Mapping[str, Any]) -> list[ExamTable]:
    """The tables of the exams in `metrics.json`."""
    return [_table(exam) for exam in metrics["exams"].values()]


def _table(exam: Mapping[str, Any]) -> ExamTable:
    results = {
        moment: [GroupResult(**row) for row in rows.values()]
        for moment, rows in exam["results"].items()
    }
    gains = {group: Difference(**gain) for group, gain in exam["gain"].items()}
    words = {name: exam[name] for name in ("noun", "unit", "baseline") if name in exam}
    rows = exam_table(results, gains, **words)
    return ExamTable(exam["title"], rows)

"""Instructions and preference pairs small enough for runs of seconds, and the commands for them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from end_to_end.tiny_run import SMALL, Ended

Row = dict[str, Any]

DRUGS = ("Aspirin", "Metformin", "Lisinopril", "Warfarin", "Furosemide", "Insulin", "Salbutamol")
SIGNS = ("fever", "chest pain", "a dry cough", "swollen ankles", "blurred vision")
TASKS = ("summarization", "question-answering")
ERRORS = ("omission", "wrong number")
NUM_TRAIN, NUM_HELDOUT = 30, 8
STEPS = 12

SHORT = [a for a in SMALL if not a.startswith("corpus.")]
SHORT += ["stage.eval_every_steps=5", "stage.phase.epochs=9", f"stage.phase.max_steps={STEPS}"]
SHORT += ["stage.phase.warmup_steps=2", "stage.phase.lr=2e-3"]
SFT_STAGE = ["experiment=smoke_sft", *SHORT, "stage.exam.max_new_tokens=24"]
DPO_STAGE = ["experiment=smoke_dpo", *SHORT]


class ChatRun(NamedTuple):
    """A finished run of SFT or DPO."""

    command: list[str]
    run_dir: Path
    ended: Ended


def instruction(number: int) -> Row:
    """A row in MediFlow's format: a note with a question about it, or its summary."""
    drug, sign = DRUGS[number % len(DRUGS)], SIGNS[number % len(SIGNS)]
    note = f"Seen on day {number * 7} with {sign}. {drug} {number * 5 + 10} mg was begun."
    note += " The patient felt well." * (number % 3)
    is_summary = number % 2 == 0
    return {
        "instruction": "Summarise the note." if is_summary else "Which drug was begun?",
        "input": note,
        "output": f"{drug} for {sign}." if is_summary else f"{drug}, {number * 5 + 10} mg.",
        "task_type": TASKS[number % 2],
    }


def pair(number: int) -> Row:
    """The same with a worse answer."""
    row = instruction(number)
    drug = DRUGS[(number + 1) % len(DRUGS)]
    worse = f"{drug}." if number % 3 else f"{row['output']} {drug} {number} mg was stopped."
    return {**row, "rejected_output": worse, "error_type": ERRORS[number % 2]}


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(folder: Path) -> Path:
    """`mediflow` and `mediflow_dpo`, each with a side to train on and one that is held out."""
    makers: dict[str, Callable[[int], Row]] = {"mediflow": instruction, "mediflow_dpo": pair}
    for name, make in makers.items():
        write_rows(folder / name / "train.jsonl", map(make, range(NUM_TRAIN)))
        heldout = range(100, 100 + NUM_HELDOUT)
        write_rows(folder / name / "heldout.jsonl", map(make, heldout))
    return folder


def sources(name: str, folder: Path) -> list[str]:
    """Where the corpus `mediflow` or `mediflow_dpo` finds what `write_chats` wrote."""
    sides = {name: "train", f"{name}_heldout": "heldout"}
    paths = [f"corpus.sources.{s}.path={folder / name / f'{f}.jsonl'}" for s, f in sides.items()]
    return ["~corpus.sources.questions", "~corpus.sources.questions_heldout", *paths]


def sft(folder: Path) -> list[str]:
    """`experiment=smoke_sft` on files of `write_chats`."""
    return [*SFT_STAGE, *sources("mediflow", folder)]


def dpo(folder: Path, model: Path) -> list[str]:
    """`experiment=smoke_dpo` on files of `write_chats`, from the run directory `model`."""
    return [*DPO_STAGE, *sources("mediflow_dpo", folder), f"model.path={model}"]

"""A supervised fine-tuning step on packed conversations against TRL's SFTTrainer, on a CPU.

    python benchmarks/sft_step.py          # in the precision that this CPU is best at
    python benchmarks/sft_step.py --precision 32-true
    python benchmarks/sft_step.py --toy    # correctness only, writes nothing

As `train_step.py`, with the same weights and the same conversations on all sides, in Phi-3.5's chat
format; the loss is of the answers alone. All sides run in the process settings that `train.py`
makes for itself. TRL reads rows of `prompt` and `completion`, whose ids and labels are compared
with ours one by one. (Its way for `messages`, a template with generation markers, also trains the
end of text behind an answer's `<|end|>`.) Where TRL does not pack, it takes 8 conversations a
forward pass, its default.

Figures are per real (non-pad) token that goes through the model, learnt or not. On a CPU TRL's head
multiplies all positions, on a GPU those with a target: one peer is patched to do so here too. Needs
the `benchmarks` extra.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sft_step_sides
import sides
import trainers
from sft_step_sides import ABOUT, SIDES, Row, Task, one_by_one
from train_step import ROWS, our_losses, peer_losses
from train_step_sides import CAPACITY

RESULTS = sides.RESULTS / "sft_step.jsonl"
CORPUS, HELDOUT = "mediflow", 64


def make_task(folder: Path, *, steps: int, precision: str) -> Task:
    """Bundled conversations of up to one row, so that no side leaves any out; random weights."""
    found = {side: bundled_rows(side) for side in ("train", "heldout")}
    mean = sum(len(row.ids) for row in found["train"]) / len(found["train"])
    count = steps * 8 * max(1, round(ROWS * CAPACITY / mean / 8))
    model = trainers.write_model(folder)
    return Task(model, found["train"][:count], found["heldout"][:HELDOUT], steps, precision)


def bundled_rows(side: str) -> list[Row]:
    """Shuffled with a fixed seed; some hundreds are enough."""
    from mediphi.backbone import load_tokenizer
    from mediphi.data.chat import ChatRenderer

    renderer = ChatRenderer(load_tokenizer(str(sides.TINY)))
    records = trainers.bundled_records(CORPUS, stage="sft", side=side)
    random.Random(0).shuffle(records)
    rows = []
    for record in records[:600]:
        *prompt, answer = renderer.conversation(record).pieces
        before = renderer.ids(prompt)
        turns = [[*turn] for turn in record.turns]
        ids = [*before, *renderer.ids([answer])]
        rows.append(Row(turns, dict(record.labels), ids, len(before)))
    return [row for row in rows if len(row.ids) <= CAPACITY and len(row.turns) <= 3]


def check_parity(task: Task) -> dict[str, Any]:
    """Loss and gradient of all sides on one batch of conversations, in float32.

    Raises:
        AssertionError: a loss is more than 1e-4 off the reference, or a gradient 1e-3 of its norm.
    """
    trainers.quiet_peers()
    few = task._replace(train=task.train[:16], steps=1, precision="32-true")
    model = trainers.peer_model(task.model).train()
    wanted = trainers.backward(model, iter([one_by_one(model, few.train)]))
    report: dict[str, Any] = {"loss": round(wanted[0], 6)}
    for side in SIDES:
        with tempfile.TemporaryDirectory() as name:
            got = trainers.backward(*side_losses(few, Path(name), side=side))
        report[side] = trainers.compare(side, got, wanted)
    return report


def side_losses(task: Task, folder: Path, *, side: str) -> tuple[Any, Iterator[Any]]:
    """The side's model, and its loss of every micro-batch of the one step, which add up."""
    if side == "ours":
        data = sft_step_sides.packed_data(task, folder)
        return our_losses(trainers.language_model_module(task.model, data), data)
    return peer_losses(sft_step_sides.peer_trainer(task, folder, side=side, meter=sides.Meter()))


def figures(precision: str, *, toy: bool, threads: int) -> Iterator[dict[str, Any]]:
    """One line per peer, all from the same runs of ours."""
    setting = sides.environment(threads)
    with tempfile.TemporaryDirectory() as name:
        task = make_task(Path(name), steps=1 if toy else 3, precision=precision)
        parity = check_parity(task)
        print(f"parity holds: {parity}", file=sys.stderr, flush=True)
        peak = sides.peak_rate(precision, threads=threads)
        script = sft_step_sides.__file__
        measured = sides.measure(SIDES, script, task, toy=toy, threads=threads)
        peak = max(peak, sides.peak_rate(precision, threads=threads))
        tokens = sum(task.lengths)
        attended = sum(map(trainers.triangle, task.lengths))
        floor = trainers.floor_flops(
            task.model, tokens=tokens, attended=attended, targets=task.num_targets
        )
        floor /= tokens
    setting["load_average_after"] = sides.load_average()
    ours = measured.pop("ours")
    for peer, runs in measured.items():
        mine, theirs = sides.memory(*ours), sides.memory(*runs)
        yield {
            "figure": "SFT step, CPU, tiny",
            "precision": precision,
            "peer": peer,
            "peer_is": ABOUT[peer],
            "runs": len(runs[1]),
            **sides.token_ratios(ours, runs),
            "memory_ratio": round(theirs["peak_mib_above_start"] / mine["peak_mib_above_start"], 2),
            "ours": sides.token_figures(*ours, floor=floor, peak=peak),
            "theirs": sides.token_figures(*runs, floor=floor, peak=peak),
            "floor_kflop_per_token": round(floor / 1e3, 1),
            "matmul_gflops": round(peak / 1e9),
            "parity": {"loss": parity["loss"], "ours": parity["ours"], "theirs": parity[peer]},
            "data": {
                "corpus": CORPUS,
                "longest": CAPACITY,
                "conversations": len(task.train),
                "tokens": tokens,
                "targets": task.num_targets,
            },
            **setting,
        }


if __name__ == "__main__":
    sides.run_benchmark(figures, doc=__doc__, results=RESULTS)

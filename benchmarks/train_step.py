"""A training step on packed rows against TRL's SFTTrainer: same weights, same documents, on a CPU.

    python benchmarks/train_step.py          # in the precision that this CPU is best at
    python benchmarks/train_step.py --precision 32-true
    python benchmarks/train_step.py --toy    # correctness only, writes nothing

Every side is a process of its own that stays alive, in the process settings that `train.py` makes
for itself; each timed run is a fresh trainer on the same initial weights, and the sides take turns
A-B-C-D, D-C-B-A. Parity is checked before anything is timed: on one batch the token-mean loss and
the gradient of every side, in float32, against the documents going through the model one by one.
Where TRL does not pack, it takes 8 documents a forward pass, its default. Figures are per real
(non-pad) token.

FLOPs are those of torch's FlopCounterMode, with a formula for the CPU's flash attention, which the
counter does not know (a causal call counts the triangle, a call with a mask the square that it
computes), and for the in-place product in TRL's loss, which it does not know either. Needs the
`benchmarks` extra.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sides
import train_step_sides
import trainers
from train_step_sides import ABOUT, CAPACITY, SIDES, Task, one_by_one

RESULTS = sides.RESULTS / "train_step.jsonl"
ROWS = 16
CORPORA = ("medcode", "pubmed", "clinical")


def make_task(folder: Path, *, steps: int, precision: str) -> Task:
    """Bundled documents of up to one row, so that no side cuts or splits any; random weights."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sides.TINY / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    texts = bundled_texts()
    ids = [[*e.ids, eos] for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    fitting = [i for i, row in enumerate(ids) if len(row) <= CAPACITY]
    heldout, rest = fitting[:100], fitting[100:]
    mean = sum(len(ids[i]) for i in rest) / len(rest)
    used = rest[: steps * 8 * max(1, round(ROWS * CAPACITY / mean / 8))]
    return Task(
        trainers.write_model(folder),
        [texts[i] for i in used],
        [ids[i] for i in used],
        [ids[i] for i in heldout],
        steps,
        precision,
    )


def bundled_texts() -> list[str]:
    """The same number of documents of every corpus, shuffled with a fixed seed."""
    corpora = [[d.text for d in trainers.bundled_records(c, stage="dapt")] for c in CORPORA]
    smallest = min(map(len, corpora))
    chosen = [text for texts in corpora for text in random.Random(0).sample(texts, smallest)]
    random.Random(0).shuffle(chosen)
    return chosen


def check_parity(task: Task) -> dict[str, Any]:
    """Loss and gradient of all sides on one batch of documents, in float32.

    Raises:
        AssertionError: a loss is more than 1e-4 off the reference, or a gradient 1e-3 of its norm.
    """
    trainers.quiet_peers()
    few = task._replace(train=task.train[:6], texts=task.texts[:6], steps=1, precision="32-true")
    model = trainers.peer_model(task.model).train()
    wanted = trainers.backward(model, iter([one_by_one(model, few.train)]))
    report: dict[str, Any] = {"loss": round(wanted[0], 6)}
    with tempfile.TemporaryDirectory() as name:
        for side in SIDES:
            got = trainers.backward(*side_losses(few, Path(name), side=side))
            report[side] = trainers.compare(side, got, wanted)
    return report


def side_losses(task: Task, folder: Path, *, side: str) -> tuple[Any, Iterator[Any]]:
    """The side's model, and its loss of every micro-batch of the one step, which add up."""
    if side == "ours":
        data = train_step_sides.packed_data(task, folder)
        return our_losses(trainers.language_model_module(task.model, data), data)
    return peer_losses(train_step_sides.peer_trainer(task, folder, side=side, meter=sides.Meter()))


def our_losses(module: Any, data: Any) -> tuple[Any, Iterator[Any]]:
    module.configure_model()
    batches = data.train_dataloader()
    return module.backbone, (module.loss(b).total / b.num_global_targets for b in batches)


def peer_losses(trainer: Any) -> tuple[Any, Iterator[Any]]:
    inputs = list(trainer.get_train_dataloader())
    targets = sum((i["labels"][:, 1:] != -100).sum() for i in inputs)
    model = trainer.model.train()
    return model, (trainer.compute_loss(model, i, num_items_in_batch=targets) for i in inputs)


def figures(precision: str, *, toy: bool, threads: int) -> Iterator[dict[str, Any]]:
    """One line per peer, all from the same runs of ours."""
    setting = sides.environment(threads)
    with tempfile.TemporaryDirectory() as name:
        task = make_task(Path(name), steps=1 if toy else 3, precision=precision)
        parity = check_parity(task)
        print(f"parity holds: {parity}", file=sys.stderr, flush=True)
        peak = sides.peak_rate(precision, threads=threads)
        script = train_step_sides.__file__
        measured = sides.measure(SIDES, script, task, toy=toy, threads=threads)
        peak = max(peak, sides.peak_rate(precision, threads=threads))
        tokens = sum(task.lengths)
        attended = sum(map(trainers.triangle, task.lengths))
        floor = (
            trainers.floor_flops(task.model, tokens=tokens, attended=attended, targets=tokens)
            / tokens
        )
    setting["load_average_after"] = sides.load_average()
    ours = measured.pop("ours")
    for peer, runs in measured.items():
        yield {
            "figure": "training step, CPU, tiny",
            "precision": precision,
            "peer": peer,
            "peer_is": ABOUT[peer],
            "pairs": len(runs[1]),
            **sides.token_ratios(ours, runs),
            "ours": sides.token_figures(*ours, floor=floor, peak=peak),
            "theirs": sides.token_figures(*runs, floor=floor, peak=peak),
            "floor_kflop_per_token": round(floor / 1e3, 1),
            "matmul_gflops": round(peak / 1e9),
            "parity": {"loss": parity["loss"], "ours": parity["ours"], "theirs": parity[peer]},
            "data": {
                "corpora": CORPORA,
                "longest": CAPACITY,
                "documents": len(task.train),
                "tokens": tokens,
            },
            **setting,
        }


if __name__ == "__main__":
    sides.run_benchmark(figures, doc=__doc__, results=RESULTS)

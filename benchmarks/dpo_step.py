"""A DPO step on packed pairs against TRL's DPOTrainer: same weights, same pairs, on a CPU.

    python benchmarks/dpo_step.py          # in the precision that this CPU is best at
    python benchmarks/dpo_step.py --precision 32-true
    python benchmarks/dpo_step.py --toy    # correctness only, writes nothing

Every side is a process of its own that stays alive, in the process settings that `train.py` makes
for itself; each timed run is a fresh trainer on the same initial weights, and the sides take turns,
there and back. Every optimizer step holds the same pairs on all sides. For that each step is packed
apart: a plan over a whole corpus fills its rows with whatever pairs fit. Both sides compute in
Phi-3.5's chat format, whose ids are compared.

Parity is checked before anything is timed, in float32, at weights moved away from the reference:
the loss and gradient of the first steps of every side against the pairs going through the model
one by one. In float32 the losses of all steps of the runs are held to the same 1e-4.

The reference model's log-probabilities cost a pass before training, once (ours are kept on disk for
every later run). The ratios are of training; `with_reference_wall_ratio` has that pass in both
sides. The peer that asks its reference beside every step pays for it in training.

Of TRL's settings, `padding_free` does nothing in 1.16 (it warns and pads). 8 pairs a forward pass
is its default; larger batches pad more. Its recomputation of activations is off, for it costs time.
On a CPU its head multiplies all positions, on a GPU those of the answers: one peer is patched to do
so here too. FLOPs as in `train_step.py`. Needs the `benchmarks` extra.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import dpo_step_sides
import sides
import trainers
from dpo_step_sides import ABOUT, SIDES, Pair, Task
from sides import Measured, Run

RESULTS = sides.RESULTS / "dpo_step.jsonl"
CORPUS, LONGEST, PARITY_STEPS, HELDOUT = "mediflow_dpo", 256, 2, 16


def make_task(folder: Path, *, steps: int, per_step: int, precision: str) -> Task:
    """Bundled pairs of up to `LONGEST` tokens, so that no side leaves any out; random weights."""
    found = {side: bundled_pairs(side) for side in ("train", "heldout")}
    train = found["train"][: steps * per_step]
    return Task(
        trainers.write_model(folder),
        [train[i : i + per_step] for i in range(0, len(train), per_step)],
        found["heldout"][:HELDOUT],
        precision,
    )


def bundled_pairs(side: str) -> list[Pair]:
    """Shuffled with a fixed seed; some hundreds are enough."""
    from mediphi.backbone import load_tokenizer
    from mediphi.data.chat import ChatRenderer

    renderer = ChatRenderer(load_tokenizer(str(sides.TINY)))
    records = trainers.bundled_records(CORPUS, stage="dpo", side=side)
    random.Random(0).shuffle(records)
    pairs = []
    for record in records[:600]:
        *prompt, chosen, rejected = renderer.preference(record).pieces
        parts = [renderer.ids(prompt), renderer.ids([chosen]), renderer.ids([rejected])]
        turns = [[*turn] for turn in record.prompt]
        pairs.append(Pair(turns, record.chosen, record.rejected, dict(record.labels), parts))
    return [pair for pair in pairs if pair.longest <= LONGEST]


# ---------------------------------------------------------------------------------- parity
def check_parity(task: Task) -> dict[str, Any]:
    """Loss and gradient of all sides on the first optimizer steps, in float32.

    Raises:
        AssertionError: a loss is more than 1e-4 off the reference, or a gradient 1e-3 of its norm.
    """
    trainers.quiet_peers()
    few = task._replace(train=task.train[:PARITY_STEPS], precision="32-true")
    wanted = list(step_gradients(*expected_losses(few), steps=few.train))
    report: dict[str, Any] = {"losses": [round(loss, 6) for loss, _ in wanted]}
    for side in SIDES:
        with tempfile.TemporaryDirectory() as name:
            model, losses = side_losses(few, Path(name), side=side)
            got = step_gradients(model, losses, steps=few.train)
            offs = [trainers.compare(side, *both) for both in zip(got, wanted, strict=True)]
        report[side] = {key: max(off[key] for off in offs) for key in offs[0]}
    return report


def step_gradients(model: Any, losses: Any, *, steps: list[Any]) -> Iterator[tuple[float, Any]]:
    """Loss and gradient of every step; `losses` has so many losses a step, or all of it."""
    per_pass, values = losses
    for step in steps:
        yield trainers.backward(model, islice(values, len(step) // per_pass))


def nudge(model: Any) -> None:
    """Away from the reference, the same way every time: at it every loss is log 2."""
    import torch

    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def expected_losses(task: Task) -> tuple[Any, Any]:
    """Each pair alone, by transformers and the equation."""
    import torch

    model = trainers.peer_model(task.model).train()
    with torch.no_grad():
        references = [dpo_step_sides.answer_logps(model, pair) for pair in task.pairs]
    nudge(model)
    per_step = len(task.train[0])
    return model, (
        1,
        (
            dpo_step_sides.one_by_one(model, *both) / per_step
            for both in zip(task.pairs, references, strict=True)
        ),
    )


def side_losses(task: Task, folder: Path, *, side: str) -> tuple[Any, Any]:
    """The side's model; the pairs of a pass, and the losses of passes, which add up to a step's."""
    meter, per_step = sides.Meter(), len(task.train[0])
    if side == "ours":
        plans = dpo_step_sides.step_plans(task, folder)
        references = dpo_step_sides.reference_pass(task, plans, meter)
        loader = dpo_step_sides.StepLoader(plans, references)
        module = dpo_step_sides.dpo_module(task, loader)
        module.configure_model()
        nudge(module.backbone)
        steps = (module.training_step(batch, 0) / module.splits for batch in loader)
        return module.backbone, (per_step // module.splits, steps)
    trainer = dpo_step_sides.peer_trainer(task, folder, side=side, meter=meter)
    model, per_pass = trainer.model.train(), trainer.args.per_device_train_batch_size
    nudge(model)
    inputs = trainer.get_train_dataloader()
    losses = (trainer.compute_loss(model, own) * (per_pass / per_step) for own in inputs)
    return model, (per_pass, losses)


def compare_losses(measured: dict[str, Measured], *, precision: str) -> dict[str, float]:
    """The largest difference from ours in any step's loss, in any run of a peer's.

    Raises:
        AssertionError: more than 1e-4, where all computed in float32.
    """
    ours = step_losses(measured["ours"][0])
    found = {}
    for name, (counted, runs) in measured.items():
        losses = [step_losses(run) for run in (counted, *runs)]
        off = max(abs(a - b) for own in losses for a, b in zip(own, ours, strict=True))
        assert off < 1e-4 or precision != "32-true", f"{name}: losses {off} off while training"
        found[name] = float(f"{off:.1e}")
    return found


def step_losses(run: Run) -> list[float]:
    passes = len(run.losses) // run.steps
    return [sum(run.losses[i : i + passes]) for i in range(0, len(run.losses), passes)]


# ---------------------------------------------------------------------------------- figures
def pair_floor(task: Task) -> float:
    """FLOPs a pair: prompt and both answers once, logits of the answers."""
    tokens = attended = targets = 0
    for prompt, *answers in (map(len, pair.parts) for pair in task.pairs):
        tokens += prompt + sum(answers)
        attended += trainers.triangle(prompt)
        attended += sum(prompt * answer + trainers.triangle(answer) for answer in answers)
        targets += sum(answers)
    floor = trainers.floor_flops(task.model, tokens=tokens, attended=attended, targets=targets)
    return floor / len(task.pairs)


def side_figures(counted: Run, runs: list[Run], *, floor: float, peak: float) -> dict[str, Any]:
    """Per pair; `floor` is FLOPs a pair that nobody can save, `peak` FLOP/s."""
    wall = median(run.wall / run.pairs for run in runs)
    reference = [run.reference for run in runs]
    return {
        "pairs_per_s": round(1 / wall, 1),
        "cpu_ms_per_pair": round(1e3 * median(run.cpu / run.pairs for run in runs), 2),
        "mflop_per_pair": round(counted.flops / counted.pairs / 1e6, 1),
        "attention_mflop_per_pair": round(counted.attention_flops / counted.pairs / 1e6, 1),
        "flops_over_floor": round(counted.flops / counted.pairs / floor, 3),
        "wall_over_floor": round(wall * peak / floor, 2),
        "tokens_per_pair": round(counted.tokens / counted.pairs, 1),
        "positions_per_pair": round(counted.positions / counted.pairs, 1),
        "steps": counted.steps,
        "first_losses": [round(loss, 5) for loss in step_losses(counted)[:4]],
        "heldout_loss": round(runs[-1].heldout, 4),
        **sides.memory(counted, runs),
        "reference_pass": {
            "wall_ms_per_pair": round(1e3 * median(r.wall for r in reference) / counted.pairs, 2),
            "cpu_ms_per_pair": round(1e3 * median(r.cpu for r in reference) / counted.pairs, 2),
            "mflop_per_pair": round(counted.reference.flops / counted.pairs / 1e6, 1),
        },
    }


def pair_ratios(ours: Measured, peer: Measured) -> dict[str, Any]:
    """Peer over ours per pair, both with as many."""
    mine, theirs = (sides.memory(*side) for side in (ours, peer))
    ratio, runs = sides.ratio, (ours[1], peer[1])
    return {
        **ratio(*runs, lambda run: run.wall, name="wall"),
        **ratio(*runs, lambda run: run.cpu, name="cpu"),
        "flops_ratio": round(peer[0].flops / ours[0].flops, 2),
        "memory_ratio": round(theirs["peak_mib_above_start"] / mine["peak_mib_above_start"], 2),
        **ratio(*runs, lambda run: run.wall + run.reference.wall, name="with_reference_wall"),
    }


def figures(precision: str, *, toy: bool, threads: int) -> Iterator[dict[str, Any]]:
    """One line per peer, all from the same runs of ours."""
    setting = sides.environment(threads)
    steps, per_step = (2, 8) if toy else (3, 32)
    with tempfile.TemporaryDirectory() as name:
        task = make_task(Path(name), steps=steps, per_step=per_step, precision=precision)
        parity = check_parity(task)
        print(f"parity holds: {parity}", file=sys.stderr, flush=True)
        peak = sides.peak_rate(precision, threads=threads)
        script = dpo_step_sides.__file__
        measured = sides.measure(SIDES, script, task, toy=toy, threads=threads)
        peak = max(peak, sides.peak_rate(precision, threads=threads))
        floor = pair_floor(task)
    trained = compare_losses(measured, precision=precision)
    setting["load_average_after"] = sides.load_average()
    ours = measured.pop("ours")
    for peer, runs in measured.items():
        yield {
            "figure": "DPO step, CPU, tiny",
            "precision": precision,
            "peer": peer,
            "peer_is": ABOUT[peer],
            "runs": len(runs[1]),
            **pair_ratios(ours, runs),
            "ours": side_figures(*ours, floor=floor, peak=peak),
            "theirs": side_figures(*runs, floor=floor, peak=peak),
            "floor_mflop_per_pair": round(floor / 1e6, 1),
            "matmul_gflops": round(peak / 1e9),
            "parity": {
                "losses": parity["losses"],
                "ours": parity["ours"],
                "theirs": parity[peer],
                "training_losses_off": trained[peer],
            },
            "data": {
                "corpus": CORPUS,
                "longest": LONGEST,
                "pairs": len(task.pairs),
                "pairs_per_step": per_step,
                "tokens_per_part": mean_parts(task),
            },
            **setting,
        }


def mean_parts(task: Task) -> dict[str, float]:
    columns = zip(*(map(len, pair.parts) for pair in task.pairs), strict=True)
    names = ("prompt", "chosen", "rejected")
    return {n: round(sum(c) / len(task.pairs), 1) for n, c in zip(names, columns, strict=True)}


if __name__ == "__main__":
    sides.run_benchmark(figures, doc=__doc__, results=RESULTS)

"""A training step on packed rows against TRL's SFTTrainer: same weights, same documents, on a CPU.

    python benchmarks/train_step.py          # in the precision that this CPU is best at
    python benchmarks/train_step.py --precision 32-true
    python benchmarks/train_step.py --toy    # correctness only, writes nothing

Every side is a process of its own that stays alive; each timed run is a fresh trainer on the same
initial weights, and the sides take turns A-B-C-D, D-C-B-A. Parity is checked before anything is
timed: on one batch the token-mean loss and the gradient of every side, in float32, against the
documents going through the model one by one. Figures are per real (non-pad) token.

FLOPs are those of torch's FlopCounterMode, with a formula for the CPU's flash attention, which the
counter does not know (a causal call counts the triangle, a call with a mask the square that it
computes), and for the in-place product in TRL's loss, which it does not know either. Needs the
`benchmarks` extra.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import train_step_sides as sides
from train_step_sides import ABOUT, CAPACITY, ROOT, SIDES, TINY, Run, Task, one_by_one

RESULTS = Path(__file__).parent / "results" / "train_step.jsonl"
ROWS = 16
CORPORA = ("medcode", "pubmed", "clinical")


class Side:
    """A worker process and its runs."""

    def __init__(self, name: str, task_file: Path, *, threads: int) -> None:
        self.name, self.runs = name, []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, sides.__file__, name, str(task_file)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def run(self, what: str) -> Run:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self.errors.read()[-3000:]}")
        run = Run(*json.loads(answer))
        print(f"{what} {self.name}: {run.wall:.1f} s, cpu {run.cpu:.1f} s", file=sys.stderr)
        return run

    def end(self) -> None:
        self.process.communicate()


def make_task(folder: Path, *, steps: int, precision: str) -> Task:
    """Bundled documents of up to one row, so that no side cuts or splits any; random weights."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    texts = bundled_texts()
    ids = [[*e.ids, eos] for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    fitting = [i for i, row in enumerate(ids) if len(row) <= CAPACITY]
    heldout, rest = fitting[:100], fitting[100:]
    mean = sum(len(ids[i]) for i in rest) / len(rest)
    used = rest[: steps * 8 * max(1, round(ROWS * CAPACITY / mean / 8))]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    model.save_pretrained(folder / "model")
    return Task(
        str(folder / "model"),
        [texts[i] for i in used],
        [ids[i] for i in used],
        [ids[i] for i in heldout],
        steps,
        precision,
    )


def bundled_texts() -> list[str]:
    """The same number of documents of every corpus, shuffled with a fixed seed."""
    from hydra import compose, initialize_config_dir

    from mediphi.config import load
    from mediphi.data.corpora import read_documents

    corpora: list[list[str]] = []
    for corpus in CORPORA:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = load(compose("config", [f"corpus={corpus}", f"paths.assets={ROOT}/assets"]))
        with read_documents(config.corpus) as reading:
            corpora.append([document.text for document in reading.records("train")])
    smallest = min(map(len, corpora))
    chosen = [text for texts in corpora for text in random.Random(0).sample(texts, smallest)]
    random.Random(0).shuffle(chosen)
    return chosen


def check_parity(task: Task) -> dict[str, Any]:
    """Loss and gradient of all sides on one batch of documents, in float32.

    Raises:
        AssertionError: a loss is more than 1e-4 off the reference, or a gradient 1e-3 of its norm.
    """
    import torch
    from transformers import AutoModelForCausalLM

    few = task._replace(train=task.train[:6], texts=task.texts[:6], steps=1, precision="32-true")
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32").train()
    loss = one_by_one(model, few.train)
    loss.backward()
    expected = float(loss.detach())
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    report: dict[str, Any] = {"loss": round(expected, 6)}
    with tempfile.TemporaryDirectory() as name:
        for side in SIDES:
            trained, losses = side_losses(few, Path(name), side=side)
            loss = sum(losses)
            loss.backward()
            grads = torch.cat([p.grad.flatten() for p in trained.parameters()])
            off = abs(float(loss.detach()) - expected)
            grad_off = float((grads - wanted).norm() / wanted.norm())
            assert off < 1e-4 and grad_off < 1e-3, f"{side}: loss {off}, gradient {grad_off} off"
            report[side] = {"loss_off": float(f"{off:.1e}"), "grad_off": float(f"{grad_off:.1e}")}
    return report


def side_losses(task: Task, folder: Path, *, side: str) -> tuple[Any, list[Any]]:
    """The side's model, and its loss of every micro-batch of the one step, which add up."""
    if side == "ours":
        data = sides.packed_data(task, folder)
        module = sides.our_module(task, data)
        module.configure_model()
        batches = list(data.train_dataloader())
        return module.backbone, [module.loss(b).total / b.num_global_targets for b in batches]
    trainer = sides.peer_trainer(task, folder, side=side, meter=sides.Meter())
    inputs = list(trainer.get_train_dataloader())
    targets = sum((i["labels"][:, 1:] != -100).sum() for i in inputs)
    model = trainer.model.train()
    return model, [trainer.compute_loss(model, i, num_items_in_batch=targets) for i in inputs]


def measure(task_file: Path, *, rounds: int, threads: int) -> dict[str, tuple[Run, list[Run]]]:
    """Per side the run that counted FLOPs (it warms up too) and the timed ones, in turns."""
    workers = [Side(name, task_file, threads=threads) for name in SIDES]
    counted = {side.name: side.run("flops") for side in workers}
    for number in range(rounds):
        for side in workers if number % 2 == 0 else workers[::-1]:
            side.runs.append(side.run("time"))
    for side in workers:
        side.end()
    steps = {name: run.steps for name, run in counted.items()}
    assert len(set(steps.values())) == 1, f"the sides differ in optimizer steps: {steps}"
    return {side.name: (counted[side.name], side.runs) for side in workers}


def side_figures(counted: Run, runs: list[Run], *, floor: float, peak: float) -> dict[str, Any]:
    """Per real token; `floor` is FLOPs a token that nobody can save, `peak` FLOP/s."""
    wall = median(run.wall / run.tokens for run in runs)
    return {
        "tokens_per_s": round(1 / wall),
        "cpu_us_per_token": round(1e6 * median(run.cpu / run.tokens for run in runs), 2),
        "kflop_per_token": round(counted.flops / counted.tokens / 1e3, 1),
        "attention_kflop_per_token": round(counted.attention_flops / counted.tokens / 1e3, 1),
        "flops_over_floor": round(counted.flops / counted.tokens / floor, 3),
        "wall_over_floor": round(wall * peak / floor, 2),
        "positions_per_token": round(counted.positions / counted.tokens, 3),
        "tokens_per_step": round(counted.tokens / counted.steps),
        "steps": counted.steps,
        "heldout_loss": round(runs[-1].heldout, 4),
        "peak_mib": round(max(run.peak_mib for run in runs)),
        "peak_mib_above_start": round(max(run.peak_mib for run in runs) - counted.before_mib),
    }


def ratios(ours: tuple[Run, list[Run]], peer: tuple[Run, list[Run]]) -> dict[str, Any]:
    """Peer over ours per real token: medians of paired runs with their spread."""
    figures: dict[str, Any] = {"pairs": len(ours[1])}
    for what in ("wall", "cpu"):
        paired = [
            (getattr(b, what) / b.tokens) / (getattr(a, what) / a.tokens)
            for a, b in zip(ours[1], peer[1], strict=True)
        ]
        figures[f"{what}_ratio"] = round(median(paired), 2)
        figures[f"{what}_ratio_spread"] = [round(min(paired), 2), round(max(paired), 2)]
    a, b = (run.flops / run.tokens for run in (ours[0], peer[0]))
    return {**figures, "flops_ratio": round(b / a, 2)}


def floor_flops(task: Task) -> float:
    """Per token: six for each weight in a matrix product, and attention's causal triangle."""
    from transformers import AutoModelForCausalLM

    from mediphi.engine import training_flops

    model = AutoModelForCausalLM.from_pretrained(task.model)
    tokens = sum(map(len, task.train))
    return (
        training_flops(
            num_matmul_parameters=sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1)
            - model.get_input_embeddings().weight.numel(),
            hidden=model.config.hidden_size,
            layers=model.config.num_hidden_layers,
            pairs=sum(len(ids) * (len(ids) + 1) // 2 for ids in task.train),
            tokens=tokens,
        )
        / tokens
    )


def peak_rate(precision: str, *, threads: int) -> float:
    """FLOP/s of a large matrix product here, in this precision."""
    import torch

    from mediphi.engine import Device, peak_flops

    torch.set_num_threads(threads)
    return max(peak_flops(Device("cpu", "", precision, "sdpa")) for _ in range(5))


def environment(threads: int) -> dict[str, Any]:
    packages = ("mediphi", "torch", "lightning", "transformers", "trl", "datasets", "accelerate")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": threads,
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def figures(precision: str, *, toy: bool, threads: int) -> Iterator[dict[str, Any]]:
    """One line per peer, all from the same runs of ours."""
    setting = environment(threads)
    with tempfile.TemporaryDirectory() as name:
        task = make_task(Path(name), steps=1 if toy else 3, precision=precision)
        parity = check_parity(task)
        print(f"parity holds: {parity}", file=sys.stderr, flush=True)
        task_file = Path(name) / "task.json"
        task_file.write_text(json.dumps(task))
        peak = peak_rate(precision, threads=threads)
        measured = measure(task_file, rounds=1 if toy else 5, threads=threads)
        peak = max(peak, peak_rate(precision, threads=threads))
        floor = floor_flops(task)
    setting["load_average_after"] = round(os.getloadavg()[0], 2)
    ours = measured.pop("ours")
    sizes = {"documents": len(task.train), "tokens": sum(map(len, task.train))}
    for peer, runs in measured.items():
        yield {
            "figure": "training step, CPU, tiny",
            "precision": precision,
            "peer": peer,
            "peer_is": ABOUT[peer],
            **ratios(ours, runs),
            "ours": side_figures(*ours, floor=floor, peak=peak),
            "theirs": side_figures(*runs, floor=floor, peak=peak),
            "floor_kflop_per_token": round(floor / 1e3, 1),
            "matmul_gflops": round(peak / 1e9),
            "parity": {"loss": parity["loss"], "ours": parity["ours"], "theirs": parity[peer]},
            "data": {"corpora": CORPORA, "longest": CAPACITY, **sizes},
            **setting,
        }


def main() -> None:
    from mediphi.config.schema import Hardware
    from mediphi.engine import resolve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="correctness only, writes nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto")
    options = parser.parse_args()
    precision = resolve(Hardware(accelerator="cpu", precision=options.precision)).precision
    lines = []
    for figure in figures(precision, toy=options.toy, threads=options.threads):
        lines.append(json.dumps(figure))
        print(lines[-1], flush=True)
    if not options.toy:
        known = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        others = [line for line in known if json.loads(line)["precision"] != precision]
        RESULTS.write_text("\n".join([*others, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Full-parameter training of Phi-3.5-mini's shapes on one GPU, ours against others.

    python benchmarks/gpu/train_step.py                     # one GPU, at most --deadline seconds
    python benchmarks/gpu/train_step.py --only compiled     # ours and the sides so named
    python benchmarks/gpu/train_step.py --toy               # correctness only, writes nothing

Random weights and random tokens: the work is that of real ones. bfloat16 autocast, float32 weights,
gradients and AdamW moments on all sides. Two kinds of data: documents of one row's length, where
nobody pads, and short ones. All sides train the same documents in as many optimizer steps; every
side is a process of its own, and they take turns. The clock runs behind the warm-up steps, and the
host waits for the device at its ends alone.

Parity comes first: loss and gradient of one optimizer step on the same documents, against the
documents going through transformers one by one. A gradient may be off four times what bfloat16
alone does to it; rows whose documents see one another are off far more, which the loss does not
show. A peer that is off more has no figures, and its line says so.

FLOPs of the MFU are those of real tokens, six for each weight in a matrix product, and attention's
(query, key) pairs within documents; nothing that a side pads, masks or recomputes counts. TRL's
sides need the `benchmarks` extra, one of them Liger.
"""

from collections.abc import Iterator
from statistics import median
from typing import Any

import measuring
import sides
import train_sides
from measuring import Options
from train_sides import ABOUT, SIDES, Task
from turns import processes_in_turns, raise_for_ours, run_ratio

RESULTS = "gpu_train_step.jsonl"


def tasks(options: Options) -> dict[str, Task]:
    """Five optimizer steps of about 32k tokens, one of them before the clock starts."""
    capacity, steps, short = (64, 2, 16) if options.toy else (4096, 5, 80)
    lengths = {
        "short documents": measuring.random_lengths(
            steps * short, median=capacity // (3 if options.toy else 12), longest=capacity // 2
        ),
    }
    if not options.toy:
        lengths["documents of 4,096 tokens"] = [capacity] * (steps * 8)
    return {
        name: Task(
            model=options.folder,
            documents=measuring.random_ids(own),
            capacity=capacity,
            steps=steps,
            warmup_steps=1,
            rows_per_pass=options.rows,
            precision="32-true" if options.toy else "bf16-mixed",
        )
        for name, own in lengths.items()
    }


def floor_flops(task: Task) -> float:
    """Operations a token that nobody can save, over the whole task."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mediphi.engine import training_flops

    config = AutoConfig.from_pretrained(task.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens = sum(map(len, task.documents))
    flops = training_flops(
        num_matmul_parameters=sum(matrices),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        pairs=sum(len(ids) * (len(ids) + 1) // 2 for ids in task.documents),
        tokens=tokens,
    )
    return flops / tokens


def side_figures(runs: list[sides.Run], *, flops: float, peak: float) -> dict[str, Any]:
    wall = median(run.wall / run.tokens for run in runs)
    return {
        "tokens_per_s": round(1 / wall),
        "mfu": round(flops / wall / peak, 4),
        "cpu_s_per_s": round(median(run.cpu / run.wall for run in runs), 2),
        "peak_gib": round(max(run.peak_mib for run in runs) / 1024, 2),
        "positions_per_token": round(runs[0].positions / runs[0].tokens, 3),
        "timed_steps": runs[0].steps,
        "timed_tokens": runs[0].tokens,
    }


def figures(options: Options) -> Iterator[dict[str, Any]]:
    """A line per side and kind of data."""
    peak = measuring.peak_flops()
    names = measuring.sides_here(SIDES, options)
    chosen = tasks(options)
    for number, (kind, task) in enumerate(chosen.items()):
        found = processes_in_turns(
            names,
            train_sides.__file__,
            task,
            toy=options.toy,
            deadline=options.deadline.part(1 / (len(chosen) - number)),
        )
        flops = floor_flops(task)
        for name, turns in found.items():
            line = {
                "figure": "training step, all parameters",
                "data": kind,
                "side": name,
                "side_is": ABOUT[name],
                "precision": task.precision,
                "runs": len(turns.runs),
            }
            if turns.failure is not None:
                yield {**line, "failure": turns.failure}
                continue
            yield {
                **line,
                **side_figures(turns.runs, flops=flops, peak=peak),
                **run_ratio(found["ours"], turns, lambda run: run.wall / run.tokens),
                **(turns.parity or {}),
                "gflop_per_token": round(flops / 1e9, 3),
                "peak_tflops": round(peak / 1e12, 1),
                "documents": len(task.documents),
                "tokens": sum(map(len, task.documents)),
                "rows_per_pass": task.rows_per_pass,
            }
        raise_for_ours(found)


if __name__ == "__main__":
    measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)

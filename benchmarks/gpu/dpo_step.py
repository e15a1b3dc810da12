"""DPO with all parameters of Phi-3.5-mini's shapes on one GPU, ours against TRL's.

    python benchmarks/gpu/dpo_step.py                     # one GPU, at most --deadline seconds
    python benchmarks/gpu/dpo_step.py --only online       # ours and the sides so named
    python benchmarks/gpu/dpo_step.py --toy               # correctness only, writes nothing

Random weights, random pairs; bfloat16 autocast on all sides. All train the same pairs in as many
optimizer steps, in processes of their own that take turns. The clock runs behind the warm-up steps.
The pass of the reference before training is timed apart; TRL's hash of all weights, by which it
finds an earlier pass, is left out.

Parity comes first: the loss of one step at a policy and a reference of different weights, against
the equation on sequences that go through transformers one by one. A peer of another loss has no
figures, and its line says so. FLOPs of the MFU: prompt and both
answers once, logits of answers, attention's (query, key) pairs. Needs the `benchmarks` extra.
"""

from collections.abc import Iterator
from statistics import median
from typing import Any

import dpo_sides
import measuring
import sides
from dpo_sides import ABOUT, SIDES, Task
from measuring import Options
from turns import processes_in_turns, raise_for_ours, run_ratio

RESULTS = "gpu_dpo_step.jsonl"


def make_task(options: Options) -> Task:
    """Five optimizer steps of 64 pairs, one of them before the clock starts."""
    steps, share, median_length = (2, 8, 12) if options.toy else (5, 64, 300)
    lengths = [
        measuring.random_lengths(steps * share, median=own, longest=4 * own, seed=seed)
        for seed, own in enumerate((median_length, median_length // 2, median_length // 2))
    ]
    parts = (measuring.random_ids(own, seed=seed) for seed, own in enumerate(lengths))
    return Task(
        model=options.folder,
        documents=[list(pair) for pair in zip(*parts, strict=True)],
        capacity=12 * median_length,
        steps=steps,
        warmup_steps=1,
        rows_per_pass=options.rows,
        pairs_per_pass=8,
        precision="32-true" if options.toy else "bf16-mixed",
    )


def floor_flops(task: Task) -> float:
    """Operations a pair that nobody can save."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mediphi.engine import training_flops

    config = AutoConfig.from_pretrained(task.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    sizes = [tuple(map(len, parts)) for parts in task.documents]
    flops = training_flops(
        num_matmul_parameters=sum(matrices) - head,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        pairs=sum(sum(n * (n + 1) // 2 for n in (p, c, r)) + p * (c + r) for p, c, r in sizes),
        tokens=sum(map(sum, sizes)),
    )
    return (flops + 6.0 * head * sum(c + r for _, c, r in sizes)) / len(sizes)


def side_figures(runs: list[sides.Run], *, flops: float, peak: float) -> dict[str, Any]:
    wall = median(run.wall / run.pairs for run in runs)
    reference = median(run.reference.wall for run in runs)
    return {
        "pairs_per_s": round(1 / wall, 2),
        "mfu": round(flops / wall / peak, 4),
        "peak_gib": round(max(run.peak_mib for run in runs) / 1024, 2),
        "positions_per_pair": round(runs[0].positions / runs[0].pairs, 1),
        "reference_pass_s": round(reference, 2),
        "timed_steps": runs[0].steps,
        "timed_pairs": runs[0].pairs,
    }


def figures(options: Options) -> Iterator[dict[str, Any]]:
    """A line per side."""
    peak, task = measuring.peak_flops(), make_task(options)
    names = measuring.sides_here(SIDES, options)
    found = processes_in_turns(
        names, dpo_sides.__file__, task, toy=options.toy, deadline=options.deadline
    )
    flops = floor_flops(task)
    for name, turns in found.items():
        line = {
            "figure": "DPO step, all parameters",
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
            **run_ratio(found["ours"], turns, lambda run: run.wall / run.pairs),
            **(turns.parity or {}),
            "gflop_per_pair": round(flops / 1e9, 2),
            "peak_tflops": round(peak / 1e12, 1),
            "pairs": len(task.documents),
            "tokens_per_part": [
                round(sum(len(parts[i]) for parts in task.documents) / len(task.documents), 1)
                for i in range(3)
            ],
        }
    raise_for_ours(found)


if __name__ == "__main__":
    measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)

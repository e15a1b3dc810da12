"""The planner's memory against what training really takes, on one device.

    python benchmarks/gpu/planner_memory.py                # one GPU, at most --deadline seconds
    python benchmarks/gpu/planner_memory.py --only LoRA    # the configurations so named
    python benchmarks/gpu/planner_memory.py --toy          # the tiny model, writes nothing

Every configuration is planned, and trained for some optimizer steps, by a fresh process on random
weights of Phi-3.5-mini's shapes. Predicted is the total of the page that `check_only=true` prints.
Used is what the driver counts at the end: the allocator gives nothing back, so that this is its
peak, and the CUDA context besides; other programs must be away from the GPU. Allocated and reserved
are the peaks of PyTorch's allocator. On a CPU (`--toy`) used is the rise of the process's resident
memory (VmHWM).
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring
import sides
from measuring import Options

RESULTS = "gpu_planner_memory.jsonl"
FIGURE = "planner memory on a device"
STEPS = 3
PIT = [
    *("stage=pit", "corpus=medcode", "stage.phase1.max_steps=1", "stage.phase1.warmup_steps=0"),
    *(f"stage.phase2.max_steps={STEPS}", "stage.phase2.warmup_steps=0"),
]
CHAT = [f"stage.phase.max_steps={STEPS}", "stage.phase.warmup_steps=0"]
SFT, DPO = (
    [f"stage={stage}", f"corpus={corpus}", *CHAT]
    for stage, corpus in (("sft", "mediflow"), ("dpo", "mediflow_dpo"))
)
RECOMPUTED = "hardware.activation_checkpointing=true"
CONFIGURATIONS = {
    "all parameters": PIT,
    "all parameters, recomputed": [*PIT, RECOMPUTED],
    "all parameters, one row": [*PIT, "hardware.micro_batch=1"],
    "SFT, recomputed": [*SFT, RECOMPUTED],
    "LoRA": [*SFT, "stage.lora.rank=16"],
    "DPO, LoRA": [*DPO, "stage.lora.rank=16"],
}


def measure(overrides: list[str]) -> dict[str, Any]:
    """In this process: train the last phase, and plan the same run; bytes."""
    sys.path[:0] = [str(sides.ROOT), str(sides.ROOT / "tests" / "config")]
    from dataclasses import replace

    import torch
    from composing import composed

    import train  # noqa: F401  sets the kernels' caches as the program does
    from mediphi import engine, training
    from mediphi.checkpointing import SafeCheckpointIO
    from mediphi.config import load
    from mediphi.planning.plan import Planner
    from mediphi.stages import make_module
    from mediphi.tracking.progress import silence_lightning

    silence_lightning()
    config = load(composed(*overrides, "check_only=true"))
    run = training._set_up(config)
    plan = run.phases[-1]
    steps = plan.data.train_plan
    backbone = training._first_backbone(run)
    before = resident_mib_anew() if run.device.type == "cpu" else 0.0
    module = make_module(config, plan.phase, data=plan.data, backbone=backbone)
    loop = {"max_steps": steps.num_steps, "accumulate_grad_batches": steps.accumulate}
    trainer = engine.make_trainer(
        config.hardware,
        run.device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[],
        loggers=[],
        loop={**loop, "gradient_clip_val": 1.0, "limit_val_batches": 0},
    )
    trainer.fit(module, plan.data)
    highest = sides.resident_mib("VmHWM")
    predicted = Planner(replace(run, phases=(plan,))).plan().memory.total  # takes memory, too
    found = {"predicted": predicted, "steps": trainer.global_step}
    if run.device.type == "cpu":
        return {**found, "used": 2**20 * (highest - before)}
    free, total = torch.cuda.mem_get_info()
    return {
        **found,
        "used": total - free,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def resident_mib_anew() -> float:
    """Of this process now, and from now on VmHWM counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what preparation has freed would be used again
    Path("/proc/self/clear_refs").write_text("5")
    return sides.resident_mib("VmRSS")


def run(overrides: list[str], options: Options) -> dict[str, Any]:
    """The figures of a configuration from a fresh process, or why there are none."""
    rows = [f"hardware.micro_batch={options.rows}", f"stage.global_batch={2 * options.rows}"]
    length = [] if options.toy else ["stage.max_length=4096"]
    command = [sys.executable, __file__, "--child", f"model.architecture={options.folder}"]
    try:
        done = subprocess.run(
            [*command, *rows, *length, *overrides],  # a configuration's own rows come last
            env={**os.environ, "MEDIPHI_ROOT": str(sides.ROOT)},
            capture_output=True,
            text=True,
            timeout=max(1.0, options.deadline.left),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failure": options.deadline.told}
    if done.returncode:
        return {"failure": done.stderr.strip()[-600:]}
    found = json.loads(done.stdout.splitlines()[-1])
    gib = {f"{n}_gib": round(size / 2**30, 3) for n, size in found.items() if n != "steps"}
    return {
        **gib,
        "ratio": round(found["predicted"] / found["used"], 3),
        "steps": found["steps"],
        "overrides": " ".join(overrides),
    }


def figures(options: Options) -> Iterator[dict[str, Any]]:
    """A line per configuration."""
    for name, overrides in CONFIGURATIONS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        line = {"figure": FIGURE, "side": name}
        late = {"failure": options.deadline.told}
        yield {**line, **(run(overrides, options) if options.deadline.leaves() else late)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2:])))
    else:
        measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)

"""The planner's memory against the measured peak, on a CPU: one fresh process a configuration.

    python benchmarks/planner_memory.py          # all
    python benchmarks/planner_memory.py tiny     # those whose name begins so

Lines of what has run are replaced in results/planner_memory.jsonl.

Measured is how far the resident memory rises (VmHWM) from just before the model is built to the end
of some optimizer steps. Predicted is the total of the page that `check_only=true` prints. Models
have random weights. With several processes the largest counts.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import sides

ROOT, RESULTS = sides.ROOT, sides.RESULTS / "planner_memory.jsonl"
STEPS = 6
SIZES: dict[str, dict[str, int]] = {
    "512": {"hidden_size": 512, "intermediate_size": 1344, "vocab_size": 8192},
    "768": {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 32064},
}
PIT = [
    *("stage=pit", "corpus=medcode", "stage.phase1.max_steps=1", "stage.phase1.warmup_steps=0"),
    *(f"stage.phase2.max_steps={STEPS}", "stage.phase2.warmup_steps=0"),
]
CHAT = [f"stage.phase.max_steps={STEPS}", "stage.phase.warmup_steps=0", "hardware.micro_batch=2"]
SFT = ["stage=sft", "corpus=mediflow", *CHAT]
DPO = ["stage=dpo", "corpus=mediflow_dpo", *CHAT]
BF16, FP32 = "hardware.precision=bf16-mixed", "hardware.precision=32-true"
TWO = ["hardware.devices=2", "hardware.micro_batch=2"]

CONFIGURATIONS: dict[str, tuple[str | None, list[str]]] = {
    "tiny bf16": (None, [*PIT, BF16]),
    "tiny fp32": (None, [*PIT, FP32]),
    "512 bf16": ("512", [*PIT, BF16]),
    "512 fp32": ("512", [*PIT, FP32]),
    "512 recomputed": ("512", [*PIT, BF16, "hardware.activation_checkpointing=true"]),
    "512 one row a pass": ("512", [*PIT, BF16, "hardware.micro_batch=1"]),
    "512 LoRA": ("512", [*SFT, BF16, "stage.lora.rank=8"]),
    "512 DPO cached": ("512", [*DPO, BF16]),
    "512 DPO live": ("512", [*DPO, BF16, "stage.reference=live"]),
    "768 bf16": ("768", [*PIT, BF16, "hardware.micro_batch=2"]),
    "768 fp32 recomputed": ("768", [*PIT, FP32, "hardware.activation_checkpointing=true"]),
    "512 DDP": ("512", [*PIT, BF16, *TWO]),
    "512 FSDP2": ("512", [*PIT, BF16, *TWO, "hardware.strategy=fsdp2"]),
    "512 ZeRO-3": ("512", [*PIT, BF16, *TWO, "hardware.strategy=zero3"]),
}
"""Name -> model size (None: tiny as it is), overrides."""


def write_model(folder: Path, size: str | None) -> Path:
    """Config and tokenizer of a model with eight layers."""
    config = json.loads((sides.TINY / "config.json").read_text())
    if size is not None:
        heads = SIZES[size]["hidden_size"] // 64
        more = {"num_attention_heads": heads, "num_key_value_heads": heads}
        config |= SIZES[size] | more | {"num_hidden_layers": 8}
    for path in sides.TINY.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(overrides: list[str]) -> dict[str, Any]:
    """In this process: train, then plan the same run."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "config")]
    from composing import composed

    import train  # noqa: F401  sets the kernels' caches as the program does
    from mediphi import engine, training
    from mediphi.checkpointing import SafeCheckpointIO
    from mediphi.config import load
    from mediphi.planning.plan import Planner
    from mediphi.process_group import join_processes
    from mediphi.stages import make_module
    from mediphi.tracking.progress import silence_lightning

    warnings.filterwarnings("ignore")
    silence_lightning()
    config = load(composed(*overrides, "hardware.accelerator=cpu", "check_only=true"))
    join_processes(config.hardware)
    run = training._set_up(config)
    plan = run.phases[-1]
    steps = plan.data.train_plan
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = sides.resident_mib("VmRSS")
    module = make_module(config, plan.phase, data=plan.data, backbone=training._first_backbone(run))
    trainer = engine.make_trainer(
        config.hardware,
        run.device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[],
        loggers=[],
        loop={
            "max_steps": steps.num_steps,
            "accumulate_grad_batches": steps.accumulate,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
        },
    )
    started = time.perf_counter()
    trainer.fit(module, plan.data)
    wall = time.perf_counter() - started
    measured = sides.resident_mib("VmHWM") - before
    planned = Planner(replace(run, phases=(plan,))).plan()
    return {
        "parameters": run.budget.num_parameters,
        "tokens": steps.num_tokens,
        "measured_mib": round(measured, 1),
        "predicted_mib": round(planned.memory.total / 2**20, 1),
        "items_mib": {n: round(b / 2**20, 1) for n, b in planned.memory.items.items()},
        "measured_s": round(wall, 2),
        "predicted_s": round(planned.seconds, 2),
    }


def run(name: str) -> dict[str, Any]:
    """A configuration in fresh processes."""
    size, overrides = CONFIGURATIONS[name]
    count = next((int(o.partition("=")[2]) for o in overrides if "devices" in o), 1)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), size)
        command = [sys.executable, __file__, "--child", *overrides, f"model.architecture={model}"]
        env = {"OMP_NUM_THREADS": "1", **os.environ, "MEDIPHI_ROOT": str(ROOT)}
        if count > 1:
            with socket.socket() as listening:
                listening.bind(("127.0.0.1", 0))
                port = str(listening.getsockname()[1])
            env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{"RANK": str(n), "LOCAL_RANK": str(n)} if count > 1 else {} for n in range(count)]
        children = [
            subprocess.Popen(command, env=env | rank, stdout=subprocess.PIPE, text=True)
            for rank in ranks
        ]
        answers = [child.communicate()[0].splitlines() for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{name}: failed")
    found = max((json.loads(a[-1]) for a in answers), key=lambda one: one["measured_mib"])
    ratio = round(found["predicted_mib"] / found["measured_mib"], 3)
    return {"figure": "planner memory", "configuration": name, "ratio": ratio, **found}


def main() -> None:
    for name in CONFIGURATIONS:
        if not name.startswith(" ".join(sys.argv[1:])):
            continue
        figures = {**run(name), "environment": sides.environment(1)}
        print(
            f"{name:<22}{figures['predicted_mib']:>9.1f} MiB predicted"
            f"{figures['measured_mib']:>9.1f} measured{figures['ratio']:>7.3f}",
            flush=True,
        )
        keep(figures)


def keep(figures: dict[str, Any]) -> None:
    """In place of an older line of the same configuration."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    kept = {line["configuration"]: line for line in map(json.loads, lines)}
    kept[figures["configuration"]] = figures
    ordered = [json.dumps(kept[name]) for name in CONFIGURATIONS if name in kept]
    RESULTS.write_text("\n".join(ordered) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2:])))
    else:
        main()

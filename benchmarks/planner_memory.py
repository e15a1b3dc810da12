"""The planner's memory and speed against measured ones, on a CPU: fresh processes a configuration.

    python benchmarks/planner_memory.py          # all
    python benchmarks/planner_memory.py tiny     # those whose name begins so

Lines of what has run are replaced in results/planner_memory.jsonl. Then `planner_fit.py` prints the
constants that the lines with `fitted` give: memory.py and speed.py of `mediphi.planning` hold them.
All other configurations have no part in them.

Memory measured is how far the resident memory rises (VmHWM) from just before the model is built to
the end of some optimizer steps; predicted, the total of the page that `check_only=true` prints.
With several processes the largest counts.

Speed measured is that of the fastest optimizer step after two that warm up, by the CPU time of the
process, which has one thread: others on the machine have little part in it. With several processes
it is wall time, as they wait for one another; then the machine must be quiet. Models have random
weights.
"""

import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import sides

ROOT = sides.ROOT
STEPS, WARM_UP = 6, 2
SIZES: dict[str, dict[str, int]] = {
    "384": {"hidden_size": 384, "intermediate_size": 1024, "vocab_size": 8192},
    "512": {"hidden_size": 512, "intermediate_size": 1344, "vocab_size": 8192},
    "640": {"hidden_size": 640, "intermediate_size": 1728, "vocab_size": 16384},
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

RECOMPUTED = "hardware.activation_checkpointing=true"
ZERO3 = "hardware.strategy=zero3"


class Case(NamedTuple):
    """Model size (None: tiny as it is), overrides; `fitted`: the constants are made from it."""

    size: str | None
    overrides: list[str]
    fitted: bool = False


CONFIGURATIONS: dict[str, Case] = {
    "tiny bf16": Case(None, [*PIT, BF16], fitted=True),
    "tiny fp32": Case(None, [*PIT, FP32], fitted=True),
    "384 fp32 recomputed": Case("384", [*PIT, FP32, RECOMPUTED], fitted=True),
    "512 bf16": Case("512", [*PIT, BF16], fitted=True),
    "512 fp32": Case("512", [*PIT, FP32], fitted=True),
    "512 recomputed": Case("512", [*PIT, BF16, RECOMPUTED], fitted=True),
    "512 one row a pass": Case("512", [*PIT, BF16, "hardware.micro_batch=1"], fitted=True),
    "384 bf16": Case("384", [*PIT, BF16]),
    "512 LoRA": Case("512", [*SFT, BF16, "stage.lora.rank=8"]),
    "512 DPO cached": Case("512", [*DPO, BF16]),
    "512 DPO live": Case("512", [*DPO, BF16, "stage.reference=live"]),
    "640 SFT fp32": Case("640", [*SFT, FP32]),
    "768 bf16": Case("768", [*PIT, BF16, "hardware.micro_batch=2"]),
    "768 fp32 recomputed": Case("768", [*PIT, FP32, RECOMPUTED]),
    "512 DDP": Case("512", [*PIT, BF16, *TWO]),
    "512 FSDP2": Case("512", [*PIT, BF16, *TWO, "hardware.strategy=fsdp2"]),
    "512 ZeRO-3": Case("512", [*PIT, BF16, *TWO, ZERO3]),
    "512 ZeRO-3 offload": Case("512", [*PIT, BF16, *TWO, ZERO3, "hardware.offload=true"]),
}


class Clock(L.Callback):
    """Tokens, wall seconds and CPU seconds of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self._tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter(), sides.cpu_seconds()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += batch.num_tokens
        if trainer.global_step > len(self.steps):
            now = time.perf_counter(), sides.cpu_seconds()
            self.steps.append((self._tokens, now[0] - self._start[0], now[1] - self._start[1]))
            self._tokens, self._start = 0, now

    def tokens_per_s(self, clock: str) -> float:
        """Of the fastest step, by `wall` or `cpu`."""
        column = ("wall", "cpu").index(clock) + 1
        return max(step[0] / step[column] for step in self.steps[WARM_UP:])


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
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what preparation has freed would be used again
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = sides.resident_mib("VmRSS")
    module = make_module(config, plan.phase, data=plan.data, backbone=training._first_backbone(run))
    clock = Clock()
    trainer = engine.make_trainer(
        config.hardware,
        run.device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[clock],
        loggers=[],
        loop={
            "max_steps": steps.num_steps,
            "accumulate_grad_batches": steps.accumulate,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
        },
    )
    trainer.fit(module, plan.data)
    measured = sides.resident_mib("VmHWM") - before
    planned = Planner(replace(run, phases=(plan,))).plan()
    several = config.world_size > 1
    clock_name = "wall" if several else "cpu"
    common = {"parameters": run.budget.num_parameters, "precision": run.device.precision}
    memory = {
        "measured_mib": round(measured, 1),
        "items_mib": {n: round(b / 2**20, 1) for n, b in planned.memory.items.items()},
        "in_heap_mib": round(planned.footprint.in_heap / 2**20, 1),
        "weights_in_heap_mib": round(planned.footprint.weights_in_heap / 2**20, 1),
    }
    speed = {
        "clock": clock_name,
        "tokens": steps.num_tokens,
        "measured_tokens_per_s": round(config.world_size * clock.tokens_per_s(clock_name), 1),
        "work": asdict(planned.works[0]),
        **rates(run.device.precision),
    }
    return {**common, "memory": memory, "speed": speed}


def rates(precision: str) -> dict[str, float]:
    """FLOP/s and bytes/s of one thread, as the plan measures them, but by CPU time as the steps."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    left, right = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    return {
        "peak_flops": 2.0 * 1024**3 / fastest(lambda: left @ right),
        "bandwidth": 2.0 * source.nbytes / fastest(lambda: target.copy_(source)),
    }


def fastest(work: Callable[[], object]) -> float:
    """CPU seconds."""
    found = []
    for _ in range(30):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def run(name: str) -> list[dict[str, Any]]:
    """A configuration in fresh processes: the lines of its memory and of its speed."""
    size, overrides, fitted = CONFIGURATIONS[name]
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
    found = [json.loads(answer[-1]) for answer in answers]
    largest = max(found, key=lambda one: one["memory"]["measured_mib"])
    common = {"configuration": name, "fitted": fitted, "precision": largest["precision"]}
    common["parameters"] = largest["parameters"]
    return [
        {"figure": "planner memory", **common, **largest["memory"]},
        {"figure": "planner speed", **common, **largest["speed"]},
    ]


def main() -> None:
    import planner_fit  # not in the processes that are measured

    lines = {(line["figure"], line["configuration"]): line for line in planner_fit.read()}
    order = [(f, name) for f in ("planner memory", "planner speed") for name in CONFIGURATIONS]
    for name in CONFIGURATIONS:
        if name.startswith(" ".join(sys.argv[1:])):
            environment = sides.environment(1)
            for line in run(name):
                lines[line["figure"], name] = {**line, "environment": environment}
            planner_fit.write(lines[key] for key in order if key in lines)
            print(f"{name}: measured", flush=True)
    planner_fit.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2:])))
    else:
        main()

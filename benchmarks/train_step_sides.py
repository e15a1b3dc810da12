"""The sides of `train_step.py`: our trainer, TRL's, and the process that runs one of them."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "models" / "tiny"
CAPACITY, LR = 512, 1e-3
SIDES: dict[str, dict[str, Any]] = {
    "ours": {},
    "trl default": {"per_device_train_batch_size": 8},
    "trl by length": {
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    },
    "trl packed": {
        "per_device_train_batch_size": 1,
        "packing": True,
        "packing_strategy": "bfd_split",
    },
}
ABOUT = {
    "ours": "packed rows, documents apart",
    "trl default": "SFTTrainer's padding collator, 8 documents a forward pass",
    "trl by length": "as trl default, documents of like length together",
    "trl packed": "packing=bfd_split, one row a forward pass; documents are kept apart by a mask "
    "over the flattened row, so several rows at a time would cost more",
}


class Task(NamedTuple):
    """What a worker trains: initial weights, documents as text and as ids with their EOS."""

    model: str
    texts: list[str]
    train: list[list[int]]
    heldout: list[list[int]]
    steps: int
    precision: str


class Run(NamedTuple):
    """One training run; `heldout` is the loss of the trained weights, MiB are resident."""

    wall: float
    cpu: float
    tokens: int
    positions: int
    steps: int
    flops: float
    attention_flops: float
    heldout: float
    before_mib: float
    peak_mib: float


class Meter:
    """Starts and stops the clocks; counts tokens and FLOPs of what lies between."""

    def __init__(self, *, count_flops: bool = False) -> None:
        self.counter = flop_counter() if count_flops else None
        self.tokens = self.positions = self.steps = 0
        self.wall = self.cpu = 0.0

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()
        if self.counter is not None:
            self.counter.__enter__()

    def stop(self) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
        self.wall, self.cpu = time.perf_counter() - self.wall, cpu_seconds() - self.cpu

    def flops(self) -> tuple[float, float]:
        """All, and attention's share."""
        counts = self.counter.get_flop_counts() if self.counter is not None else {}
        per_op = counts.get("Global", {})
        return sum(per_op.values()), sum(n for op, n in per_op.items() if "attention" in str(op))


Train = Callable[[Meter], Any]
"""Trains once from the initial weights and returns the transformers model."""


def flop_counter() -> Any:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def products(q: Any, k: Any, is_causal: bool) -> int:
        batch, heads, queries, dim = q
        pairs = queries * (queries + 1) // 2 if is_causal else queries * k[2]
        return 2 * batch * heads * dim * pairs

    def forward(q: Any, k: Any, v: Any, p: float = 0.0, causal: bool = False, **_: Any) -> int:
        return 2 * products(q, k, causal)

    def backward(grad: Any, q: Any, k: Any, *rest: Any, **_: Any) -> int:
        return 5 * products(q, k, rest[4])  # value, out, logsumexp, dropout, is_causal

    def in_place(total: Any, left: Any, right: Any, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    aten = torch.ops.aten
    formulas = {
        aten.addmm_: in_place,  # in TRL's loss; the counter knows only the other one
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident_mib(field: str) -> float:
    """`VmHWM`: the highest so far, `VmRSS`: now."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{field}:") + 1]) / 1024


# ---------------------------------------------------------------------------------- ours
def packed_data(task: Task, folder: Path) -> Any:
    """Token store and plan: the task's optimizer steps, two micro-batches each."""
    import numpy as np
    from tokenizers import Tokenizer

    from mediphi.data.datamodule import PackedDataModule
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings, TrainingPlan
    from mediphi.data.render import Piece, Rendered
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    data = f"{len(task.texts)} documents"
    key = StoreKey(tokenizer_sha256(tokenizer), "benchmark", data, "train", task.train[0][-1])
    documents = (
        Rendered(f"d/{i}", "d", [Piece("document", text)]) for i, text in enumerate(task.texts)
    )
    store = build_store(documents, cache=folder, tokenizer=tokenizer, key=key)
    same = [i for ids in task.train for i in ids] == store.gather(
        np.arange(store.num_tokens)
    ).tolist()
    assert same, "the two sides have different token ids"
    settings = PlanSettings(kinds=("document",), capacity=CAPACITY, global_batch=1)
    micro = -(-TrainingPlan(store, settings).num_rows // (2 * task.steps))
    settings = replace(settings, global_batch=2 * micro, micro_batch=micro)
    return PackedDataModule(store, heldout=None, settings=settings)


def our_module(task: Task, data: Any) -> Any:
    from mediphi.backbone import BackboneSpec
    from mediphi.config.schema import Optimizer, Phase
    from mediphi.modules.language_model import LanguageModelModule
    from mediphi.records import PIECE_KINDS

    return LanguageModelModule(
        backbone=BackboneSpec(task.model, "pretrained", "main", "sdpa"),
        phase=Phase(lr=LR, schedule="constant"),
        optimizer=Optimizer(beta2=0.999, weight_decay=0.0),  # TRL's
        num_steps=data.train_plan.num_steps,
        splits=data.train_plan.accumulate,
        group_names={
            "kind": PIECE_KINDS,
            "source": data.group_names["source"],
            "task": data.group_names["task_type"],
        },
    )


def make_ours(task: Task, folder: Path) -> Train:
    """The wiring of a training phase, without checkpoints, logs and export."""
    import lightning as L

    from mediphi import engine
    from mediphi.checkpointing import SafeCheckpointIO
    from mediphi.config.schema import Hardware
    from mediphi.tracking.progress import silence_lightning

    silence_lightning()
    data = packed_data(task, folder)
    plan = data.train_plan
    hardware = Hardware(accelerator="cpu", precision=task.precision)
    loop = {"max_steps": plan.num_steps, "accumulate_grad_batches": plan.accumulate}

    def work(meter: Meter) -> Any:
        class Clock(L.Callback):
            def on_train_start(self, *_: Any) -> None:
                meter.start()

            def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
                meter.stop()
                meter.tokens = meter.positions = plan.num_tokens
                meter.steps = trainer.global_step

        module = our_module(task, data)
        trainer = engine.make_trainer(
            hardware,
            engine.resolve(hardware),
            checkpoint_io=SafeCheckpointIO(),
            callbacks=[Clock()],
            loggers=[],
            loop={**loop, "gradient_clip_val": 1.0, "limit_val_batches": 0},
        )
        trainer.fit(module, data)
        return module.backbone

    return work


# ---------------------------------------------------------------------------------- TRL
def peer_trainer(task: Task, folder: Path, *, side: str, meter: Meter) -> Any:
    """An SFTTrainer with what both sides share, and the side's own settings."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            meter.stop()
            meter.steps = state.global_step

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            mask = inputs.get("attention_mask")
            meter.positions += inputs["input_ids"].numel()
            meter.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *args, **options)

    own = SIDES[side]
    # TRL's packing leaves some room: 3 % more rows a step, or a last step would be left over.
    filled = int(1.03 * sum(map(len, task.train)) / CAPACITY) + 1
    rows = filled if "packing" in own else len(task.train)
    arguments = SFTConfig(
        output_dir=str(folder),
        gradient_accumulation_steps=-(-rows // (task.steps * own["per_device_train_batch_size"])),
        num_train_epochs=1,
        max_length=CAPACITY,
        learning_rate=LR,
        lr_scheduler_type="constant",
        bf16=task.precision == "bf16-mixed",
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
    )
    return Counting(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype="float32"),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": task.train}),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        callbacks=[Clock()],
    )


def make_peer(task: Task, folder: Path, *, side: str) -> Train:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    def work(meter: Meter) -> Any:
        trainer = peer_trainer(task, folder, side=side, meter=meter)
        trainer.train()
        return trainer.model

    return work


# ---------------------------------------------------------------------------------- workers
def one_by_one(model: Any, documents: list[list[int]]) -> Any:
    """Token-mean loss, each document alone through the model: the reference."""
    import torch
    import torch.nn.functional as F

    total = torch.zeros(())
    for ids in documents:
        row = torch.tensor([ids])
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, row[0, 1:], reduction="sum")
    return total / sum(len(ids) - 1 for ids in documents)


def heldout_loss(model: Any, task: Task) -> float:
    """In float32, by the same code for all sides."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float(one_by_one(plain.eval(), task.heldout))


def worker(side: str, task: Task) -> None:
    """Train once per line on stdin (`time` or `flops`), answer with a `Run` per line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = make_ours(task, folder) if side == "ours" else make_peer(task, folder, side=side)
        for line in sys.stdin:
            meter, before = Meter(count_flops=line.strip() == "flops"), resident_mib("VmRSS")
            model = work(meter)
            heldout = heldout_loss(model, task)
            counts = (meter.tokens, meter.positions, meter.steps, *meter.flops())
            run = Run(meter.wall, meter.cpu, *counts, heldout, before, resident_mib("VmHWM"))
            print(json.dumps(run), file=answers, flush=True)
            del model


if __name__ == "__main__":
    worker(sys.argv[1], Task(*json.loads(Path(sys.argv[2]).read_text())))

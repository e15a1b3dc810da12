"""The sides of `train_step.py`: our trainer, a plain loop, TRL's, and the process that runs one."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import trainers
from fitting import (
    LR,
    Progress,
    fit,
    of,
    passes_per_step,
    peer_arguments,
    peer_clock,
    peer_tokenizer,
    serve_judged,
)
from measuring import DeviceMeter
from sides import Train

LIGER = {"use_liger_kernel": True}
PACKED = {"packing": True, "packing_strategy": "bfd_split", "gradient_checkpointing": False}
SIDES: dict[str, dict[str, Any]] = {
    "ours": {"compile": "not"},
    "ours, compiled": {"compile": "one length"},
    "ours, compiled for any length": {"compile": "any length"},
    "transformers": {},
    "trl default": {},
    "trl packed": PACKED,
    "trl packed, liger": {**PACKED, **LIGER},
}
ABOUT = {
    "ours": "packed rows, documents apart; eager",
    "ours, compiled": "as ours, decoder layers through torch.compile, rows padded to one length",
    "ours, compiled for any length": "the same by dynamic shapes, rows as they are",
    "transformers": "a plain loop: documents padded to the longest of a pass, SDPA, full logits",
    "trl default": "SFTTrainer: padded, 8 documents a pass, activations recomputed",
    "trl packed": "SFTTrainer with packing=bfd_split, the fastest varlen kernel that is there, "
    "nothing recomputed, no check for NaN at each pass",
    "trl packed, liger": "as trl packed, with Liger's norms, rotary embedding and SwiGLU",
}


class Task(NamedTuple):
    """What a worker trains: random documents in so many optimizer steps.

    Attributes:
        rows_per_pass: packed rows that go through the model at a time.
        warmup_steps: of the steps, those before the clock starts.
    """

    model: str
    documents: list[list[int]]
    capacity: int
    steps: int
    warmup_steps: int
    rows_per_pass: int
    precision: str

    @property
    def first_step(self) -> "Task":
        """The documents of one optimizer step, the same for all sides."""
        share = len(self.documents) // self.steps
        return self._replace(documents=self.documents[:share], steps=1, warmup_steps=0)


# ---------------------------------------------------------------------------------- ours
def packed_data(task: Task, folder: Path) -> Any:
    from dataclasses import replace

    from tokenizers import Tokenizer

    from mediphi.data.datamodule import PackedDataModule
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings, TrainingPlan
    from mediphi.data.render import Piece, Rendered
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey

    tokenizer = Tokenizer.from_file(str(Path(task.model) / "tokenizer.json"))
    documents = (
        Rendered(f"d/{i}", "d", [Piece("document", "", tuple(ids), ())])
        for i, ids in enumerate(task.documents)
    )
    name = f"{len(task.documents)} random documents"
    key = StoreKey(tokenizer_sha256(tokenizer), "benchmark", name, "train", 0)
    store = build_store(documents, cache=folder, tokenizer=tokenizer, key=key)
    settings = PlanSettings(("document",), task.capacity, 1)
    rows, size, steps = TrainingPlan(store, settings).num_rows, task.rows_per_pass, task.steps
    passes = passes_per_step(rows, size=size, steps=steps)
    sizes = {"global_batch": passes * size, "micro_batch": size}
    settings = replace(settings, **sizes, max_steps=steps)
    return PackedDataModule(store, heldout=None, settings=settings, prefetch=2)


def our_module(task: Task, data: Any, *, compile: str) -> Any:
    """With weights drawn on the device."""
    from mediphi import attention, engine
    from mediphi.backbone import BackboneSpec, prepare_training
    from mediphi.config.schema import Hardware
    from mediphi.modules.language_model import LanguageModelModule
    from mediphi.records import PIECE_KINDS

    device = engine.resolve(Hardware())
    spec = BackboneSpec(
        task.model,
        "random",
        "main",
        device.kernel,
        compiled_tokens=data.max_tokens if compile == "one length" else None,
        loss_chunk_tokens=device.loss_chunk_tokens,
    )
    plan, names = data.train_plan, data.group_names
    options = trainers.our_options(task.model, num_steps=plan.num_steps, splits=plan.accumulate)
    options |= {"backbone": spec, "phase": options["phase"].model_copy(update={"lr": LR})}
    module = LanguageModelModule(
        group_names={"kind": PIECE_KINDS, "source": names["source"], "task": names["task_type"]},
        **options,
    )
    kernel = attention.IMPLEMENTATIONS[device.kernel]
    module.model = measuring.random_model(task.model, implementation=kernel)
    prepare_training(module.model, spec)
    for layer in module.model.get_decoder().layers if compile == "any length" else []:
        layer.compile(dynamic=True)
    return module


def train_ours(task: Task, folder: Path, meter: DeviceMeter, *, compile: str) -> None:
    task = of(task, meter)
    data = packed_data(task, folder / str(task.steps))
    module = our_module(task, data, compile=compile)
    meter.watch(module.model)
    fit(task, data, module, meter)


# ---------------------------------------------------------------------------------- plain loop
def passes_of(task: Task) -> list[list[list[list[int]]]]:
    """Documents by step and pass; a pass has no more positions than one of packed rows."""
    share = len(task.documents) // task.steps
    most = task.rows_per_pass * task.capacity
    steps = []
    for first in range(0, share * task.steps, share):
        passes: list[list[list[int]]] = [[]]
        for ids in task.documents[first : first + share]:
            longest = max(map(len, [ids, *passes[-1]]))
            if (len(passes[-1]) + 1) * longest > most:
                passes.append([])
            passes[-1].append(ids)
        steps.append(passes)
    return steps


def train_plainly(task: Task, folder: Path, meter: DeviceMeter) -> None:
    """Forward, backward, clip, step: what most would write first."""
    import torch

    task, device = of(task, meter), measuring.device()
    progress = Progress(meter, task)
    model = measuring.random_model(task.model)
    meter.watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    progress.begin()
    for passes in passes_of(task):
        targets = sum(len(ids) - 1 for own in passes for ids in own)
        for own in passes:
            inputs, labels, mask = (x.to(device) for x in padded(own))
            with torch.autocast(device, torch.bfloat16, enabled=task.precision == "bf16-mixed"):
                out = model(
                    input_ids=inputs,
                    attention_mask=mask,
                    labels=labels,
                    num_items_in_batch=targets,
                    use_cache=False,
                )
            out.loss.backward()
            tokens = sum(map(len, own))
            progress.add(tokens=tokens, positions=inputs.numel(), loss=out.loss)
            del out
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.end_of_step()
    meter.stop()


def padded(documents: list[list[int]]) -> tuple[Any, Any, Any]:
    """Ids, labels and mask `[documents, longest]`."""
    import torch

    rows = [torch.tensor(ids) for ids in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, ids.masked_fill(~mask, -100), mask.long()


# ---------------------------------------------------------------------------------- TRL
def fastest_attention() -> str:
    """The varlen kernel that packed peers get too; on a CPU a mask made of the positions."""
    from mediphi import attention

    if measuring.device() == "cpu":
        return "sdpa"
    return attention.IMPLEMENTATIONS[attention.choose_kernel("auto", device_type="cuda")]


def train_peer(task: Task, folder: Path, meter: DeviceMeter, *, side: str) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    trainers.quiet_peers()
    task, own = of(task, meter), SIDES[side]
    progress = Progress(meter, task)
    is_packed = "packing" in own
    size = task.rows_per_pass if is_packed else 8
    own = {**own, "per_device_train_batch_size": size}
    if is_packed:
        own["logging_nan_inf_filter"] = False
    model = measuring.random_model(
        task.model, implementation=fastest_attention() if is_packed else "sdpa"
    )
    meter.watch(model)
    shares = len(task.documents) // task.steps
    config = SFTConfig(
        **peer_arguments(task, folder, own), max_length=task.capacity, max_steps=task.steps
    )
    rows = datasets.Dataset.from_dict({"input_ids": task.documents[: shares * task.steps]})

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **options)
            progress.add(tokens=next(tokens), positions=inputs["input_ids"].numel(), loss=loss)
            return loss

    trainer = Counting(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=peer_tokenizer(task.model),
        callbacks=[peer_clock(progress)],
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    passes = len(lengths) // (task.steps * size) if task.steps > 1 else -(-len(lengths) // size)
    trainer.args.gradient_accumulation_steps = passes
    tokens = (sum(lengths[i : i + size]) for i in range(0, len(lengths), size))
    trainer.train()


# ---------------------------------------------------------------------------------- parity
OFF = {"32-true": 1e-4, "bf16-mixed": 1e-2}
"""How far the mean loss may be off: it sees a wrong scale, and targets that are missing."""
TIMES_NOISE, LEAST_NOISE = 4.0, 2.5e-4
"""How far a gradient may be off, in units of what bfloat16 alone does to it; float32's at least."""


def one_by_one(task: Task) -> tuple[float, Any]:
    """Token-mean loss and clipped gradient, each document alone through transformers.

    Returns:
        The loss; float32 `[sampled elements]`, see `measuring.sampled`.
    """
    import torch

    from mediphi.backbone import _checkpoint_activations

    device, bf16 = measuring.device(), task.precision == "bf16-mixed"
    model = measuring.random_model(task.model)
    _checkpoint_activations(model, except_in=[])  # a long document in float32 needs the room
    targets, total = sum(len(ids) - 1 for ids in task.documents), 0.0
    for ids in task.documents:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = _sum_of_losses(model, ids, device) / targets
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return total, measuring.sampled(model)


def _sum_of_losses(model: Any, ids: list[int], device: str) -> Any:
    import torch
    import torch.nn.functional as F

    row = torch.tensor([ids], device=device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, row[0, 1:], reduction="sum")


def reference(task: Task) -> dict[str, Any]:
    """Of the first step: loss, gradient, and how far rounding alone takes one from float32.

    The last on a few documents: over more of them gradient and rounding grow alike.
    """
    task = task.first_step
    loss, gradient = one_by_one(task)
    few = task._replace(documents=task.documents[:4])
    exact = one_by_one(few._replace(precision="32-true"))[1]
    noise = measuring.distance(one_by_one(few)[1], exact)
    return {"loss": loss, "gradient": gradient, "noise": noise}


def judge(meter: DeviceMeter, known: dict[str, Any], *, precision: str) -> dict[str, float]:
    """How far the step of a parity run is off documents one by one.

    The mean loss hardly changes when tokens see other documents: over thousands of random tokens
    better and worse guesses cancel out. The gradient changes as a whole.

    Raises:
        SystemExit: the side computes something else.
    """
    loss_off = abs(sum(meter.losses) - known["loss"])
    grad_off = measuring.distance(meter.gradient, known["gradient"])
    limit = TIMES_NOISE * max(LEAST_NOISE, known["noise"])
    if not (loss_off < OFF[precision] and grad_off < limit):
        raise SystemExit(
            f"no parity: loss {loss_off:.1e} off (allowed {OFF[precision]:.0e}), "
            f"gradient {grad_off:.1e} of its norm off (allowed {limit:.1e})"
        )
    offs = {"loss_off": loss_off, "grad_off": grad_off, "grad_off_allowed": limit}
    return {name: float(f"{off:.1e}") for name, off in offs.items()}


# ---------------------------------------------------------------------------------- workers
def make(task: Task, side: str, folder: Path) -> Train:
    """A run leaves no model behind: the next side needs the device's memory."""
    if side.startswith("ours"):
        train: Any = partial(train_ours, task, folder, compile=SIDES[side]["compile"])
    elif side == "transformers":
        train = partial(train_plainly, task, folder)
    else:
        train = partial(train_peer, task, folder, side=side)
    return train


if __name__ == "__main__":
    own = Task(*json.loads(Path(sys.argv[2]).read_text()))
    serve_judged(sys.argv[1], Path(sys.argv[2]), own, make=make, reference=reference, judge=judge)

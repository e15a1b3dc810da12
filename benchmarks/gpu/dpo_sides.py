"""The sides of `dpo_step.py`: our DpoModule, TRL's DPOTrainer, and the process that runs one."""

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
from train_sides import LIGER

BETA = 0.1
OFF = {"32-true": 1e-4, "bf16-mixed": 5e-2}
"""How far a loss may be off; a difference of sums of log-probabilities shows all of bfloat16."""
PRECOMPUTED = {"precompute_ref_log_probs": True, "logging_nan_inf_filter": False}
LEAN = {**PRECOMPUTED, "gradient_checkpointing": False}
SIDES: dict[str, dict[str, Any]] = {
    "ours": {"compile": False},
    "ours, compiled": {"compile": True},
    "trl online": {},
    "trl precomputed": PRECOMPUTED,
    "trl precomputed, nothing recomputed": LEAN,
    "trl precomputed, liger": {**LEAN, **LIGER},
}
ABOUT = {
    "ours": "packed pairs, each prompt once, logits of answers alone, reference from the cache",
    "ours, compiled": "as ours, decoder layers through torch.compile",
    "trl online": "DPOTrainer's default: the reference is asked beside every step; padded, "
    "activations recomputed",
    "trl precomputed": "DPOTrainer with precompute_ref_log_probs; padded, activations recomputed",
    "trl precomputed, nothing recomputed": "as trl precomputed, without gradient_checkpointing, a "
    "quarter of the pairs a pass",
    "trl precomputed, liger": "as the last, with Liger's norms, rotary embedding and SwiGLU",
}


class Task(NamedTuple):
    """What a worker trains: random pairs, `[prompt, chosen, rejected]`, in so many steps.

    Attributes:
        rows_per_pass: packed rows that go through our model at a time.
        pairs_per_pass: pairs, padded, that go through the others'; activations recomputed.
        reference_seed: of the reference's weights; the policy's is 0.
    """

    model: str
    documents: list[list[list[int]]]
    capacity: int
    steps: int
    warmup_steps: int
    rows_per_pass: int
    pairs_per_pass: int
    precision: str
    reference_seed: int = 0

    @property
    def first_step(self) -> "Task":
        """The pairs of one optimizer step, at a policy that has left its reference."""
        share = len(self.documents) // self.steps
        own = self.documents[:share]
        return self._replace(documents=own, steps=1, warmup_steps=0, reference_seed=1)


# ---------------------------------------------------------------------------------- ours
def packed_pairs(task: Task, folder: Path) -> Any:
    from dataclasses import replace

    from tokenizers import Tokenizer

    from mediphi.data.datamodule import PackedDataModule
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings, TrainingPlan
    from mediphi.data.render import Piece, Rendered
    from mediphi.data.sequences import PAIR_KINDS
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey

    tokenizer = Tokenizer.from_file(str(Path(task.model) / "tokenizer.json"))
    kinds: Any = ("user", "chosen", "rejected")
    rows = (
        Rendered(
            f"p/{i}",
            "p",
            [Piece(kind, "", tuple(ids), ()) for kind, ids in zip(kinds, parts, strict=True)],
        )
        for i, parts in enumerate(task.documents)
    )
    name = f"{len(task.documents)} random pairs"
    key = StoreKey(tokenizer_sha256(tokenizer), "benchmark", name, "train", 0)
    store = build_store(rows, cache=folder, tokenizer=tokenizer, key=key)
    settings = PlanSettings(PAIR_KINDS, task.capacity, 1, layout="shared_pairs")
    rows, size, steps = TrainingPlan(store, settings).num_rows, task.rows_per_pass, task.steps
    passes = passes_per_step(rows, size=size, steps=steps)
    sizes = {"global_batch": passes * size, "micro_batch": size}
    settings = replace(settings, **sizes, max_steps=steps)
    return PackedDataModule(store, heldout=None, settings=settings, prefetch=2)


def dpo_module(task: Task, data: Any, *, compile: bool, seed: int, is_reference: bool) -> Any:
    from mediphi import attention, engine
    from mediphi.backbone import BackboneSpec, prepare_training
    from mediphi.config.schema import Hardware
    from mediphi.modules.dpo import DpoModule, Objective

    device = engine.resolve(Hardware(), shares_prompts=True)
    spec = BackboneSpec(
        task.model,
        "random",
        "main",
        device.kernel,
        compiled_tokens=data.max_tokens if compile else None,
        loss_chunk_tokens=device.loss_chunk_tokens,
    )
    plan, names = data.train_plan, data.group_names
    options = trainers.our_options(task.model, num_steps=plan.num_steps, splits=plan.accumulate)
    phase = options["phase"].model_copy(update={"lr": LR})
    groups = {"source": names["source"], "error": names["error_type"], "task": names["task_type"]}
    module = DpoModule(
        objective=Objective(beta=BETA, uses_reference=not is_reference),
        group_names=groups,
        **{**options, "backbone": spec, "phase": phase},
    )
    kernel = attention.IMPLEMENTATIONS[device.kernel]
    module.model = measuring.random_model(task.model, implementation=kernel, seed=seed)
    prepare_training(module.model, spec)
    return module


def reference_pass(task: Task, data: Any, meter: DeviceMeter) -> Any:
    """Log-probabilities by row of the store, float32 `[pairs, 2]`."""
    import numpy as np
    import torch

    from mediphi.data.loader import PackedLoader

    seed = task.reference_seed
    module = dpo_module(task, data, compile=False, seed=seed, is_reference=True).eval()
    device, bf16 = measuring.device(), task.precision == "bf16-mixed"
    logps = np.full((len(task.documents), 2), np.nan, dtype=np.float32)
    own = meter.apart()
    own.start()
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        for batch in PackedLoader(data.train_plan):
            rows, values = module.predict_step(batch.to(device), 0)
            logps[rows.numpy()] = values.numpy()
    own.stop()
    meter.take_reference(own)
    return logps


def train_ours(task: Task, folder: Path, meter: DeviceMeter, *, compile: bool) -> None:
    from mediphi.data.datamodule import References

    task = of(task, meter)
    data = packed_pairs(task, folder / str(task.steps))
    logps = reference_pass(task, data, meter)
    data.references = References(logps, logps)
    meter.release()  # the reference is gone before training begins, as in a run
    module = dpo_module(task, data, compile=compile, seed=0, is_reference=False)
    fit(task, data, module, meter)


# ---------------------------------------------------------------------------------- TRL
def train_peer(task: Task, folder: Path, meter: DeviceMeter, *, side: str) -> None:
    """Rows are ids already, so nothing is tokenised."""
    import datasets
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    trainers.quiet_peers()
    task = of(task, meter)
    progress = Progress(meter, task)
    share = len(task.documents) // task.steps
    keeps_activations = "gradient_checkpointing" in SIDES[side]
    size = task.pairs_per_pass // 4 if keeps_activations else task.pairs_per_pass
    own = {**SIDES[side], "per_device_train_batch_size": size}
    own["gradient_accumulation_steps"] = -(-share // size)
    config = DPOConfig(
        **peer_arguments(task, folder, own),
        max_length=task.capacity,
        max_steps=task.steps,
        beta=BETA,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, parts, strict=True)) for parts in task.documents]
    # It would hash all weights to find an earlier pass' results, which are not to be found here.
    dpo_trainer.hash_module = lambda _: f"{folder} {id(meter)}"

    class Counting(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            reference = meter.apart()
            reference.start()
            found = super()._precompute_ref_logps(*args, **options)
            reference.stop()
            meter.take_reference(reference)
            return found

        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **options)
            lengths = next(passes)
            positions = inputs["input_ids"].numel()
            progress.add(tokens=sum(lengths), positions=positions, loss=loss, pairs=len(lengths))
            return loss

    is_away = task.reference_seed != 0 or "online" in side
    reference = measuring.random_model(task.model, seed=task.reference_seed) if is_away else None
    trainer = Counting(
        model=measuring.random_model(task.model),
        ref_model=reference,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=peer_tokenizer(task.model),
        callbacks=[peer_clock(progress)],
    )
    lengths = [2 * len(p) + len(c) + len(r) for p, c, r in task.documents]
    passes = (lengths[i : i + size] for i in range(0, len(lengths), size))
    trainer.train()


# ---------------------------------------------------------------------------------- workers
def one_by_one(task: Task) -> float:
    """DPO's loss of the first step (Rafailov et al. 2023, eq. 7), each sequence alone."""
    import torch
    import torch.nn.functional as F

    task = task.first_step
    logps = [_answer_logps(task, seed=seed) for seed in (0, task.reference_seed)]
    chosen, rejected = (logps[0] - logps[1]).unbind(1)
    return float(-F.logsigmoid(BETA * (chosen - rejected)).mean().to(torch.float64))


def _answer_logps(task: Task, *, seed: int) -> Any:
    """Float32 `[pairs, 2]`."""
    import torch

    model, device = measuring.random_model(task.model, seed=seed), measuring.device()
    found = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled="bf16" in task.precision):
        for prompt, *answers in task.documents:
            for answer in answers:
                row = torch.tensor([[*prompt, *answer]], device=device)
                logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
                logps = logits.float().log_softmax(-1)
                found.append(logps.gather(1, row[0, len(prompt) :, None]).sum())
    return torch.stack(found).view(-1, 2)


def judge(meter: DeviceMeter, expected: float, *, precision: str) -> dict[str, float]:
    """How far the loss of a parity run is off; TRL's passes are means of their pairs.

    Raises:
        SystemExit: the side computes something else, or the loss tells nothing.
    """
    if abs(expected - 0.6931) < 2e-3:
        raise SystemExit("no parity: policy and reference are the same")
    off = abs(sum(meter.losses) - expected)
    if not off < OFF[precision]:
        raise SystemExit(f"no parity: loss {off:.1e} off (allowed {OFF[precision]:.0e})")
    return {"loss_off": float(f"{off:.1e}")}


def make(task: Task, side: str, folder: Path) -> Train:
    if side.startswith("ours"):
        train: Any = partial(train_ours, task, folder, compile=SIDES[side]["compile"])
    else:
        train = partial(train_peer, task, folder, side=side)
    return train


if __name__ == "__main__":
    own = Task(*json.loads(Path(sys.argv[2]).read_text()))
    serve_judged(sys.argv[1], Path(sys.argv[2]), own, make=make, reference=one_by_one, judge=judge)

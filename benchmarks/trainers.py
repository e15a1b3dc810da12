"""The two trainers of the step benchmarks, as they share them: Lightning around ours, TRL's."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sides import ROOT, TINY, Meter, Train

LR = 1e-3
TEMPLATE_END = "{% else %}{{ eos_token }}"
"""Phi-3.5's template ends a whole conversation so, behind its last `<|end|>`. A model stops at
`<|end|>`, so we do not train what follows; for equal targets the peer's template loses it."""


def write_model(folder: Path) -> str:
    """Random weights of the tiny model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    model.save_pretrained(folder / "model")
    return str(folder / "model")


def bundled_records(corpus: str, *, stage: str, side: str = "train") -> list[Any]:
    """A side of a bundled corpus."""
    from hydra import compose, initialize_config_dir

    from mediphi.config import load
    from mediphi.data.corpora import read_documents

    chosen = [f"corpus={corpus}", f"stage={stage}", f"paths.assets={ROOT}/assets"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = load(compose("config", chosen))
    with read_documents(config.corpus) as reading:
        return list(reading.records(side))  # type: ignore[arg-type]


def floor_flops(model: str, *, tokens: int, attended: int, targets: int) -> float:
    """FLOPs that nobody can save: six for each weight in a matrix product.

    Args:
        tokens: that go through the body of the model.
        attended: (query, key) pairs.
        targets: tokens that need logits.
    """
    from transformers import AutoModelForCausalLM

    from mediphi.engine import training_flops

    loaded = AutoModelForCausalLM.from_pretrained(model)
    head = loaded.get_output_embeddings().weight.numel()
    matrices = sum(p.numel() for p in loaded.parameters() if p.ndim > 1)
    return 6.0 * head * targets + training_flops(
        num_matmul_parameters=matrices - loaded.get_input_embeddings().weight.numel() - head,
        hidden=loaded.config.hidden_size,
        layers=loaded.config.num_hidden_layers,
        pairs=attended,
        tokens=tokens,
    )


def triangle(length: int) -> int:
    """(query, key) pairs of causal attention."""
    return length * (length + 1) // 2


# ---------------------------------------------------------------------------------- ours
def our_options(model: str, *, num_steps: int, splits: int) -> dict[str, Any]:
    """What our modules of all objectives take, with TRL's optimizer."""
    from mediphi.backbone import BackboneSpec
    from mediphi.config.stages import Optimizer, Phase

    return {
        "backbone": BackboneSpec(model, "pretrained", "main", "sdpa"),
        "phase": Phase(lr=LR, schedule="constant"),
        "optimizer": Optimizer(beta2=0.999, weight_decay=0.0),
        "num_steps": num_steps,
        "splits": splits,
    }


def our_trainer(precision: str, *, loop: dict[str, Any], callbacks: list[Any]) -> Any:
    """The Trainer of a phase, without checkpoints, logs and export."""
    from mediphi import engine
    from mediphi.checkpointing import SafeCheckpointIO
    from mediphi.config.schema import Hardware
    from mediphi.tracking.progress import silence_lightning

    silence_lightning()
    hardware = Hardware(accelerator="cpu", precision=precision)
    return engine.make_trainer(
        hardware,
        engine.resolve(hardware),
        checkpoint_io=SafeCheckpointIO(),
        callbacks=callbacks,
        loggers=[],
        loop=loop,
    )


def fit(module: Any, data: Any, *, precision: str, meter: Meter) -> Any:
    """Train a module on a data module or a loader; returns the transformers model."""
    import lightning as L

    class Clock(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            meter.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            meter.losses.append(float(outputs["loss"]))

        def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
            meter.stop()
            meter.steps = trainer.global_step

    steps = {"max_steps": module.num_steps, "accumulate_grad_batches": module.splits}
    loop = {**steps, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    our_trainer(precision, loop=loop, callbacks=[Clock()]).fit(module, data)
    return module.backbone


def fit_packed(make_module: Any, data: Any, meter: Meter, *, precision: str) -> Any:
    """`fit` on packed rows of a `PackedDataModule`."""
    model = fit(make_module(data), data, precision=precision, meter=meter)
    meter.tokens = meter.positions = data.train_plan.num_tokens
    return model


def make_ours(make_module: Any, data: Any, *, precision: str) -> Train:
    return partial(fit_packed, make_module, data, precision=precision)


def packed_plan(store: Any, settings: Any, *, steps: int) -> Any:
    """Settings under which the store is `steps` optimizer steps of two micro-batches each."""
    from dataclasses import replace

    from mediphi.data.plan import TrainingPlan

    rows = TrainingPlan(store, replace(settings, global_batch=1, micro_batch=1)).num_rows
    micro = -(-rows // (2 * steps))
    return replace(settings, global_batch=2 * micro, micro_batch=micro)


def language_model_module(model: str, data: Any) -> Any:
    from mediphi.modules.language_model import LanguageModelModule
    from mediphi.records import PIECE_KINDS

    plan, names = data.train_plan, data.group_names
    return LanguageModelModule(
        group_names={"kind": PIECE_KINDS, "source": names["source"], "task": names["task_type"]},
        **our_options(model, num_steps=plan.num_steps, splits=plan.accumulate),
    )


# ---------------------------------------------------------------------------------- TRL
def quiet_peers() -> None:
    """Without progress bars; imports the trainers, which no run's memory is to pay for."""
    import datasets
    import transformers
    from trl import DPOTrainer, SFTTrainer

    assert DPOTrainer and SFTTrainer
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def peer_tokenizer() -> Any:
    """With a template that ends at `<|end|>`, see `TEMPLATE_END`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert TEMPLATE_END in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(TEMPLATE_END, "")
    return tokenizer


def peer_arguments(folder: Path, *, precision: str) -> dict[str, Any]:
    """Of SFTConfig and DPOConfig: as ours trains, and nothing but training."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "bf16": precision == "bf16-mixed",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def peer_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def counting(trainer: type, meter: Meter) -> type:
    """A TRL trainer class that counts what goes through the model."""

    class Counting(trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            # The reference model of DPO, where it is asked beside every step, reads the same.
            times = 1 if getattr(self, "ref_model", None) is None else 2
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            meter.positions += times * ids.numel()
            meter.tokens += times * (ids.numel() if mask is None else int(mask.sum()))
            loss = super().training_step(model, inputs, *args, **options)
            meter.losses.append(float(loss))
            return loss

    return Counting


def peer_clock(meter: Meter) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            meter.stop()
            meter.steps = state.global_step

    return Clock()


def head_as_on_gpu(wanted: bool) -> None:
    """Whether TRL multiplies its head with targets alone.

    TRL does so where Triton runs, and scores all positions elsewhere, padding and prompts too. Its
    own switch, seen from outside; the arithmetic stays that of the CPU.
    """
    from trl.kernels.chunked_logprob import _use_triton
    from trl.trainer import utils

    utils._use_triton = (lambda device: True) if wanted else _use_triton


# ---------------------------------------------------------------------------------- parity
def gradient(model: Any) -> Any:
    """All gradients of a model, end to end."""
    import torch

    return torch.cat([p.grad.flatten() for p in model.parameters()])


def backward(model: Any, losses: Iterator[Any]) -> tuple[float, Any]:
    """The sum of losses, each of which goes backward before the next is made, and the gradient."""
    model.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += float(loss.detach())
    return total, gradient(model)


def compare(name: str, got: tuple[float, Any], wanted: tuple[float, Any]) -> dict[str, float]:
    """How far a side's loss and gradient are off.

    Raises:
        AssertionError: a loss is more than 1e-4 off, or a gradient 1e-3 of its norm.
    """
    off = abs(got[0] - wanted[0])
    grad_off = float((got[1] - wanted[1]).norm() / wanted[1].norm())
    assert off < 1e-4 and grad_off < 1e-3, f"{name}: loss {off}, gradient {grad_off} off"
    return {"loss_off": float(f"{off:.1e}"), "grad_off": float(f"{grad_off:.1e}")}

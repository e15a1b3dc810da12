"""A small real training with all callbacks, and ways to kill it; shared by tests."""

import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from mediphi.checkpointing import (
    FiniteGuard,
    PeriodicCheckpoint,
    SafeCheckpointIO,
    StopOnSignal,
    last_checkpoint,
    step_folder,
    step_of,
)
from mediphi.checkpointing.safe_io import checkpoints_in, retain
from mediphi.tracking import begin_phase
from mediphi.tracking.csv_log import CsvLogger
from mediphi.tracking.names import WALL_CLOCK, header
from mediphi.tracking.progress import silence_lightning
from mediphi.tracking.training_rows import TrainingRows

ACCUMULATE = 2
NUM_BATCHES = 16
NUM_STEPS = NUM_BATCHES // ACCUMULATE


class ToyBatch(SimpleNamespace):
    """The fields of a TokenBatch that callbacks look at, and numbers to train on."""


class ToyLoader:
    """Deterministic and resumable, as the DataModule's loader is."""

    def __init__(self, num_batches: int = NUM_BATCHES, targets: int = 32) -> None:
        self.num_batches, self.targets, self.consumed = num_batches, targets, 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[ToyBatch]:
        while self.consumed < self.num_batches:
            self.consumed += 1
            yield ToyBatch(
                x=torch.full((4, 8), self.consumed / self.num_batches),
                num_tokens=32,
                num_global_targets=self.targets,
                document_index=torch.tensor([self.consumed, -1]),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


class HeldoutLoader(ToyLoader):
    def __iter__(self) -> Iterator[ToyBatch]:
        self.consumed = 0
        yield from super().__iter__()


class Toy(LightningModule):
    """Uses dropout and Python's and NumPy's generators, so that every random state matters."""

    fused: bool | None = None

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.pause = pause
        self.register_buffer("window", torch.zeros(2, dtype=torch.float64))

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        noise = random.random() + float(np.random.rand())
        loss = self.net(batch.x).pow(2).mean() + noise * self.net[0].weight.pow(2).sum()
        self.window += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
        time.sleep(self.pause)
        return loss

    def gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def take_metrics(self) -> dict[str, float]:
        total, count = self.window.tolist()
        self.window.zero_()
        return {"train/loss": total / count}

    def validation_step(self, batch: ToyBatch, batch_idx: int) -> None:
        self.heldout = float(self.net(batch.x).mean())

    def on_validation_epoch_end(self) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics({"heldout/loss": self.heldout}, step=self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(
    run_dir: Path,
    *,
    make_module: Callable[[], Toy] = Toy,
    loader: ToyLoader | None = None,
    callbacks: Callable[[PeriodicCheckpoint], list[Callback]] = lambda checkpoint: [],
    every_steps: int = 1,
    rows_every: int = 1,
) -> Toy:
    """Train to the end, from the last checkpoint if there is one: what `run.py` does."""
    silence_lightning()
    seed_everything(0, verbose=False)
    module = make_module()
    folder = run_dir / "checkpoints" / "phase1"
    found = last_checkpoint(folder)
    logger = CsvLogger(run_dir / "metrics.csv", header("tokens", {}))
    resumed = step_of(found) if found else None
    begin_phase([logger], "phase1", first_step=0, resumed_step=resumed)
    checkpoint = PeriodicCheckpoint(folder, every_steps=every_steps, keep=100)
    others = callbacks(checkpoint)
    settle = next((c.settle for c in others if isinstance(c, FiniteGuard)), lambda: None)
    rows = TrainingRows(every_steps=rows_every, num_steps=NUM_STEPS, settle=settle)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=2 * ACCUMULATE,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[logger],
        callbacks=[rows, *others, checkpoint],
        plugins=[SafeCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    trainer.fit(module, loader or ToyLoader(), HeldoutLoader(2), ckpt_path=found)
    return module


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def rows_without_clock(run_dir: Path) -> list[str]:
    """Lines of metrics.csv without their wall-clock columns, which come last."""
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    return [line.rsplit(",", len(WALL_CLOCK))[0] for line in lines]


def save(folder: Path, step: int, *, floats: int = 1000) -> Path:
    target = step_folder(folder, step)
    state = {"global_step": step, "weights": torch.full((floats,), float(step))}
    SafeCheckpointIO().save_checkpoint(state, target)
    return target


class SendSignal(Callback):
    """Sends this process signals while step `step` is being computed, and perhaps in every save."""

    def __init__(
        self, number: int, *, step: int, times: int = 1, also_in_saves: bool = False
    ) -> None:
        self.number, self.step, self.times = number, step, times
        self.also_in_saves = also_in_saves

    def state_dict(self) -> dict[str, Any]:
        if self.also_in_saves:
            os.kill(os.getpid(), self.number)
        return {}

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_step == self.step - 1:
            self.step = -1
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


PRELOAD = ["mediphi.checkpointing", "mediphi.tracking.progress", "mediphi.tracking.training_rows"]


def save_for_ever(folder: str, first: int, temporary: str) -> None:
    tempfile.tempdir = temporary
    for step in range(first, first + 10_000):
        save(Path(folder), step, floats=200_000)
        retain(Path(folder), 2)


def save_two(folder: str) -> None:
    for step in (1, 2):
        save(Path(folder), step)


def train_slowly(run_dir: str) -> None:
    warnings.simplefilter("ignore")
    train(Path(run_dir), make_module=lambda: Toy(pause=0.002))


def train_and_signal(run_dir: str, number: int, times: int) -> None:
    warnings.simplefilter("ignore")
    train(
        Path(run_dir),
        callbacks=lambda c: [SendSignal(number, step=3, times=times), StopOnSignal(c)],
        every_steps=100,
    )


def start(target: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def exit_code(process: Any, seconds: float | None = None) -> int | None:
    """Wait, kill -9 what still runs, and say how it ended."""
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def wait_for_newer(folder: Path, step: int, process: Any) -> None:
    while process.is_alive() and not any(step_of(p) > step for p in checkpoints_in(folder)):
        time.sleep(0.002)

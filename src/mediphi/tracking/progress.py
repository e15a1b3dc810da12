"""Progress of a phase: a bar on a terminal, plain lines in a log file."""

import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mediphi.tracking.csv_log import CsvLogger

SHOWN = (
    ("train/loss", "loss {:.3f}"),
    ("heldout/loss", "held-out {:.3f}"),
    ("lr", "lr {:.1e}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)
CHATTER = (
    r".*all_gather_into_tensor.*is deprecated.*",  # DeepSpeed calls it
    # What Lightning says of setups that are meant so.
    r".*does not have many workers.*",
    r".*`num_workers` argument.*",
    r".*is smaller than the logging interval.*",
    r".*[Cc]heckpoint directory .* exists and is not empty.*",
    r".*LeafSpec.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*`Trainer\(logger=.*",
    r".*IterableDataset.*__len__.*",
    r".*`srun` command is available.*",
    r".*GPU available but not used.*",
)


def make_progress(title: str, *, num_steps: int, every_seconds: float = 10.0) -> Callback:
    """A bar where stderr is a terminal, else a line at most every `every_seconds`."""
    if sys.stderr.isatty():
        return ProgressBar(title, num_steps=num_steps)
    return ProgressLines(title, num_steps=num_steps, every_seconds=every_seconds)


def silence_lightning() -> None:
    """Hide tips, hardware lines and the bars of small files; warnings about trouble stay."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():  # Lightning imports DeepSpeed, which warns of no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)


def numbers(trainer: Trainer) -> str:
    """The newest metrics, as far as they exist."""
    latest: dict[str, float] = {}
    for logger in trainer.loggers:
        if isinstance(logger, CsvLogger):
            latest = logger.latest
    return "  ".join(text.format(latest[name]) for name, text in SHOWN if name in latest)


def evaluation_follows(trainer: Trainer) -> bool:
    """Whether the last step is evaluated: the last numbers are told behind that, not before."""
    return trainer.limit_val_batches != 0


class ProgressLines(Callback):
    """`phase1 step 120/480  loss 3.214  lr 2.9e-03  41,230 tok/s  ETA 0:01:23` on stderr."""

    def __init__(self, title: str, *, num_steps: int, every_seconds: float) -> None:
        self.title, self.num_steps, self.every_seconds = title, num_steps, every_seconds
        self._begun = self._printed = 0.0
        self._first_step = self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self._printed = time.monotonic()
        self._first_step = self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step or not trainer.is_global_zero:
            return
        self._step, now = trainer.global_step, time.monotonic()
        is_due = now - self._printed >= self.every_seconds
        if self._step == self.num_steps:
            is_due = not evaluation_follows(trainer)
        if is_due:
            self._say_step(trainer, now)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._step == self.num_steps and trainer.is_global_zero:
            self._say_step(trainer, time.monotonic())

    def _say_step(self, trainer: Trainer, now: float) -> None:
        self._printed = now
        place = f"{self.title} step {self._step}/{self.num_steps}"
        _say(f"{place}  {numbers(trainer)}{self._eta(now)}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self._printed = time.monotonic()
        self._step = self._first_step = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._step, now = batch_idx + 1, time.monotonic()
        if trainer.is_global_zero and now - self._printed >= self.every_seconds:
            self._printed = now
            _say(f"{self.title} {self._step}/{self.num_steps}{self._eta(now)}")

    def _eta(self, now: float) -> str:
        left = self.num_steps - self._step
        seconds = (now - self._begun) / (self._step - self._first_step) * left
        return f"  ETA {timedelta(seconds=round(seconds))}" if left > 0 else ""


class ProgressBar(Callback):
    """The same numbers beside a bar that stays on one line."""

    def __init__(self, title: str, *, num_steps: int) -> None:
        self.title, self.num_steps = title, num_steps
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, done=trainer.global_step)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, done=0)

    def _open(self, trainer: Trainer, *, done: int) -> None:
        if not trainer.is_global_zero:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}  ETA"),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True))
        self._task = progress.add_task(self.title, total=self.num_steps, completed=done, numbers="")
        progress.start()
        self._progress = progress

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._progress is not None:
            done = trainer.global_step
            self._progress.update(self._task, completed=done, numbers=numbers(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.num_steps and self._progress is not None:
            self._progress.update(self._task, numbers=numbers(trainer))
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < self.num_steps or not evaluation_follows(trainer):
            self._close()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=batch_idx + 1)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _say(line: str) -> None:
    """A closed pipe must not stop a training."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)

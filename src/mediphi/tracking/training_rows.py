"""Write one row every few optimizer steps: the module's numbers, the position, the speed."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from lightning import Callback, LightningModule, Trainer

from mediphi.batches import Batch


class HasStepMetrics(Protocol):
    """A module that can say how the last steps went."""

    def take_metrics(self) -> dict[str, float]:
        """Means since the last call, over all ranks (called on each); then starts anew."""
        ...


class TrainingRows(Callback):
    """Goes before `PeriodicCheckpoint`: a checkpoint of a step means that its row is written.

    Args:
        every_steps: optimizer steps between rows; the last step always has one.
        num_steps: optimizer steps of the phase.
        position: `epoch`, `tokens_seen`, `packing_efficiency` after so many steps, from the plan.
        flops: floating-point operations of training on a batch, forward and backward.
        peak_flops: of one device, per second.
        settle: called before a row is made, and raises if a step of it was no good.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        num_steps: int,
        position: Callable[[int], Mapping[str, float]] = lambda step: {},
        flops: Callable[[Batch], float] | None = None,
        peak_flops: float | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.every_steps, self.num_steps, self.position = every_steps, num_steps, position
        self.flops, self.peak_flops, self.settle = flops, peak_flops, settle
        self._step = 0
        self._begun = self._paused = time.perf_counter()
        self._tokens, self._operations = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._begin_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun += time.perf_counter() - self._paused

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._tokens += batch.num_tokens
        self._operations += self.flops(batch) if self.flops else 0.0
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        if step % self.every_steps == 0 or step == self.num_steps:
            self._write(trainer, cast(HasStepMetrics, pl_module))

    def _write(self, trainer: Trainer, module: HasStepMetrics) -> None:
        self.settle()
        row = {
            **self.position(self._step),
            **module.take_metrics(),
            **self._speed(trainer),
        }
        self._begin_window()
        for logger in trainer.loggers:
            logger.log_metrics(row, step=self._step)

    def _begin_window(self) -> None:
        self._begun = time.perf_counter()
        self._tokens, self._operations = 0, 0.0

    def _speed(self, trainer: Trainer) -> dict[str, float]:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._begun
        speed = {
            "tokens_per_second": self._tokens * trainer.world_size / seconds,
            "memory_gb": peak_memory_gb(device),
        }
        if self.flops and self.peak_flops:
            speed["mfu"] = self._operations / seconds / self.peak_flops
        return speed


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in 10^9 bytes: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

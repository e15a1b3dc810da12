"""SIGTERM and SIGINT: finish the optimizer step, save, leave with 143 or 130."""

import os
import signal
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from mediphi.checkpointing.periodic import PeriodicCheckpoint
from mediphi.errors import Interrupted
from mediphi.interruption import SIGNALS, give_back, hear_once


class StopOnSignal(Callback):
    """Turns the first signal into a saved state and `Interrupted`; the second ends at once.

    In a Slurm job a second SIGTERM is not heard, so that the state is saved whole.

    Lightning's own SIGTERM handler lets the program end with exit code 0. Ours is put over it
    while the training loop runs. Goes before `checkpoint` in the Trainer's list.

    Args:
        checkpoint: writes the state, then raises.
    """

    def __init__(self, checkpoint: PeriodicCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.received_sigterm:  # came between Lightning's handler and ours
            self.received = signal.SIGTERM
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if number := self._agreed(trainer):
            self.checkpoint.stop = Interrupted(128 + number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.received is None:
            self._restore()
        else:  # the last save is still to come, and then `on_exception`
            self.checkpoint.stop = Interrupted(128 + self.received)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        hear_once(number)
        if again:
            os._exit(128 + number)
        self.received = number

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any rank has seen, or 0: all ranks must save together."""
        mine = int(self.received or 0)
        if trainer.world_size == 1:
            return mine
        flag = torch.tensor(float(mine), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(flag, reduce_op="max"))

    def _restore(self) -> None:
        give_back(self._previous)
        self._previous = {}

"""Save every N optimizer steps, with the random states, so that resume is bitwise."""

import random
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mediphi.checkpointing.safe_io import remove_staging, retain, step_folder
from mediphi.errors import Interrupted
from mediphi.process_group import from_all_ranks


class PeriodicCheckpoint(Callback):
    """Writes `folder/step-........` after an optimizer step, once everything about it is done.

    Where a validation or the end of an epoch follows the step, the save waits for it: resuming from
    an earlier save, Lightning would skip that validation or the whole next epoch. Rows about the
    step have to be logged before this callback runs, so it goes last in the Trainer's list.

    Args:
        folder: one folder per phase.
        every_steps: optimizer steps between saves.
        keep: newest valid checkpoints that stay.
    """

    def __init__(self, folder: Path, *, every_steps: int, keep: int) -> None:
        self.folder, self.every_steps, self.keep = folder, every_steps, keep
        self.stop: Interrupted | None = None
        self._saved_step = 0
        self._waiting = False
        self._restored: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            remove_staging(self.folder)

    def state_dict(self) -> dict[str, Any]:
        """Random states of every rank; Lightning calls this on all of them."""
        return {"rng": from_all_ranks(rng_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["rng"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Where ranks share out a step in another way now, Lightning counts its batches anew."""
        steps = checkpoint["global_step"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update({key: steps * trainer.accumulate_grad_batches for key in counts})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Random states go back last: building the model and the loaders has drawn numbers.

        On another number of ranks there are none to go back to: noise is drawn anew, so that the
        run ends like an undisturbed one only as far as it uses none.
        """
        self._saved_step = trainer.global_step
        if self._restored is None:
            return
        if len(self._restored) == trainer.world_size:
            set_rng_states(self._restored[trainer.global_rank])
        else:
            torch.manual_seed(hash((trainer.global_step, trainer.global_rank)))
        self._restored = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        if step % self.every_steps and self.stop is None:
            return
        self._waiting = _is_last_batch(trainer) or _validation_follows(trainer)
        if not self._waiting:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waiting and not trainer.sanity_checking and not _is_last_batch(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waiting:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        if self.stop is not None:
            self._leave(trainer, self.stop)

    def _save(self, trainer: Trainer) -> None:
        self._waiting = False
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(step_folder(self.folder, trainer.global_step))
        if trainer.is_global_zero:
            retain(self.folder, self.keep)
        if self.stop is not None:
            self._leave(trainer, self.stop)

    def _leave(self, trainer: Trainer, stop: Interrupted) -> NoReturn:
        """Say in one line where the state is, then go."""
        if trainer.is_global_zero:
            name = signal.Signals(int(stop.code or 0) - 128).name
            saved = step_folder(self.folder, self._saved_step)
            print(
                f"stopped by {name}: {saved} is saved, the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        raise stop


def rng_states() -> dict[str, Any]:
    """States of Python's, NumPy's, PyTorch's and CUDA's generators, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Undo everything drawn since `rng_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(_cpu(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_cpu(states["cuda"]))


def _cpu(state: Tensor) -> Tensor:
    return state.cpu()


def _is_last_batch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates right after this batch: its own answer, asked early."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)

"""No number that is not finite reaches the parameters, and the host does not wait to see it."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
from jaxtyping import Float32
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mediphi.batches import Batch
from mediphi.errors import NonFiniteError, UserError
from mediphi.process_group import from_all_ranks, largest_of_all_ranks

MAX_NAMES = 8


class HasGradientNorm(Protocol):
    """A module that can say how long the gradient of this optimizer step is."""

    def gradient_norm(self) -> Float32[Tensor, ""]:
        """L2 norm over all parameters and ranks, before clipping."""
        ...


class QueuedStep(NamedTuple):
    """An optimizer step that the host has queued and not looked at yet.

    Attributes:
        number: from 1.
        losses: of its micro-batches.
        rows: `Batch.document_index` of its micro-batches.
        norm: of its gradient.
        bad: 1 where this step or one before is not finite; on the host once `copied` has passed.
        copied: None where nothing has to be waited for.
    """

    number: int
    losses: Float32[Tensor, " micro_batches"]
    rows: list[Tensor]
    norm: Float32[Tensor, ""]
    bad: Float32[Tensor, ""]
    copied: torch.cuda.Event | None

    @property
    def is_known(self) -> bool:
        """Whether the host can look without waiting."""
        return self.copied is None or self.copied.query()


class FiniteGuard(Callback):
    """Raises if a loss or the gradient norm of a step is NaN or infinite; it changes no parameter.

    The fused AdamW is told on the device: where `found_inf` is 1 it leaves parameters, moments and
    step count alone, in that step and in all after it. The host looks when the answer has arrived,
    without waiting in the step: on one GPU in one of the next optimizer steps, with several ranks
    in the next one, so that all raise together. It waits before anything leaves the step: a row
    (`settle`), a validation, a checkpoint, the end. Another optimizer, or a strategy that splits
    the model, is held up until the host has looked.

    Goes first in the Trainer's list.

    Args:
        document_id: names a row of `Batch.document_index`; negative rows are filler.
    """

    def __init__(self, document_id: Callable[[int], str]) -> None:
        self.document_id = document_id
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._bad: Tensor | None = None
        self._queued: deque[QueuedStep] = deque()

    def settle(self) -> None:
        """Wait for the steps that are queued.

        Raises:
            NonFiniteError: on all ranks, for the first of them that is not finite.
        """
        self._look(wait=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch.num_global_targets <= 0:
            self.settle()
            raise UserError(
                f"step {trainer.global_step + 1} has nothing with a loss; "
                f"documents: {self._names([batch.document_index])}"
            )
        self._rows.append(batch.document_index)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._look(wait=trainer.world_size > 1)
        losses, rows = torch.stack(self._losses).float(), self._rows
        self._losses, self._rows = [], []
        norm = cast(HasGradientNorm, pl_module).gradient_norm()
        self._bad = _sticky(self._bad, losses, norm)
        number = trainer.global_step + 1
        self._queued.append(QueuedStep(number, losses, rows, norm, *_on_host(self._bad)))
        if _leaves_out_by_itself(optimizer, trainer.strategy):
            cast(Any, optimizer).found_inf = self._bad
        else:
            self.settle()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before anything of it is on disk."""
        self.settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()

    def _look(self, *, wait: bool) -> None:
        while self._queued and (wait or self._queued[0].is_known):
            step = self._queued.popleft()
            if step.copied is not None:
                step.copied.synchronize()
            if step.bad:
                raise NonFiniteError(self._message(step))

    def _message(self, step: QueuedStep) -> str:
        losses = zip(step.rows, step.losses.tolist(), strict=True)
        bad = [row for row, loss in losses if not _finite(loss)]
        found = from_all_ranks((bool(bad), self._names(bad or step.rows)))
        guilty = [names for is_bad, names in found if is_bad]
        what = "loss" if guilty else f"gradient norm {step.norm.item()}"
        names = "; ".join(guilty or [names for _, names in found])
        return (
            f"step {step.number}: {what} is not finite, parameters unchanged; "
            f"documents: {names}; lower the learning rate or look at these documents"
        )

    def _names(self, rows: Iterable[Tensor]) -> str:
        numbers = list(dict.fromkeys(n for row in rows for n in row.tolist() if n >= 0))
        names = ", ".join(self.document_id(n) for n in numbers[:MAX_NAMES])
        hidden = len(numbers) - MAX_NAMES
        return f"{names} and {hidden} more" if hidden > 0 else names


def _sticky(before: Tensor | None, losses: Tensor, norm: Tensor) -> Float32[Tensor, ""]:
    """1 on every rank if any has a number that is not finite, now or before; else 0."""
    finite = torch.isfinite(losses).all() & torch.isfinite(norm)
    bad = (~finite).float()
    return largest_of_all_ranks(bad if before is None else torch.maximum(before, bad))


def _on_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that arrives by itself, and what says that it has."""
    copy = torch.empty((), pin_memory=flag.is_cuda).copy_(flag, non_blocking=True)
    if not flag.is_cuda:
        return copy, None
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))
    return copy, copied


def _leaves_out_by_itself(optimizer: torch.optim.Optimizer, strategy: Any) -> bool:
    """Whether `found_inf` keeps the optimizer from an update."""
    is_split = hasattr(strategy, "gradient_norm")
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, torch.optim.AdamW) and is_fused and not is_split


def _finite(value: Any) -> bool:
    return abs(value) < float("inf")  # False for NaN too

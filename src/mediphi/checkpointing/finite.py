"""Stop before the optimizer when a number is not finite, and say which documents were in it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mediphi.batches import Batch
from mediphi.errors import NonFiniteError, UserError
from mediphi.process_group import from_all_ranks

MAX_NAMES = 8


class FiniteGuard(Callback):
    """Raises before the update if a loss or the gradient norm of the step is NaN or infinite.

    One device-to-host read per optimizer step. The parameters stay as they were.

    Args:
        document_id: names a row of `Batch.document_index`; negative rows are filler.
    """

    def __init__(self, document_id: Callable[[int], str]) -> None:
        self.document_id = document_id
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch.num_global_targets <= 0:
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
        losses, rows = torch.stack(self._losses).float(), self._rows
        self._losses, self._rows = [], []
        norm = _gradient_norm(trainer, optimizer)
        finite = bool(torch.isfinite(losses).all() & torch.isfinite(norm))
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            raise NonFiniteError(self._message(trainer, losses, rows, norm))

    def _message(self, trainer: Trainer, losses: Tensor, rows: list[Tensor], norm: Tensor) -> str:
        bad = [row for row, loss in zip(rows, losses.tolist(), strict=True) if not _finite(loss)]
        found = from_all_ranks((bool(bad), self._names(bad or rows)))
        guilty = [names for is_bad, names in found if is_bad]
        what = "loss" if guilty else f"gradient norm {norm.item()}"
        names = "; ".join(guilty or [names for _, names in found])
        return (
            f"step {trainer.global_step + 1}: {what} is not finite, parameters unchanged; "
            f"documents: {names}; lower the learning rate or look at these documents"
        )

    def _names(self, rows: Iterable[Tensor]) -> str:
        numbers = list(dict.fromkeys(n for row in rows for n in row.tolist() if n >= 0))
        names = ", ".join(self.document_id(n) for n in numbers[:MAX_NAMES])
        hidden = len(numbers) - MAX_NAMES
        return f"{names} and {hidden} more" if hidden > 0 else names


def _gradient_norm(trainer: Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    strategy: Any = trainer.strategy
    if hasattr(strategy, "gradient_norm"):  # no rank has all gradients
        return strategy.gradient_norm()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([g for g in grads if g is not None])


def _finite(value: Any) -> bool:
    return abs(value) < float("inf")  # False for NaN too

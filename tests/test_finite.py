"""Numbers that are not finite never reach the parameters."""

from pathlib import Path

import pytest
from torch import Tensor
from toy_training import ACCUMULATE, Toy, ToyBatch, ToyLoader, equal, train, weights

from mediphi.checkpointing import (
    FiniteGuard,
)
from mediphi.errors import NonFiniteError, UserError

# --- numbers ------------------------------------------------------------------------------------


class Poisoned(Toy):
    """Spoils the loss, or only the gradient, of one micro-batch."""

    def __init__(self, *, batch: int, value: float, gradient_only: bool) -> None:
        super().__init__()
        self.batch, self.value, self.gradient_only = batch, value, gradient_only
        self.before: list[Tensor] = []

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx != self.batch:
            return loss
        self.before = weights(self)
        if self.gradient_only:
            loss.register_hook(lambda grad: grad * self.value)
            return loss
        return loss * self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("batch", [0, 5])
def test_non_finite_step_leaves_the_parameters_and_names_the_documents(
    value: float, gradient_only: bool, batch: int, tmp_path: Path
) -> None:
    module = Poisoned(batch=batch, value=value, gradient_only=gradient_only)
    with pytest.raises(NonFiniteError) as caught:
        train(
            tmp_path,
            make_module=lambda: module,
            callbacks=lambda c: [FiniteGuard(lambda row: f"doc/{row}")],
        )
    message = str(caught.value)
    assert equal(weights(module), module.before)
    assert message.startswith(f"step {batch // ACCUMULATE + 1}: ")
    both = f"doc/{batch // 2 * 2 + 1}, doc/{batch // 2 * 2 + 2};"
    assert (both if gradient_only else f" doc/{batch + 1};") in message
    assert caught.value.exit_code != 0 and "\n" not in message


def test_without_the_guard_nan_reaches_the_parameters(tmp_path: Path) -> None:
    module = Poisoned(batch=5, value=float("nan"), gradient_only=False)
    train(tmp_path, make_module=lambda: module)
    assert any(p.isnan().any() for p in module.parameters())


def test_step_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 1 has nothing with a loss; documents: doc/1"):
        train(
            tmp_path,
            loader=ToyLoader(targets=0),
            callbacks=lambda c: [FiniteGuard(lambda row: f"doc/{row}")],
        )

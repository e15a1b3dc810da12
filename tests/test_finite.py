"""Numbers that are not finite never reach the parameters, though the host looks a step later."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor
from toy_training import (
    ACCUMULATE,
    NUM_BATCHES,
    SendSignal,
    Toy,
    ToyBatch,
    ToyLoader,
    equal,
    rows_without_clock,
    train,
    weights,
)

from mediphi.checkpointing import FiniteGuard, StopOnSignal, step_of
from mediphi.checkpointing.safe_io import checkpoints_in
from mediphi.errors import NonFiniteError, UserError

NAN = float("nan")
Callbacks = Callable[..., list[Callback]]


class Fused(Toy):
    """Its optimizer leaves out updates by itself."""

    fused = True


class Poisoned(Toy):
    """Spoils the loss, or only the gradient, of one micro-batch."""

    def __init__(
        self, *, batch: int, value: float = NAN, gradient_only: bool = False, fused: bool = True
    ) -> None:
        super().__init__()
        self.batch, self.value, self.gradient_only = batch, value, gradient_only
        self.fused = fused
        self.before: list[Tensor] = []
        self.last_batch = -1

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last_batch = batch_idx
        if batch_idx != self.batch:
            return loss
        self.before = learnt(self)
        if self.gradient_only:
            loss.register_hook(lambda grad: grad * self.value)
            return loss
        return loss * self.value

    @property
    def bad_step(self) -> int:
        return self.batch // ACCUMULATE + 1


def learnt(module: Toy) -> list[Tensor]:
    """Parameters, moments and step counts; before the first update these are zero."""
    state, found = module.trainer.optimizers[0].state, weights(module)
    for parameter in module.parameters():
        own = state.get(parameter) or {}
        found += [
            own[key].clone() if key in own else torch.zeros_like(parameter)
            for key in ("exp_avg", "exp_avg_sq")
        ]
        found.append(own["step"].clone() if "step" in own else torch.tensor(0.0))
    return found


def guarded(*others: Callback) -> Callbacks:
    return lambda checkpoint: [FiniteGuard(lambda row: f"doc/{row}"), *others]


def stopped(run_dir: Path, module: Poisoned, **options: Any) -> str:
    """What a guarded training says in the end."""
    options = {"callbacks": guarded(), **options}
    with pytest.raises(NonFiniteError) as caught:
        train(run_dir, make_module=lambda: module, **options)
    assert caught.value.exit_code != 0
    return str(caught.value)


def saved_steps(run_dir: Path) -> list[int]:
    return [step_of(found) for found in checkpoints_in(run_dir / "checkpoints" / "phase1")]


def logged_steps(run_dir: Path) -> set[int]:
    return {int(line.split(",")[0]) for line in rows_without_clock(run_dir)[1:]}


# --- numbers ------------------------------------------------------------------------------------

SELDOM = {"every_steps": 100, "rows_every": 100}
"""No row and no save makes the host look early; validations, every other step, do."""
FIRST, MIDDLE, LAST = 0, 5, NUM_BATCHES - 1


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("batch", [FIRST, MIDDLE, LAST])
@pytest.mark.parametrize("fused", [False, True])
def test_non_finite_step_leaves_the_parameters_and_names_the_documents(
    value: float, gradient_only: bool, batch: int, fused: bool, tmp_path: Path
) -> None:
    """Also in the first or second micro-batch of two, and when nothing follows."""
    module = Poisoned(batch=batch, value=value, gradient_only=gradient_only, fused=fused)
    message = stopped(tmp_path, module)
    assert equal(learnt(module), module.before)
    assert message.startswith(f"step {module.bad_step}: ") and "\n" not in message
    both = f"doc/{batch // 2 * 2 + 1}, doc/{batch // 2 * 2 + 2};"
    assert (both if gradient_only else f" doc/{batch + 1};") in message


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_the_host_looks_one_step_later_and_finds_what_looking_at_once_finds(
    gradient_only: bool, batch: int, tmp_path: Path
) -> None:
    """What follows a bad step finds no parameter changed, and changes none."""
    own = {"batch": batch, "gradient_only": gradient_only}
    late, at_once = Poisoned(**own), Poisoned(**own, fused=False)
    said = [stopped(tmp_path / str(m.fused), m, **SELDOM) for m in (late, at_once)]
    assert said[0] == said[1]
    assert equal(learnt(late), late.before)
    end_of_step = late.bad_step * ACCUMULATE - 1
    assert at_once.last_batch == end_of_step
    is_validated = late.bad_step % 2 == 0
    assert late.last_batch == end_of_step + (0 if is_validated else ACCUMULATE)


class TellNoOptimizer(Callback):
    """The host's look alone."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        del optimizer.found_inf


def test_without_the_guard_nan_reaches_the_parameters(tmp_path: Path) -> None:
    for fused in (False, True):
        module = Poisoned(batch=5, fused=fused)
        train(tmp_path / str(fused), make_module=lambda module=module: module)
        assert any(p.isnan().any() for p in module.parameters())


def test_looking_later_alone_would_not_keep_nan_from_the_parameters(tmp_path: Path) -> None:
    module = Poisoned(batch=0)
    stopped(tmp_path, module, callbacks=guarded(TellNoOptimizer()), **SELDOM)
    assert any(p.isnan().any() for p in module.parameters())


def test_a_guarded_training_ends_bitwise_like_an_unguarded_one(tmp_path: Path) -> None:
    """The fused kernel that may leave out an update makes the same update."""
    plain = train(tmp_path / "plain", make_module=Fused)
    module = train(tmp_path / "guarded", make_module=Fused, callbacks=guarded())
    assert module.trainer.optimizers[0].found_inf == 0  # type: ignore[attr-defined]
    assert equal(learnt(module), learnt(plain))
    assert rows_without_clock(tmp_path / "guarded") == rows_without_clock(tmp_path / "plain")


# --- what leaves a step -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [FIRST, 2, MIDDLE, 6, LAST])
@pytest.mark.parametrize("rows_every", [1, 2, 100])
@pytest.mark.parametrize("every_steps", [1, 3, 100])
def test_nothing_of_a_bad_step_is_logged_or_saved(
    batch: int, rows_every: int, every_steps: int, tmp_path: Path
) -> None:
    """A validation follows each even step, a row and a save perhaps each."""
    module = Poisoned(batch=batch)
    stopped(tmp_path, module, every_steps=every_steps, rows_every=rows_every)
    good = range(1, module.bad_step)
    assert saved_steps(tmp_path) == [n for n in good if n % every_steps == 0]
    assert logged_steps(tmp_path) == {n for n in good if n % rows_every == 0 or n % 2 == 0}
    assert "nan" not in (tmp_path / "metrics.csv").read_text()


def test_a_stop_in_a_bad_step_saves_nothing_and_is_an_error(tmp_path: Path) -> None:
    def callbacks(checkpoint: Any) -> list[Callback]:
        return [
            *guarded()(checkpoint),
            SendSignal(signal.SIGTERM, step=3),
            StopOnSignal(checkpoint),
        ]

    before = signal.getsignal(signal.SIGTERM)
    message = stopped(tmp_path, Poisoned(batch=5), callbacks=callbacks, **SELDOM)
    assert message.startswith("step 3: ")
    assert not saved_steps(tmp_path) and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("batch", [2, 7, LAST])
def test_the_run_goes_on_from_the_last_good_step_as_if_undisturbed(
    batch: int, tmp_path: Path
) -> None:
    undisturbed = train(tmp_path / "undisturbed", make_module=Fused, callbacks=guarded())
    with pytest.raises(NonFiniteError):  # built after the seed, so with the same weights
        train(tmp_path / "own", make_module=lambda: Poisoned(batch=batch), callbacks=guarded())
    assert saved_steps(tmp_path / "own") == list(range(1, batch // ACCUMULATE + 1))
    resumed = train(tmp_path / "own", make_module=Fused, callbacks=guarded())
    assert equal(learnt(resumed), learnt(undisturbed))
    ours, theirs = (rows_without_clock(tmp_path / name) for name in ("own", "undisturbed"))
    assert ours == theirs


def test_what_the_optimizer_was_told_is_not_saved(tmp_path: Path) -> None:
    module = Poisoned(batch=MIDDLE)
    stopped(tmp_path, module, **SELDOM)
    (optimizer,) = module.trainer.optimizers
    assert optimizer.found_inf == 1  # type: ignore[attr-defined]
    groups = [key for group in optimizer.param_groups for key in group]
    states = [key for own in optimizer.state.values() for key in own]
    assert "found_inf" not in [*optimizer.state_dict(), *groups, *states]


# --- nothing to learn ---------------------------------------------------------------------------


def test_step_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 1 has nothing with a loss; documents: doc/1"):
        train(tmp_path, loader=ToyLoader(targets=0), callbacks=guarded())

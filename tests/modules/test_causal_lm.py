"""Training steps: normalised by the global batch, awake, and moving every parameter."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from small_models import write_small_folder
from small_training import (
    SETTINGS,
    Fit,
    SpoilGradient,
    differs,
    fit,
    make_module,
    unequal_store,
)
from torch import Tensor

from mediphi.batches import IGNORE, TokenBatch
from mediphi.checkpointing import FiniteGuard
from mediphi.checkpointing.finite import QueuedStep
from mediphi.config.stages import Phase
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import TrainingPlan
from mediphi.data.tokens import TokenStore
from mediphi.errors import NonFiniteError
from mediphi.modules.language_model import LanguageModelModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return unequal_store(tmp_path_factory.mktemp("cache"))


# --- the loss of the global batch


def padded_step(model: Any, batches: list[TokenBatch]) -> Tensor:
    """Mean over all targets of a step in one padded batch, by transformers' own attention."""
    rows, targets = [], []
    for batch in batches:
        ends = batch.cu_seqlens.tolist()
        for a, b in pairwise(ends):
            rows.append(batch.input_ids[0, a:b])
            targets.append(batch.target_ids[0, a:b])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def by_hand(folder: Path, store: TokenStore, *, mean_of_means: bool = False) -> dict[str, Tensor]:
    """Weights after the same SGD steps, written as a plain loop over padded batches."""
    data = PackedDataModule(store, heldout=None, settings=replace(SETTINGS, micro_batch=1))
    module = make_module(folder, data)
    module.configure_model()
    model = module.backbone
    model.set_attn_implementation("eager")
    plan = data.train_plan
    batches = list(PackedLoader(plan))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(plan.num_steps):
        own = batches[step * plan.accumulate : (step + 1) * plan.accumulate]
        optimizer.zero_grad()
        if mean_of_means:
            sum(padded_step(model, [b]) / len(own) for b in own).backward()
        else:
            padded_step(model, own).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def whole(folder: Path, store: TokenStore) -> Fit:
    return fit(folder, store, settings={"micro_batch": 4})


def test_micro_batches_of_the_fixture_are_unequal(store: TokenStore):
    plan = TrainingPlan(store, replace(SETTINGS, micro_batch=1))
    counts = [int((b.target_ids != IGNORE).sum()) for b in PackedLoader(plan)]
    assert plan.accumulate == 4 and len(counts) == 20 and max(counts) > 1.3 * min(counts)


def test_four_micro_batches_equal_one_equal_a_padded_batch_by_hand(
    folder: Path, store: TokenStore, whole: Fit
):
    assert whole.data.train_plan.accumulate == 1
    split = fit(folder, store, settings={"micro_batch": 1})
    assert split.data.train_plan.accumulate == 4
    expected = by_hand(folder, store)
    # measured: 5e-8 and 1.2e-7, after weights moved by up to 0.2
    assert differs(whole.weights, split.weights) < 1e-6
    assert differs(whole.weights, expected) < 1e-6


def test_the_mean_of_micro_batch_means_would_be_another_training(
    folder: Path, store: TokenStore, whole: Fit
):
    """The control: what Lightning does by itself with mean losses."""
    assert (
        differs(whole.weights, by_hand(folder, store, mean_of_means=True)) > 3e-3
    )  # measured: 0.019


def test_adamw_with_clipping_does_not_depend_on_accumulation(folder: Path, store: TokenStore):
    runs = [
        fit(folder, store, settings={"micro_batch": size}, sgd=False, clip=0.5)
        for size in (1, 2, 4)
    ]
    for run in runs[1:]:
        # AdamW amplifies the noise of gradients near 0; measured: 6e-6 at a learning rate of 1e-2
        assert differs(runs[0].weights, run.weights) < 1e-4
        assert run.train["grad_norm"] == pytest.approx(runs[0].train["grad_norm"], rel=1e-3)
        assert run.train["train/loss"] == pytest.approx(runs[0].train["train/loss"], rel=1e-5)


# --- the gradient's norm


@pytest.mark.parametrize("limit", [0.5, 1e3, None])
def test_the_norm_is_computed_once_a_step_and_clips_as_torch_does(
    limit: float | None, folder: Path, store: TokenStore
):
    """Asked for before clipping, as `FiniteGuard` does, or not."""
    data = PackedDataModule(store, heldout=None, settings=SETTINGS)
    module: Any = make_module(folder, data, sgd=False)
    module.configure_model()
    optimizer: Any = module.configure_optimizers()["optimizer"]
    norms = set()
    for asked, batch in zip((True, False, True), PackedLoader(data.train_plan), strict=False):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        theirs = copy.deepcopy([p.grad for p in module.parameters()])
        twins = [torch.nn.Parameter(torch.empty_like(g)) for g in theirs if g is not None]
        for twin, gradient in zip(twins, theirs, strict=True):
            twin.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(twins, math.inf if limit is None else limit)
        if asked:
            assert module.gradient_norm() is module.gradient_norm()
        module.configure_gradient_clipping(optimizer, limit)
        assert torch.equal(module._grad_norm, norm)
        for parameter, twin in zip(module.parameters(), twins, strict=True):
            assert parameter.grad is not None and twin.grad is not None
            assert torch.equal(parameter.grad, twin.grad)
        norms.add(float(norm))
    assert len(norms) == 3 and 0.5 < min(norms) < max(norms) < 1e3


@pytest.mark.parametrize("clip", [0.5, None])
def test_a_guard_changes_no_bit(clip: float | None, folder: Path, store: TokenStore):
    plain, guarded = (
        fit(folder, store, sgd=False, clip=clip, callbacks=callbacks)
        for callbacks in ([], [FiniteGuard(store.document_id)])
    )
    assert differs(plain.weights, guarded.weights) == 0.0
    assert plain.train == guarded.train


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_however_late_the_host_hears(
    is_late: bool, step: int, folder: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch
):
    """A GPU may have more steps queued: all updates behind the bad one are left out."""
    if is_late:
        monkeypatch.setattr(QueuedStep, "is_known", False)  # until the end of the fit
    spoil, end = SpoilGradient(step), LastStep()
    callbacks = [spoil, FiniteGuard(store.document_id), end]
    with pytest.raises(NonFiniteError, match=rf"^step {step}: gradient norm nan is not finite"):
        fit(folder, store, sgd=False, callbacks=callbacks)
    assert spoil.changed_nothing()
    assert end.step == (5 if is_late or step == 5 else step)


class LastStep(L.Callback):
    """Optimizer steps that were queued whole."""

    step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step


# --- what is logged


def test_logged_loss_is_the_mean_over_every_target(folder: Path, store: TokenStore):
    """Nothing is learned, so the loss of all steps is that of the first weights."""
    run = fit(folder, store, settings={"micro_batch": 2}, sgd=False, phase=Phase(lr=1e-30))
    model = run.module.backbone
    model.set_attn_implementation("eager")
    batches = list(PackedLoader(run.data.train_plan))
    losses, counts = [], []
    for batch in batches:
        count = int((batch.target_ids != IGNORE).sum())
        losses.append(padded_step(model, [batch]).item() * count)
        counts.append(count)
    assert run.train["train/loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    plan = run.data.train_plan
    assert sum(counts) == sum(plan.num_global_targets(s) for s in range(plan.num_steps))


def test_a_step_that_leaves_a_micro_batch_empty_is_trained_like_the_others(
    folder: Path, store: TokenStore
):
    """The last step of a plan is rarely full: filler without a target must change nothing."""
    sizes = {"max_rows": 7, "max_steps": None}
    runs = [fit(folder, store, settings={**sizes, "micro_batch": n}) for n in (1, 4)]
    batches = list(PackedLoader(runs[0].data.train_plan))
    assert [b.document_index.tolist() == [-1] for b in batches] == [False] * 7 + [True]
    assert differs(runs[0].weights, runs[1].weights) < 1e-6


# --- awake, and everything moves


def test_every_parameter_is_trained(folder: Path, store: TokenStore):
    data = PackedDataModule(store, heldout=None, settings=SETTINGS)
    module = make_module(folder, data)
    module.configure_model()
    before = copy.deepcopy(module.backbone.state_dict())
    run = fit(folder, store, settings={"max_steps": 1}, sgd=False)
    for name, weight in run.weights.items():
        assert not torch.equal(weight, before[name]), name


def test_norms_are_not_decayed_and_everything_else_is(folder: Path, store: TokenStore):
    data = PackedDataModule(store, heldout=None, settings=SETTINGS)
    module = make_module(folder, data, sgd=False)
    module.configure_model()
    (optimizer,) = [module.configure_optimizers()["optimizer"]]
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    named = dict(module.backbone.named_parameters())
    assert len(decay) == len(named)
    for name, parameter in named.items():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)


class Watch(L.Callback):
    def __init__(self) -> None:
        self.training: list[bool] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.training.append(all(m.training for m in module.backbone.modules()))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_model_trains_awake_also_after_validation(folder: Path, store: TokenStore):
    watch = Watch()
    fit(folder, store, heldout=store, callbacks=[watch])
    assert watch.training == [True] * len(watch.training) and watch.training


def test_every_update_has_the_learning_rate_of_its_step(folder: Path, store: TokenStore):
    watch = Watch()
    fit(
        folder,
        store,
        settings={"micro_batch": 2},
        sgd=False,
        phase=Phase(lr=0.01, schedule="linear", warmup_steps=1),
        callbacks=[watch],
    )
    assert watch.rates[::2] == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])


def broken(module: LanguageModelModule, fault: str) -> LanguageModelModule:
    module.configure_model()
    if fault == "one layer asleep":
        module.backbone.model.layers[1].mlp.eval()
    else:
        module.backbone.bfloat16()
    return module


@pytest.mark.parametrize(
    ("fault", "message"),
    [("one layer asleep", "eval mode.*layers.1.mlp"), ("cast", "rotary buffers are not float32")],
)
def test_a_sleeping_or_rounded_model_never_starts(
    folder: Path, store: TokenStore, fault: str, message: str
):
    data = PackedDataModule(store, heldout=None, settings=SETTINGS)
    module = broken(make_module(folder, data), fault)
    with pytest.raises(RuntimeError, match=message):
        module.on_fit_start()


def test_a_healthy_model_starts(folder: Path, store: TokenStore):
    module = make_module(folder, PackedDataModule(store, heldout=None, settings=SETTINGS))
    with pytest.raises(RuntimeError, match="configure_model"):
        module.on_fit_start()
    module.configure_model()
    module.on_fit_start()


# --- NEFTune


def losses(module: LanguageModelModule, batch: TokenBatch, *, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return module.loss(batch).per_target


def test_neftune_is_off_in_eval_mode_and_at_alpha_zero(folder: Path, store: TokenStore):
    data = PackedDataModule(store, heldout=None, settings=SETTINGS)
    batch = next(iter(PackedLoader(data.train_plan)))
    plain, noisy = (make_module(folder, data, neftune_alpha=a) for a in (0.0, 5.0))
    for module in (plain, noisy):
        module.configure_model()
    quiet = losses(plain, batch)
    assert torch.equal(quiet, losses(plain, batch, seed=1))
    assert not torch.equal(losses(noisy, batch), losses(noisy, batch, seed=1))
    assert (losses(noisy, batch) - quiet).abs().max() > 1e-3
    assert torch.equal(losses(noisy.eval(), batch), quiet)

"""The DPO step on packed pairs, against transformers' own forward pass on padded rows."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_models import write_small_folder
from small_training import (
    assert_same_gradients,
    differs,
    fit,
    gradients,
    logps_by_row,
    make_dpo_module,
    nudge,
    pair_settings,
    random_pairs,
    spec_of,
)
from torch import Tensor

from mediphi.batches import PreferenceBatch
from mediphi.data.datamodule import PackedDataModule, References
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import TrainingPlan
from mediphi.data.sequences import Layout
from mediphi.data.tokens import TokenStore
from mediphi.modules.dpo import DpoModule, Objective
from mediphi.modules.preference_losses import PairLogps, dpo_loss

LAYOUTS: tuple[Layout, ...] = ("pairs", "shared_pairs")
BOUNDARY = 64
SIZES = [(7, 3, 2), (4, 1, 5), (20, 9, 12), (3, 6, 1), (9, 4, 4), (2, 2, 3), (50, 20, 8)]
SIZES += [(12, 30, 9), (40, 30, 26), (5, 5, 5)]
LONG = {6, 8}
"""Pairs of which an answer ends beyond the boundary; of the first one, the chosen alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LongRoPE whose factors differ by far, and large enough weights that positions matter."""
    return write_small_folder(
        tmp_path_factory.mktemp("model") / "small",
        max_position_embeddings=256,
        original_max_position_embeddings=BOUNDARY,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return random_pairs(tmp_path_factory.mktemp("pairs"), SIZES)


class Setting(NamedTuple):
    module: DpoModule
    batches: list[PreferenceBatch]


def random_references() -> np.ndarray:
    return -80 * np.random.default_rng(1).random((len(SIZES), 2), dtype=np.float32)


def setting(
    folder: Path,
    store: TokenStore,
    *,
    layout: Layout = "shared_pairs",
    references: np.ndarray | None = None,
    sizes: dict[str, Any] | None = None,
    **changes: Any,
) -> Setting:
    """A module and all micro-batches of one optimizer step over the whole store."""
    own = {"capacity": 200, "global_batch": 8, "micro_batch": 2, "long_above": BOUNDARY}
    settings = pair_settings(layout, **{**own, **(sizes or {})})
    data = PackedDataModule(store, heldout=None, settings=settings)
    module = make_dpo_module(folder, data, **changes)
    module.configure_model()
    plan = data.train_plan
    assert plan.num_steps == 1
    batches: Any = list(PackedLoader(plan, group_names=data.group_names, reference=references))
    return Setting(module, batches)


def step(module: DpoModule, batches: Iterable[PreferenceBatch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of an optimizer step; the trainer divides by the micro-batches."""
    module.zero_grad()
    total = 0.0
    for index, batch in enumerate(batches):
        loss = module.training_step(batch, index) / module.splits
        loss.backward()
        total += loss.item()
    return total, gradients(module.backbone)


def padded_logps(module: DpoModule, store: TokenStore, row: int) -> list[Tensor]:
    """Per answer token of both answers, from two right-padded rows of prompt and answer."""
    first = sum(sum(sizes) for sizes in SIZES[:row])
    ids = torch.from_numpy(store.gather(np.arange(first, first + sum(SIZES[row]))))
    prompt, *answers = ids.split(SIZES[row])
    rows = [torch.cat([prompt, answer]) for answer in answers]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    model: Any = module.backbone
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=padded, attention_mask=mask.long(), use_cache=False).logits
    model.set_attn_implementation(own)
    logps = torch.log_softmax(logits, dim=-1)[:, :-1].gather(2, padded[:, 1:, None]).squeeze(2)
    at = len(prompt) - 1
    return [logps[side, at : at + len(answer)] for side, answer in enumerate(answers)]


def by_row(module: DpoModule, batches: list[PreferenceBatch]) -> np.ndarray:
    return logps_by_row(module, batches, size=len(SIZES))


# --- log-probabilities


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logps_without_padding_are_transformers_own_on_padded_rows(
    folder: Path, store: TokenStore, layout: Layout
):
    module, batches = setting(folder, store, layout=layout)
    assert max(batch.num_pairs for batch in batches) > 1
    with torch.no_grad():
        expected = [[float(x.sum()) for x in padded_logps(module, store, row)] for row in range(10)]
    # measured: 2e-7, of sums down to -280
    np.testing.assert_allclose(by_row(module, batches), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_and_short_pairs_never_share_a_micro_batch(
    folder: Path, store: TokenStore, layout: Layout
):
    _, batches = setting(folder, store, layout=layout)
    kinds = [{row in LONG for row in batch.document_index.tolist()} for batch in batches]
    assert all(len(kind) <= 1 for kind in kinds) and {True} in kinds and {False} in kinds


def test_sharing_one_would_give_short_pairs_other_logps(folder: Path, store: TokenStore):
    """The control: a plan that knows of no boundary."""
    mixed = {"long_above": None, "micro_batch": 8, "capacity": 400}
    module, (batch,) = setting(folder, store, sizes=mixed)
    wrong = by_row(module, [batch])
    right = by_row(module, setting(folder, store).batches)
    error = np.abs(wrong - right).max(axis=1)
    assert all((error[row] < 1e-3) == (row in LONG) for row in range(len(SIZES)))


def test_shared_prompts_give_the_loss_and_gradients_of_separate_ones(
    folder: Path, store: TokenStore
):
    results = []
    for layout in LAYOUTS:
        module, batches = setting(folder, store, layout=layout, references=random_references())
        assert {b.shares_prompt for b in batches if b.num_pairs} == {layout == "shared_pairs"}
        results.append(step(module, batches))
    (apart, apart_grads), (shared, shared_grads) = results
    assert shared == pytest.approx(apart, rel=1e-5)
    assert_same_gradients(shared_grads, apart_grads)


# --- the reference


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_first_step_costs_ln_2(folder: Path, store: TokenStore, smoothing: float):
    module, batches = setting(folder, store, objective=Objective(label_smoothing=smoothing))
    references = by_row(module, batches)
    _, batches = setting(folder, store, references=references)
    loss, _ = step(module, batches)
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    means = module.train_meter.means("train")
    assert means["train/accuracy"] == 0.5 and means["train/kl"] == 0.0


def test_a_cached_reference_is_a_live_one(folder: Path, store: TokenStore):
    """At the first step, and when the policy has moved away."""
    module, batches = setting(folder, store)
    references = by_row(module, batches)
    cached, batches = setting(folder, store, references=references)
    live, without = setting(folder, store, live_reference=spec_of(folder))
    assert all(batch.reference_logps.isnan().all() for batch in without)
    for moved in (False, True):
        for one in (cached, live) if moved else ():
            nudge(one.backbone)
        (mine, grads), (theirs, wanted) = step(cached, batches), step(live, without)
        assert mine == pytest.approx(theirs, rel=1e-6)
        assert_same_gradients(grads, wanted)
    assert abs(mine - math.log(2)) > 0.02  # it has moved
    assert np.array_equal(by_row(module, batches), references)


def test_a_live_reference_moves_with_the_module(folder: Path, store: TokenStore):
    """At once: held-out pairs are scored before the hooks of training run."""
    live, _ = setting(folder, store, live_reference=spec_of(folder))
    live.to("meta")
    (reference,) = live._reference
    assert {p.device.type for m in (live, reference) for p in m.parameters()} == {"meta"}


def test_a_live_reference_is_neither_trained_nor_saved(folder: Path, store: TokenStore):
    settings = pair_settings(max_steps=3)
    run = fit(
        folder, store, settings=settings, make=make_dpo_module, live_reference=spec_of(folder)
    )
    (reference,) = run.module._reference
    untouched = setting(folder, store).module.backbone.state_dict()
    assert differs(dict(reference.state_dict()), untouched) == 0.0
    assert differs(run.weights, untouched) > 1e-3
    assert not reference.training and not any("reference" in n for n in run.module.state_dict())
    assert len(list(run.module.parameters())) == len(list(reference.parameters()))


def test_updates_beside_a_live_reference_are_those_with_its_cached_numbers(
    folder: Path, store: TokenStore
):
    module, _ = setting(folder, store)
    settings = pair_settings(capacity=100, global_batch=1)
    data = PackedDataModule(store, heldout=None, settings=settings)
    logps = by_row(module, list(PackedLoader(data.train_plan)))  # type: ignore[arg-type]
    options: dict[str, Any] = {"settings": data.settings, "make": make_dpo_module}
    references = References(train=logps, heldout=logps)
    cached = fit(folder, store, references=references, **options)
    live = fit(folder, store, live_reference=spec_of(folder), **options)
    assert data.train_plan.num_steps >= 3 and abs(cached.train["train/margin"]) > 0.01
    assert differs(cached.weights, live.weights) < 1e-6
    assert cached.train.keys() == live.train.keys()
    for name, value in cached.train.items():
        assert live.train[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_without_a_reference_its_logps_count_as_zero(folder: Path, store: TokenStore):
    objective = Objective(uses_reference=False, length_normalised=True, beta=2.0)
    module, batches = setting(folder, store, objective=objective)
    for batch in (batch for batch in batches if batch.num_pairs):
        loss, policy, reference = module.loss(batch)
        assert reference is None
        zero = policy._replace(
            chosen=torch.zeros_like(policy.chosen), rejected=torch.zeros_like(policy.rejected)
        )
        expected = dpo_loss(policy, zero, loss="sigmoid", beta=2.0, length_normalised=True)
        assert torch.equal(loss.losses, expected.losses)


# --- the objective

NUMBERS = ("loss", "beta", "label_smoothing", "length_normalised")


@pytest.mark.parametrize(
    "objective",
    [
        Objective(beta=0.7),
        Objective(label_smoothing=0.2),
        Objective(length_normalised=True),
        Objective(loss="hinge", beta=0.02),
        Objective(loss="ipo", beta=0.3, length_normalised=True),
        Objective(loss="ipo"),
        Objective(loss="robust", label_smoothing=0.1),
    ],
)
def test_every_number_of_the_objective_reaches_the_loss(
    folder: Path, store: TokenStore, objective: Objective
):
    references = random_references()
    module, batches = setting(folder, store, references=references, objective=objective)
    loss, _ = step(module, batches)
    numbers = {k: v for k, v in objective._asdict().items() if k in NUMBERS}
    total = 0.0
    for row, sizes in enumerate(SIZES):
        with torch.no_grad():
            logps = [x.sum()[None] for x in padded_logps(module, store, row)]
        counts = [torch.tensor([n]) for n in sizes[1:]]
        old = [torch.tensor([x]) for x in references[row]]
        pair = dpo_loss(PairLogps(*logps, *counts), PairLogps(*old, *counts), **numbers)
        total += pair.losses.item() / len(SIZES)
    assert loss == pytest.approx(total, rel=2e-6)  # measured: 2e-7
    module.objective = Objective()
    assert abs(step(module, batches)[0] - loss) > 1e-3 * abs(loss)


def test_the_sft_term_is_the_mean_cross_entropy_of_the_chosen_answers(
    folder: Path, store: TokenStore
):
    """Per token within an answer, then over pairs."""
    module, batches = setting(folder, store, references=random_references())
    weighted = setting(folder, store, objective=Objective(sft_weight=0.5)).module
    (plain, grads), (both, sums) = step(module, batches), step(weighted, batches)
    module.zero_grad()
    chosen = [padded_logps(module, store, row)[0] for row in range(len(SIZES))]
    expected = -torch.stack([logps.mean() for logps in chosen]).mean()
    expected.backward()
    assert both - plain == pytest.approx(0.5 * expected.item(), rel=1e-4)
    terms = {n: grads[n] + 0.5 * p.grad for n, p in module.backbone.named_parameters()}
    assert_same_gradients(sums, terms)


# --- the global batch


def test_accumulated_micro_batches_update_as_one(folder: Path, tmp_path: Path):
    """Rows hold unequal numbers of pairs, and the last step is not full."""
    sizes = [
        (int(a), int(b), int(c)) for a, b, c in np.random.default_rng(2).integers(2, 12, (31, 3))
    ]
    store = random_pairs(tmp_path, sizes)
    logps = -60 * np.random.default_rng(3).random((31, 2), dtype=np.float32)
    runs = [
        fit(
            folder,
            store,
            settings=pair_settings(micro_batch=size),
            make=make_dpo_module,
            references=References(train=logps, heldout=logps),
            objective=Objective(beta=0.02, sft_weight=0.1),
        )
        for size in (1, 2, 4)
    ]
    plan = runs[0].data.train_plan
    pairs = [plan.num_global_targets(number) for number in range(plan.num_steps)]
    assert plan.accumulate == 4 and sum(pairs) == 31 and len(set(pairs)) > 1
    for run in runs[1:]:
        # measured: 1e-7, after weights moved by up to 0.03
        assert differs(runs[0].weights, run.weights) < 1e-6
        for name, value in run.train.items():
            assert runs[0].train[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    start = setting(folder, store).module.backbone.state_dict()
    assert differs(runs[0].weights, start) > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_micro_batch_without_pairs_costs_nothing_and_has_zero_gradients(
    folder: Path, store: TokenStore, layout: Layout
):
    """A rank that has no rows left takes part in the reduction of gradients like the others."""
    sizes = {"capacity": 600, "world_size": 2, "micro_batch": 1, "global_batch": 2}
    module, _ = setting(folder, store, layout=layout, sizes={**sizes, "long_above": None})
    settings = pair_settings(layout, **sizes)
    batch = PackedLoader(TrainingPlan(store, settings), rank=1)[0]
    assert isinstance(batch, PreferenceBatch) and batch.num_pairs == 0
    module.objective = Objective(sft_weight=0.5)
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in module.backbone.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert module.train_meter.means("train") == {}
    assert module.predict_step(batch, 0).logps.shape == (0, 2)

"""Batches hold what the plan says, and training goes on exactly where it stopped."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer
from toy_store import Piece, sized_store, toy_store

from mediphi.batches import IGNORE, TokenBatch
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.groups import GroupIds
from mediphi.data.loader import NO_DOCUMENT, PackedLoader, ResumableLoader, collate
from mediphi.data.plan import Chunks, PlanSettings, TrainingPlan
from mediphi.data.sequences import NO_PARTS
from mediphi.data.tokens import TokenStore
from mediphi.errors import ArtifactError
from mediphi.records import PIECE_KINDS

# lightning 2.6 still uses what torch 2.13 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

BASE = PlanSettings(kinds=PIECE_KINDS, capacity=16, global_batch=4, micro_batch=2)
SUMMARY, DOCUMENT = PIECE_KINDS.index("summary"), PIECE_KINDS.index("document")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """60 documents of 3 to 40 distinct-looking tokens with summaries, in several shards."""
    words = ["fever", "of", "unknown", "origin", "acute", "heart", "failure", "elderly"]
    rng = np.random.default_rng(1)
    documents = [
        (
            f"{source}/{i}",
            source,
            [
                Piece("document", " ".join(rng.choice(words, size=rng.integers(2, 14)))),
                Piece("summary", " ".join(rng.choice(words, size=3))),
            ],
        )
        for source in ("b", "a")
        for i in range(30)
    ]
    return toy_store(tmp_path_factory.mktemp("cache"), documents, data="module")


def chunks_of(batch: TokenBatch) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(batch.cu_seqlens.tolist())]


def test_a_batch_worked_by_hand(tmp_path: Path):
    pieces = [Piece("summary", "~~"), Piece("document", "é")]
    store = toy_store(tmp_path, [("a/1", "a", pieces), ("b/1", "b", [Piece("document", "~")])])
    mark, tilde, c3, a9, eos = store.gather(np.array([0, 1, 5, 6, 3])).tolist()
    assert eos == store.eos_id and len({mark, tilde, c3, a9, eos}) == 5
    chunks = Chunks(*(np.array(values) for values in ([0, 8], [8, 3], [0, 1])), NO_PARTS)
    ids = GroupIds(store, {"source": ("b", "a"), "task_type": ("",), "error_type": ("",)})
    plan = TrainingPlan(store, BASE)
    batch = collate(plan, chunks, ids=ids, num_global_targets=9)
    assert batch.input_ids.tolist() == [
        [mark, tilde, tilde, eos, mark, c3, a9, eos, mark, tilde, eos]
    ]
    assert batch.target_ids.tolist() == [
        [tilde, tilde, eos, mark, c3, a9, eos, IGNORE, tilde, eos, IGNORE]
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]]
    s, d = SUMMARY, DOCUMENT
    assert batch.kind_ids[0, [0, 1, 2, 3, 4, 5, 6, 8, 9]].tolist() == [s, s, s, d, d, d, d, d, d]
    assert batch.source_ids[0, [0, 1, 2, 3, 4, 5, 6, 8, 9]].tolist() == [1] * 7 + [0] * 2
    assert batch.cu_seqlens.tolist() == [0, 8, 11]
    assert (batch.max_seqlen, batch.num_global_targets) == (8, 9)
    assert batch.document_index.tolist() == [0, 1]
    types = [batch.input_ids.dtype, batch.kind_ids.dtype, batch.cu_seqlens.dtype]
    assert types == [torch.int64, torch.uint8, torch.int32]


@settings(deadline=None, max_examples=25)
@given(capacity=st.integers(3, 60), micro_batch=st.sampled_from([1, 2, 4]), seed=st.integers(0, 5))
def test_targets_stay_inside_their_sequence(
    store: TokenStore, capacity: int, micro_batch: int, seed: int
):
    plan = TrainingPlan(store, replace(BASE, capacity=capacity, micro_batch=micro_batch, seed=seed))
    pieces, starts = store.pieces, store.piece_starts
    for index, batch in enumerate(loader := PackedLoader(plan)):
        step, part = divmod(index, plan.accumulate)
        planned = plan.chunks(plan.micro_batch(step, index=part, rank=0))
        if batch.document_index.tolist() == [NO_DOCUMENT]:
            assert not len(planned.length) and batch.target_ids.tolist() == [[IGNORE]]
            continue
        for chunk, address, document in zip(
            chunks_of(batch), planned.address, planned.document, strict=True
        ):
            ids, targets = batch.input_ids[0, chunk], batch.target_ids[0, chunk]
            length = len(ids)
            where = np.arange(address, address + length)
            assert ids.tolist() == store.gather(where).tolist()
            assert targets.tolist() == [*ids[1:].tolist(), IGNORE]
            assert batch.position_ids[0, chunk].tolist() == list(range(length))
            piece = np.searchsorted(starts, where[1:], side="right") - 1
            assert (pieces["document"][piece] == document).all()
            assert batch.kind_ids[0, chunk][:-1].tolist() == pieces["kind"][piece].tolist()
            assert batch.source_ids[0, chunk][:-1].tolist() == pieces["source"][piece].tolist()
    assert len(loader) == index + 1


def test_targets_of_all_micro_batches_add_up_to_the_denominator(store: TokenStore):
    plan = TrainingPlan(store, replace(BASE, world_size=2, micro_batch=1))
    loaders = [PackedLoader(plan, rank=rank) for rank in (0, 1)]
    assert len(loaders[0]) == len(loaders[1])
    for step in range(plan.num_steps):
        parts = range(step * plan.accumulate, (step + 1) * plan.accumulate)
        batches = [loader[i] for loader in loaders for i in parts]
        total = sum(int((batch.target_ids != IGNORE).sum()) for batch in batches)
        assert {batch.num_global_targets for batch in batches} == {total}


def test_moving_one_document_to_another_text_moves_no_other_batch_content(tmp_path: Path):
    texts = ["fever", "acute heart", "cough in the elderly", "failure"]

    def batch(changed: str | None) -> TokenBatch:
        parts = [*texts[:1], changed or texts[1], *texts[2:]]
        documents = [(f"a/{i}", "a", [Piece("document", t)]) for i, t in enumerate(parts)]
        store = toy_store(tmp_path, documents, data=str(changed))
        return PackedLoader(TrainingPlan(store, replace(BASE, capacity=200, global_batch=2)))[0]

    before, after = batch(None), batch("heart acute")
    for batch_before, batch_after in zip(chunks_of(before), chunks_of(after), strict=True):
        assert batch_before == batch_after
    assert before.document_index.tolist() == after.document_index.tolist()
    for document, chunk in zip(before.document_index.tolist(), chunks_of(before), strict=True):
        same = torch.equal(before.input_ids[0, chunk], after.input_ids[0, chunk])
        assert same == (document != 1)


def test_prefetching_changes_no_batch(store: TokenStore):
    plan = TrainingPlan(store, BASE)
    eager, ahead = list(PackedLoader(plan)), list(PackedLoader(plan, prefetch=3))
    assert [b.input_ids.tolist() for b in eager] == [b.input_ids.tolist() for b in ahead]


def test_prefetched_batches_do_not_count_as_consumed(store: TokenStore):
    loader = ResumableLoader(TrainingPlan(store, BASE), prefetch=4)
    batches = iter(loader)
    next(batches)
    next(batches)
    assert loader.state_dict()["consumed"] == 2


class Recorder(LightningModule):
    """Remembers its batches; its weight is a running hash of their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: TokenBatch) -> torch.Tensor:
        self.seen.append(batch.input_ids[0].tolist())
        return self.weight * float(batch.input_ids.sum() % 97)

    def validation_step(self, batch: TokenBatch) -> None:
        self.validated.append(batch.input_ids[0].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves once, behind the given optimizer step, from the given hook."""

    def __init__(self, path: Path, *, step: int, stop: bool = False) -> None:
        self.path = path
        self.step = step
        self.stop = stop

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop


class SaveInValidation(SaveAt):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        return

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        SaveAt.on_train_batch_end(self, trainer)


def fit(
    data: PackedDataModule, *, callback: Callback | None = None, resume: Path | None = None
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=data.train_plan.accumulate,
        val_check_interval=2 * data.train_plan.accumulate,
        num_sanity_val_steps=0,
        limit_val_batches=None if data.heldout_plan else 0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return module


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("save", [SaveAt, SaveInValidation])
def test_a_resumed_fit_goes_on_with_the_next_batch(
    store: TokenStore, tmp_path: Path, prefetch: int, save: type[SaveAt]
):
    def data() -> PackedDataModule:
        return PackedDataModule(
            store, heldout=store, settings=BASE, max_heldout_rows=4, prefetch=prefetch
        )

    whole = fit(data(), callback=save(tmp_path / "six.ckpt", step=6))
    plan = data().train_plan
    assert len(whole.seen) == plan.num_steps * plan.accumulate > 12
    resumed = fit(data(), resume=tmp_path / "six.ckpt")
    assert resumed.seen == whole.seen[6 * plan.accumulate :]
    assert torch.equal(resumed.weight, whole.weight)


def test_a_loader_without_state_would_repeat_batches(store: TokenStore, tmp_path: Path):
    """The control of the test above: Lightning alone does not skip what was trained."""

    class Forgetful(PackedDataModule):
        def train_dataloader(self) -> PackedLoader:  # type: ignore[override]
            return PackedLoader(self.train_plan)

    def data() -> PackedDataModule:
        return Forgetful(store, heldout=None, settings=BASE)

    whole = fit(data(), callback=SaveAt(tmp_path / "six.ckpt", step=6))
    with pytest.warns(UserWarning, match="not resumable"):
        resumed = fit(data(), resume=tmp_path / "six.ckpt")
    assert resumed.seen[0] == whole.seen[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "data, order or global batch"),
        ({"global_batch": 8}, "data, order or global batch"),
    ],
)
def test_a_state_of_another_plan_is_refused(store: TokenStore, change: dict[str, int], match: str):
    state = ResumableLoader(TrainingPlan(store, BASE)).state_dict()
    other = ResumableLoader(TrainingPlan(store, replace(BASE, **change)))
    with pytest.raises(ArtifactError, match=match) as refused:
        other.load_state_dict(state)
    assert "\n" not in str(refused.value)


def test_a_state_inside_an_optimizer_step_is_refused(store: TokenStore):
    loader = ResumableLoader(TrainingPlan(store, BASE))
    next(iter(loader))
    with pytest.raises(ArtifactError, match="inside an optimizer step"):
        loader.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("share", [{"world_size": 2}, {"micro_batch": 1}, {"micro_batch": 4}])
def test_another_way_to_share_out_a_step_goes_on_behind_the_same_step(
    store: TokenStore, share: dict[str, int]
):
    plan = TrainingPlan(store, replace(BASE, micro_batch=2))
    before, steps = ResumableLoader(plan), 2
    batches = iter(before)
    for _ in range(steps * plan.accumulate):
        next(batches)
    changed = replace(BASE, **{"micro_batch": 2, **share})
    ranks = [
        ResumableLoader(TrainingPlan(store, changed), rank=rank)
        for rank in range(changed.world_size)
    ]
    for rank in ranks:
        rank.load_state_dict(before.state_dict())
    expected = documents(next(batches) for _ in range(plan.accumulate))
    found = documents(batch for r in ranks for batch in islice(r, r.plan.accumulate))
    assert sorted(found) == sorted(expected)


def documents(batches: Iterable[TokenBatch]) -> list[int]:
    return [n for batch in batches for n in batch.document_index.tolist() if n != NO_DOCUMENT]


def test_a_trainer_that_accumulates_differently_is_refused(store: TokenStore):
    data = PackedDataModule(store, heldout=None, settings=BASE)
    data.trainer = Trainer(
        accelerator="cpu",
        accumulate_grad_batches=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with pytest.raises(ValueError, match="the plan has"):
        data.train_dataloader()


def test_validation_reads_the_same_few_rows_every_time(store: TokenStore):
    def rows(**change: Any) -> list[list[int]]:
        settings = replace(BASE, **change)
        data = PackedDataModule(store, heldout=store, settings=settings, max_heldout_rows=4)
        loader = data.val_dataloader()
        assert isinstance(loader, PackedLoader)
        return [i for batch in loader for i in batch.input_ids[0].tolist()]

    expected = rows()
    assert expected == rows(seed=7, epochs=3, weights={"a": 2.0}, max_steps=1)
    assert expected == rows(micro_batch=1)


def test_nothing_held_out_means_no_validation(store: TokenStore, tmp_path: Path):
    empty = toy_store(tmp_path, [], data="empty")
    for heldout in (None, empty):
        data = PackedDataModule(store, heldout=heldout, settings=BASE)
        assert data.val_dataloader() == []


def test_sources_are_named_alike_in_training_and_validation(store: TokenStore, tmp_path: Path):
    heldout = sized_store(tmp_path, [(9, 5)] * 3, source="c")
    data = PackedDataModule(store, heldout=heldout, settings=BASE)
    assert store.sources == ("b", "a")
    assert data.group_names["source"] == ("a", "b", "c")
    loader = data.val_dataloader()
    assert isinstance(loader, PackedLoader)
    batch = next(iter(loader))
    assert set(batch.source_ids[batch.target_ids != IGNORE].tolist()) == {2}


def test_documents_of_a_batch_can_be_named(store: TokenStore):
    data = PackedDataModule(store, heldout=None, settings=BASE)
    batch = next(iter(data.train_dataloader()))
    names = data.document_ids(batch)
    assert names == [store.document_id(row) for row in sorted(set(batch.document_index.tolist()))]
    assert all(name.startswith(("a/", "b/")) for name in names)

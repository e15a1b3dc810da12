"""The reference's log-probabilities: computed once, kept whole, and only for the same question."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_references import bring
from small_models import write_small_folder
from small_runs import first_backbone, set_up, write_rows
from torch._dynamo.utils import counters

from mediphi import references
from mediphi.artifacts import locked
from mediphi.backbone import build_model, load_tokenizer
from mediphi.data.datamodule import References
from mediphi.errors import ArtifactError, UserError
from mediphi.modules import causal_lm
from mediphi.phases import Training
from mediphi.references import bring_references


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small", initializer_range=0.2)


def brought(run: Training) -> References:
    plan = run.phases[0]
    bring_references(run, plan, first_backbone(run))
    assert plan.data.references is not None
    return plan.data.references


def same(left: References, right: References) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "references").glob("*.bin"))


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From here on nobody can build a model."""

    def refuse(spec: Any) -> None:
        raise AssertionError("a model was built")

    return lambda: monkeypatch.setattr(causal_lm, "build_model", refuse)


# --- once


def test_one_pass_is_computed_and_the_next_run_opens_it(
    tmp_path: Path, model: Path, without_model: Callable[[], None], capsys: Any
):
    first = brought(set_up(tmp_path, "dpo", model=model))
    assert all(side.shape == (12, 2) and side.dtype == np.float32 for side in first)
    assert all(np.isfinite(side).all() and (side < 0).all() for side in first)
    (path,) = kept(tmp_path)
    assert "24 pairs in" in capsys.readouterr().out
    without_model()
    # what a sweep turns on does not change the reference
    sweep = ["stage.beta=0.5", "stage.loss=hinge", "stage.phase.lr=1e-5", "stage.phase.epochs=3"]
    second = brought(set_up(tmp_path, "dpo", *sweep, "stage.sft_weight=0.1", model=model))
    assert same(first, second) and kept(tmp_path) == [path]
    assert capsys.readouterr().out.splitlines()[-1] == f"reference   from {path}"


def test_both_layouts_and_batches_of_any_size_give_the_same_numbers(tmp_path: Path, model: Path):
    plain = brought(set_up(tmp_path, "dpo", model=model))
    changes = ("stage.share_prompt=false", "stage.max_length=1000", "hardware.micro_batch=2")
    for number, change in enumerate(changes):
        other = brought(set_up(tmp_path / f"{number}", "dpo", change, model=model))
        for ours, theirs in zip(plain, other, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)  # measured: 3e-7


@pytest.mark.parametrize("reference", ["live", "none"])
def test_nothing_is_computed_where_nothing_is_cached(
    tmp_path: Path, model: Path, reference: str, without_model: Callable[[], None]
):
    run = set_up(tmp_path, "dpo", f"stage.reference={reference}", model=model)
    without_model()
    bring_references(run, run.phases[0], first_backbone(run))
    assert run.phases[0].data.references is None and not (tmp_path / "cache/references").exists()


def key_of(run: Training) -> str:
    return references._key(run, run.phases[0], first_backbone(run))


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "stage.share_prompt=false",
        "stage.max_length=500",
        "hardware.precision=bf16-mixed",
    ],
)
def test_other_weights_layout_or_precision_is_another_key(tmp_path: Path, model: Path, change: str):
    plain = key_of(set_up(tmp_path, "dpo", model=model))
    assert key_of(set_up(tmp_path, "dpo", change, model=model)) != plain
    assert key_of(set_up(tmp_path, "dpo", "stage.beta=0.7", model=model)) == plain


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_other_data_is_another_key(tmp_path: Path, model: Path, side: str):
    plain = key_of(set_up(tmp_path, "dpo", model=model))
    write_rows(tmp_path / f"dpo_{side}.jsonl", "dpo", count=11)
    assert key_of(set_up(tmp_path, "dpo", model=model)) != plain


def write_weights(folder: Path, model: Path, *, seed: int = 0, scale: float = 1.0) -> Path:
    """A pretrained folder; `scale` of the output head."""
    spec = references.BackboneSpec(str(model), "random", "main", "sdpa", seed=seed)
    network = build_model(spec)
    with torch.no_grad():
        network.get_output_embeddings().weight.mul_(scale)
    network.save_pretrained(folder)
    load_tokenizer(str(model)).save_pretrained(folder)
    return folder


def test_one_other_weight_in_a_file_is_another_key_and_its_place_is_none(
    tmp_path: Path, model: Path
):
    weights = write_weights(tmp_path / "weights", model)
    run = set_up(tmp_path, "dpo", f"model.path={weights}", model=model)
    plain = key_of(run)
    moved = weights.rename(tmp_path / "moved")
    moved_run = set_up(tmp_path, "dpo", f"model.path={moved}", model=model)
    assert key_of(moved_run) == plain
    file = moved / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    assert key_of(moved_run) != plain


# --- whole or refused


def test_a_flipped_byte_or_a_torn_file_is_refused_in_one_line(tmp_path: Path, model: Path):
    run = set_up(tmp_path, "dpo", model=model)
    brought(run)
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    flipped = []
    for place in rng.integers(0, len(whole), 20):
        raw = bytearray(whole)
        raw[place] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(raw))
    for content in (*flipped, whole[:-1], whole[:40], whole[:32], whole[:7], b"", whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="damaged reference") as told:
            brought(run)
        assert str(path) in str(told.value) and "\n" not in str(told.value)
    path.unlink()  # as it says
    assert np.isfinite(brought(run).train).all() and path.read_bytes() == whole


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A child that does this and ends; killed at the end if it still runs."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path):
    numbers = [np.full((20_000, 2), n, dtype=np.float32) for n in (1, 2)]
    path, rng = tmp_path / "key.bin", np.random.default_rng(1)

    def write() -> None:
        while True:
            for own in numbers:
                references._write(path, References(own, own))

    for _ in range(12):
        with forked(write):
            wait_for(path)
            time.sleep(float(rng.uniform(0, 0.05)))
        sides = references._read(path)
        assert any(same(sides, References(own, own)) for own in numbers)
        path.unlink()


def test_a_run_killed_while_it_computes_leaves_nothing_that_the_next_would_take(
    tmp_path: Path, model: Path
):
    run = set_up(tmp_path, "dpo", model=model)
    folder = tmp_path / "cache" / "references"
    making = folder / f"{key_of(run)}.making"

    def hang_while_computing() -> None:
        references._compute = lambda *a: time.sleep(60)
        brought(run)

    with forked(hang_while_computing):
        wait_for(making / ".lock")
        with pytest.raises(ArtifactError, match="in use by process"), locked(making):
            pass
    assert not kept(tmp_path)
    assert np.isfinite(brought(run).train).all()  # the dead one's lock is free


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_process_waits_for_the_first_and_reads_its_numbers(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_model: Callable[[], None],
    capsys: Any,
):
    monkeypatch.setattr(references, "WAIT_SECONDS", 0.05)
    run = set_up(tmp_path, "dpo", model=model)
    making = tmp_path / "cache" / "references" / f"{key_of(run)}.making"
    theirs = References(*(np.full((12, 2), n, dtype=np.float32) for n in (1, 2)))

    def compute_slowly() -> None:
        making.mkdir(parents=True)
        with locked(making):
            time.sleep(0.5)
            references._write(making.with_suffix(".bin"), theirs)

    without_model()
    with forked(compute_slowly):
        wait_for(making / ".lock")
        assert same(brought(run), theirs)
    out = capsys.readouterr().out
    assert f"reference   waiting, {making}: in use by process" in out
    assert f"reference   from {making.with_suffix('.bin')}" in out
    assert out.count("waiting") == 1 and not making.exists()


# --- what cannot be trained on


def test_a_logp_that_is_no_number_is_refused_and_its_pair_named(tmp_path: Path, model: Path):
    weights = write_weights(tmp_path / "weights", model, scale=1e38)
    run = set_up(tmp_path, "dpo", f"model.path={weights}", model=model)
    first = run.data.train.document_id(0)
    with pytest.raises(UserError, match=f"of 12 pairs are not finite, the first is {first}: look"):
        brought(run)
    assert not kept(tmp_path) and run.phases[0].data.references is None


def test_the_exam_of_a_model_without_numbers_is_refused_too(tmp_path: Path, model: Path):
    """Leaving its pairs out would leave a score of the others."""
    run = set_up(tmp_path, "dpo", "stage.reference=none", model=model)
    weights = write_weights(tmp_path / "weights", model, scale=1e38)
    policy = replace(first_backbone(run), folder=str(weights), init="pretrained")
    with pytest.raises(UserError, match="of 12 pairs are not finite"):
        exam_scores(run, policy)


def test_pairs_that_do_not_fit_have_no_number_and_are_not_missed(tmp_path: Path, model: Path):
    run = set_up(tmp_path, "dpo", "stage.max_length=200", model=model)
    plan = run.phases[0].data
    assert 0 < len(plan.train_plan.too_long) < 12
    train = brought(run).train
    assert np.flatnonzero(np.isnan(train).any(axis=1)).tolist() == sorted(plan.train_plan.too_long)


def test_an_epoch_that_visits_a_share_still_finds_every_pair(tmp_path: Path, model: Path):
    run = set_up(tmp_path, "dpo", "corpus.sources.mediflow_dpo.weight=0.5", model=model)
    assert np.isfinite(brought(run).train).all()


# --- the held-out exam


def exam_scores(run: Training, policy: Any) -> dict[str, float]:
    exam = references.preference_exam(run, run.phases[0], first_backbone(run))
    return {one.id: one.score for one in exam.sit(policy)}


def by_margin(run: Training, ratios: np.ndarray) -> dict[str, float]:
    store = run.data.heldout
    return {store.document_id(row): float(a > b) for row, (a, b) in enumerate(ratios.tolist())}


def test_the_exam_compares_with_the_reference_cached_live_or_none(tmp_path: Path, model: Path):
    """Before training every pair is a tie; another model is judged by its log-ratios."""
    run = set_up(tmp_path, "dpo", model=model)
    start = first_backbone(run)
    old = brought(run).heldout
    assert set(exam_scores(run, start).values()) == {0.5}
    policy = replace(start, seed=1)
    new = brought(set_up(tmp_path, "dpo", "seed=1", model=model)).heldout
    expected = by_margin(run, new - old)
    assert exam_scores(run, policy) == expected and len(set(expected.values())) == 2
    live = set_up(tmp_path, "dpo", "stage.reference=live", model=model)
    assert exam_scores(live, policy) == expected
    none = set_up(tmp_path, "dpo", "stage.reference=none", model=model)
    assert exam_scores(none, policy) == by_margin(run, new) != expected


def test_a_run_that_compiles_asks_the_reference_plainly_and_every_pair_is_a_tie(
    tmp_path: Path, model: Path
):
    """The last digits of compiled layers would tell wins from losses where nothing has changed."""
    run = set_up(tmp_path, "dpo", "hardware.compile=true", model=model)
    start = first_backbone(run)
    assert start.compiled_tokens == 600
    assert key_of(run) == key_of(set_up(tmp_path, "dpo", model=model))
    counters.clear()
    brought(run)
    assert set(exam_scores(run, start).values()) == {0.5}
    assert not counters["stats"]


def test_a_pass_builds_one_model_for_both_sides(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Counted around the real thing; a new run that finds the numbers builds none."""
    built = []

    def counting(spec: Any) -> Any:
        built.append(spec)
        return build_model(spec)

    monkeypatch.setattr(causal_lm, "build_model", counting)
    run = set_up(tmp_path, "dpo", model=model)
    brought(run)
    assert len(built) == 1
    brought(run)
    assert len(built) == 1


# --- several ranks


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path, model: Path):
    alone = brought(set_up(tmp_path / "alone", "dpo", model=model))
    two = tmp_path / "two"
    set_up(two, "dpo", model=model)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mediphi.training"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"folder": two, "model": model, "out": tmp_path}
    ranks = [context.Process(target=bring, args=(r, port), kwargs=options) for r in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for side, own in alone._asdict().items():
        assert torch.equal(first[side], second[side])
        np.testing.assert_allclose(first[side].numpy(), own, rtol=1e-5, atol=0)
    assert len(kept(two)) == 1

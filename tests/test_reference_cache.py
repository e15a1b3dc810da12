"""The reference's numbers: their key for a hub model, and what is left beside the file."""

import multiprocessing
import shutil
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from small_models import write_small_folder
from small_runs import first_backbone, set_up

from mediphi import references
from mediphi.artifacts import locked
from mediphi.backbone import BackboneSpec, build_model
from mediphi.errors import UserError
from mediphi.phases import Training

HUB_ID = "somebody/small"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("dpo")
    return set_up(folder, "dpo", model=write_small_folder(folder / "small"))


@pytest.fixture
def hub(tmp_path: Path, run: Training, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache without a network: two commits of a model with other weights, main none."""
    repo = tmp_path / "hub" / "models--somebody--small"
    for seed, commit in enumerate(COMMITS):
        snapshot = repo / "snapshots" / commit
        shutil.copytree(run.config.model.folder, snapshot)
        build_model(replace(first_backbone(run), seed=seed)).save_pretrained(snapshot)
    (repo / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo


def from_hub(run: Training, revision: str = "main") -> BackboneSpec:
    return replace(first_backbone(run), folder=HUB_ID, init="pretrained", revision=revision)


def key_of(run: Training, spec: BackboneSpec) -> str:
    return references._key(run, run.phases[0], spec)


def head(spec: BackboneSpec) -> torch.Tensor:
    return build_model(spec).state_dict()["lm_head.weight"]


# --- the key


def test_a_branch_that_moved_is_another_key_and_other_weights(run: Training, hub: Path):
    keys, heads = [], []
    for commit in COMMITS:
        (hub / "refs" / "main").write_text(commit)
        keys.append(key_of(run, from_hub(run)))
        heads.append(head(from_hub(run)))
        assert key_of(run, from_hub(run, commit)) == keys[-1]  # by the commit's own name, too
        assert torch.equal(head(from_hub(run, commit)), heads[-1])
    assert keys[0] != keys[1] and not torch.equal(*heads)
    (hub / "refs" / "main").write_text(COMMITS[0])
    assert key_of(run, from_hub(run)) == keys[0]


@pytest.mark.parametrize("absent", ["refs", "snapshots", "."])
def test_a_commit_that_is_not_known_is_refused_and_a_pinned_one_is_not(
    run: Training, hub: Path, absent: str
):
    (hub / "refs" / "main").write_text(COMMITS[0])
    shutil.rmtree((hub / absent).resolve())
    with pytest.raises(UserError, match=f"model.path={HUB_ID}: .*revision main; set") as told:
        key_of(run, from_hub(run))
    assert "\n" not in str(told.value)
    assert key_of(run, from_hub(run, COMMITS[0])) != key_of(run, from_hub(run, COMMITS[1]))


def test_another_version_of_transformers_is_another_key(
    run: Training, monkeypatch: pytest.MonkeyPatch
):
    plain = key_of(run, first_backbone(run))
    assert key_of(run, first_backbone(run)) == plain
    monkeypatch.setattr(references.transformers, "__version__", "4.0.0")
    assert key_of(run, first_backbone(run)) != plain


# --- what is left beside the file


def test_nothing_is_left_after_a_pass_nor_after_a_failed_one(tmp_path: Path):
    path = tmp_path / "key.bin"
    with pytest.raises(ZeroDivisionError), references._only_one(path):
        assert (tmp_path / "key.making" / ".lock").is_file()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # the second finds it done
        with references._only_one(path):
            path.touch()
        assert list(tmp_path.iterdir()) == [path]


def test_a_waiting_process_says_so_once_and_leaves_the_holders_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path, naps = tmp_path / "key.bin", []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            path.touch()

    monkeypatch.setattr(time, "sleep", nap)
    making = tmp_path / "key.making"
    making.mkdir()
    with locked(making):
        with references._only_one(path):
            pass
        assert len(naps) == 3 and (making / ".lock").is_file()
    assert capsys.readouterr().out.count("reference   waiting, ") == 1


def take_turns(path: Path, start: Barrier, *, turns: int) -> None:
    """Each holder checks that it is alone; every turn removes the folder that others reach for."""
    references.WAIT_SECONDS = 0.0
    alone = path.with_suffix(".alone")
    start.wait()
    for _ in range(turns):
        with references._only_one(path):
            alone.touch(exist_ok=False)
            alone.unlink()


def test_processes_that_take_turns_are_alone_and_leave_nothing(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    start = context.Barrier(4)
    arguments = (tmp_path / "key.bin", start)
    processes = [
        context.Process(target=take_turns, args=arguments, kwargs={"turns": 300}) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert not list(tmp_path.iterdir())

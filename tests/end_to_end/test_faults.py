"""Broken files, full disks and bad numbers: one line, and the previous good state survives."""

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from end_to_end.tiny_run import (
    PIT,
    STEPS,
    Ended,
    Place,
    checkpoints,
    curve,
    files_in,
    one_line,
    wait_for,
    weights,
)

from mediphi.artifacts import verify
from mediphi.checkpointing.safe_io import damage

Finished = tuple[Path, Ended]


@pytest.fixture(scope="module")
def stopped(shared: Place, finished: Finished) -> Path:
    """A run directory that SIGTERM left in phase 2, with two checkpoints there."""
    place = Place(shared.folder / "stopped", shared.cache, shared.assets)
    run_dir = place.runs / "pit" / finished[0].name
    child = place.start(*PIT)
    assert wait_for(lambda: len(list(run_dir.glob("checkpoints/phase2/step-*"))) > 1, child)
    child.send(signal.SIGTERM)
    assert child.wait().code == 143
    return run_dir


@pytest.fixture
def halfway(place: Place, stopped: Path) -> Path:
    """A copy of it in this test's place."""
    return Path(shutil.copytree(stopped, place.runs / "pit" / stopped.name))


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


# --- bits ---------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_checkpoint_is_named_and_the_advice_works(
    place: Place, halfway: Path, finished: Finished
) -> None:
    older, newest = checkpoints(halfway)[-2:]
    flip(newest / "state.pt")
    before = files_in(halfway / "checkpoints")
    ended = place.run(*PIT)
    assert ended.code == 2
    said = one_line(ended)
    assert str(newest) in said and "state.pt: sha256 differs" in said
    assert f"the last good one is {older.name}: delete {newest.name}" in said
    assert files_in(halfway / "checkpoints") == before
    shutil.rmtree(newest)
    assert place.run(*PIT).code == 0
    assert weights(halfway) == weights(finished[0])
    assert curve(halfway) == curve(finished[0])


def test_a_flipped_bit_in_an_artifact_is_named_and_the_advice_works(
    place: Place, finished: Finished
) -> None:
    run_dir = Path(shutil.copytree(finished[0], place.runs / "pit" / finished[0].name))
    flip(run_dir / "model" / "model.safetensors")
    before = files_in(run_dir)
    ended = place.run(*PIT)
    assert ended.code == 2
    said = one_line(ended)
    assert f"{run_dir}/model/model.safetensors: damaged" in said
    assert "on_existing=overwrite" in said
    assert files_in(run_dir) == before
    assert place.run(*PIT, "on_existing=overwrite").code == 0
    verify(run_dir)
    assert weights(run_dir) == weights(finished[0])


@pytest.mark.parametrize("victim", ["model.safetensors", "manifest.json"])
def test_a_last_model_without_its_weights_or_manifest_is_not_published(
    victim: str, place: Place, finished: Finished
) -> None:
    """A folder of the right name is no proof that the phase is done."""
    run_dir = Path(shutil.copytree(finished[0], place.runs / "pit" / finished[0].name))
    (run_dir / "manifest.json").unlink()
    (run_dir / "model" / victim).unlink()
    ended = place.run(*PIT)
    assert ended.code == 2
    said = one_line(ended)
    assert victim in said and f"delete {run_dir / 'model'} and run again" in said
    assert not (run_dir / "manifest.json").exists()
    shutil.rmtree(run_dir / "model")
    assert place.run(*PIT).code == 0
    assert weights(run_dir) == weights(finished[0])


def test_a_truncated_shard_is_named_and_the_advice_works(
    place: Place, alone: Place, finished: Finished
) -> None:
    shutil.copytree(place.cache, alone.cache)
    shard = max(alone.cache.glob("tokens/*/tokens-00000.bin"), key=lambda p: p.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 2)
    ended = alone.run(*PIT)
    assert ended.code == 2
    said = one_line(ended)
    assert str(shard) in said and f"delete the folder {shard.parent}" in said
    assert not alone.runs.exists()
    shutil.rmtree(shard.parent)
    assert alone.run(*PIT).code == 0
    assert weights(alone.run_dir()) == weights(finished[0])


# --- between phases -----------------------------------------------------------------------------


def phase1_files(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints" / "phase1").iterdir())


def test_a_finished_run_keeps_the_model_of_its_first_phase_and_no_state(finished: Finished) -> None:
    run_dir, _ = finished
    assert phase1_files(run_dir) == ["model"]
    verify(run_dir / "checkpoints" / "phase1" / "model")
    assert [p.name for p in checkpoints(run_dir)] == [f"step-{n:08d}" for n in (STEPS - 3, STEPS)]


def _die_before_deleting() -> None:
    """Killed as soon as the first phase's model has its name."""
    import mediphi.training

    mediphi.training.remove_checkpoints = lambda folder: os.kill(os.getpid(), signal.SIGKILL)


def _die_after_deleting() -> None:
    import mediphi.training
    from mediphi.checkpointing import remove_checkpoints

    def delete_and_die(folder: Path) -> None:
        remove_checkpoints(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    mediphi.training.remove_checkpoints = delete_and_die


@pytest.mark.parametrize("die", [_die_before_deleting, _die_after_deleting])
def test_a_run_killed_between_its_phases_goes_on_from_the_model(
    die: Callable[[], None], place: Place, finished: Finished
) -> None:
    assert place.run(*PIT, limit=die).code == -signal.SIGKILL
    run_dir = place.run_dir()
    kept = verify(run_dir / "checkpoints" / "phase1" / "model")
    assert len(phase1_files(run_dir)) == (1 if die is _die_after_deleting else 4)
    assert place.run(*PIT).code == 0
    assert verify(run_dir / "checkpoints" / "phase1" / "model") == kept
    assert weights(run_dir) == weights(finished[0])
    assert curve(run_dir) == curve(finished[0])
    assert phase1_files(run_dir) == ["model"]


# --- numbers ------------------------------------------------------------------------------------


def test_a_loss_that_explodes_stops_before_the_update(place: Place) -> None:
    command = [*PIT, "stage.phase1.lr=1e30", "hardware.checkpoints.every_steps=1"]
    ended = place.run(*command)
    assert ended.code == 1
    said = one_line(ended)
    found = re.search(r"step (\d+): (loss|gradient norm \S+) is not finite", said)
    assert found and "parameters unchanged; documents: icd10cm/" in said
    run_dir = place.run_dir()
    newest = checkpoints(run_dir)[-1]
    assert newest.name == f"step-{int(found[1]) - 1:08d}"
    assert damage(newest) is None
    assert not (run_dir / "manifest.json").exists()
    assert not (run_dir / "model").exists()
    again = place.run(*command)
    assert (again.code, one_line(again)) == (1, said)


# --- disk ---------------------------------------------------------------------------------------


def _one_megabyte() -> None:
    """No file may grow beyond; a checkpoint is larger, everything before it is not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def _sixteen_kilobytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))


def test_a_checkpoint_that_finds_no_room_leaves_the_earlier_ones(
    place: Place, halfway: Path, finished: Finished
) -> None:
    before = {p: files_in(p) for p in checkpoints(halfway)}
    ended = place.run(*PIT, limit=_one_megabyte)
    assert ended.code == 1
    said = one_line(ended)
    assert str(halfway / "checkpoints" / "phase2" / "step-") in said
    assert "no space" in said and "needs about" in said and "are free" in said
    assert {p: files_in(p) for p in checkpoints(halfway)} == before
    assert not list(halfway.rglob(".*.partial"))
    assert place.run(*PIT).code == 0
    assert weights(halfway) == weights(finished[0])
    assert curve(halfway) == curve(finished[0])


def test_a_token_store_that_finds_no_room_leaves_no_litter(alone: Place) -> None:
    ended = alone.run(*PIT, limit=_sixteen_kilobytes)
    assert ended.code == 1
    said = one_line(ended)
    assert str(alone.cache) in said and "free" in said
    assert not list(alone.cache.rglob("tokens/*"))
    assert alone.run(*PIT).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system; its size is changed by `resize`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_run_that_will_not_fit_is_refused_before_it_starts(
    small_disk: Path, shared: Place
) -> None:
    resize(small_disk, "4m")
    place = Place(small_disk, shared.cache, shared.assets)
    ended = place.run(*PIT)
    assert ended.code == 1
    said = one_line(ended)
    assert str(place.runs) in said and "needed" in said and "free" in said
    assert not list(place.runs.rglob("step-*"))


def _no_preflight() -> None:
    """The disk fills up after it was looked at."""
    import mediphi.training

    mediphi.training.preflight_space = lambda path, needed_bytes: None


@pytest.mark.parametrize("phase", ["phase1", pytest.param("phase2", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_while_the_model_is_exported_is_one_line(
    phase: str, small_disk: Path, shared: Place, finished: Finished
) -> None:
    """Everything is there but the room for the model; later the run only has to export it."""
    place = Place(small_disk, shared.cache, shared.assets)
    run_dir = place.runs / "pit" / finished[0].name
    child = place.start(*PIT)
    last = run_dir / "checkpoints" / phase / f"step-{STEPS:08d}"
    assert wait_for(last.exists, child)
    child.kill()
    target = run_dir / ("checkpoints/phase1/model" if phase == "phase1" else "model")
    for made in (target, target.with_name(".model.partial"), run_dir / "checkpoints" / "phase2"):
        if phase == "phase1" or made.parent == run_dir:
            shutil.rmtree(made, ignore_errors=True)
    used = sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file())
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (64 * 2**20 - used - 600_000))
    before = {p: files_in(p) for p in checkpoints(run_dir)}
    ended = place.run(*PIT, limit=_no_preflight)
    assert ended.code == 1
    said = one_line(ended)
    assert f"{target}: disk full: 1 MB needed" in said and "free; make room" in said
    assert not list(run_dir.rglob(".*.partial"))
    assert {p: files_in(p) for p in checkpoints(run_dir)} == before
    filler.unlink()
    assert place.run(*PIT).code == 0
    assert weights(run_dir) == weights(finished[0])
    assert curve(run_dir) == curve(finished[0])


def test_what_is_there_already_counts_as_room(
    small_disk: Path, shared: Place, stopped: Path, finished: Finished
) -> None:
    """A disk that is nearly full of this very run does not keep it from its last steps."""
    place = Place(small_disk, shared.cache, shared.assets)
    run_dir = Path(shutil.copytree(stopped, place.runs / "pit" / stopped.name))
    used = sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file())
    resize(small_disk, str(used + 7 * 2**20))  # half of what a fresh run asks for
    fresh = place.run(*PIT, "seed=1")
    assert fresh.code == 1 and "disk full" in one_line(fresh)
    ended = place.run(*PIT)
    assert ended.code == 0, ended
    assert weights(run_dir) == weights(finished[0])

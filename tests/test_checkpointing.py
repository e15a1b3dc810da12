"""A checkpoint is whole or refused: kills during saves, bit flips, full disks."""

import errno
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins import TorchCheckpointIO
from toy_training import exit_code, save, save_for_ever, save_two, start, wait_for_newer

from mediphi.checkpointing import (
    SafeCheckpointIO,
    last_checkpoint,
    remove_checkpoints,
    safe_io,
    step_folder,
    step_of,
    verified,
)
from mediphi.checkpointing.safe_io import checkpoints_in, file_sha256, retain
from mediphi.errors import ArtifactError, MachineError
from mediphi.tracking.progress import silence_lightning


def flip(path: Path, place: int) -> None:
    data, before = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[place // 8] ^= 1 << (place % 8)
    path.write_bytes(data)
    if path.stat().st_mtime_ns == before:  # the clock of files ticks every few milliseconds
        os.utime(path, ns=(before, before + 1))


@pytest.fixture(scope="module")
def warm() -> None:
    """Start the server from which the children fork, so that a kill hits their work."""
    assert exit_code(start(silence_lightning)) == 0


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_during_saves_leaves_a_valid_last_checkpoint(
    kills: int, tmp_path: Path, warm: None
) -> None:
    folder, rng = tmp_path / "checkpoints", random.Random(0)
    other_disk = "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path)
    save(folder, 1, floats=200_000)
    newest = 1
    for _ in range(kills):
        process = start(save_for_ever, str(folder), newest + 1, other_disk)
        wait_for_newer(folder, newest, process)
        assert exit_code(process, rng.random() * 0.03) == -signal.SIGKILL
        found = last_checkpoint(folder)
        assert found is not None and step_of(found) >= newest
        newest = step_of(found)
        assert SafeCheckpointIO().load_checkpoint(found)["weights"].eq(newest).all()
    assert newest > kills
    save(folder, newest + 1)
    retain(folder, 2)
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 3 and names[0] == "last", names  # no litter


# --- places -------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty `$TMPDIR` on another file system, so that nothing can be renamed out of it."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shm) as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)  # looked up anew
        assert tempfile.gettempdir() == name
        yield Path(name)


def untouched(folder: Path) -> int:
    """Set a folder's time of change to 0; any file made, renamed or deleted in it sets it anew."""
    os.utime(folder, (0, 0))
    return folder.stat().st_mtime_ns


def test_a_checkpoint_is_written_beside_its_place_and_nowhere_else(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own writer is the negative control: it stages in `$TMPDIR`.

    No rename crosses file systems, so what arrives from there is copied, and a kill while it is
    copied leaves half a file under the final name.
    """
    folder, here = tmp_path / "checkpoints", tmp_path / "here"
    for made in (folder, here):
        made.mkdir()
    monkeypatch.chdir(here)
    others = (elsewhere, here, tmp_path)
    assert [untouched(other) for other in others] == [0, 0, 0]
    save(folder, 1)
    save(folder, 1)  # in the place of another
    assert [other.stat().st_mtime_ns for other in others] == [0, 0, 0]
    assert sorted(p.name for p in folder.iterdir()) == ["last", "step-00000001"]
    TorchCheckpointIO().save_checkpoint({"global_step": 1}, str(folder / "theirs.ckpt"))
    assert (folder / "theirs.ckpt").exists()
    assert elsewhere.stat().st_mtime_ns > 0
    (elsewhere / "file").touch()
    with pytest.raises(OSError, match="cross-device"):
        (elsewhere / "file").rename(folder / "file")


# --- bits and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_every_flipped_bit_is_refused_with_the_way_on(name: str, tmp_path: Path) -> None:
    save(tmp_path, 100)
    newest = save(tmp_path, 120)
    rng = random.Random(0)
    size = (newest / name).stat().st_size * 8
    for place in [rng.randrange(size) for _ in range(100)]:
        flip(newest / name, place)
        with pytest.raises(ArtifactError) as caught:
            last_checkpoint(tmp_path)
        assert name in str(caught.value)
        assert "the last good one is step-00000100: delete step-00000120" in str(caught.value)
        assert "\n" not in str(caught.value)
        flip(newest / name, place)
    assert last_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("keep_bytes", [0, 1, 1000])
def test_truncated_state_is_refused(keep_bytes: int, tmp_path: Path) -> None:
    only = save(tmp_path, 7)
    os.truncate(only / "state.pt", keep_bytes)
    with pytest.raises(ArtifactError, match=r"has \d+ bytes.*no other good one: delete step-0000"):
        SafeCheckpointIO().load_checkpoint(only)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    only = save(tmp_path, 7)
    (only / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        last_checkpoint(tmp_path)


def test_checkpoint_under_another_step_s_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 7).rename(step_folder(tmp_path, 9))
    with pytest.raises(ArtifactError, match=r"manifest.json is of step 7"):
        last_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 1)
    SafeCheckpointIO().save_checkpoint({"global_step": 1, "x": Path("a")}, folder)
    with pytest.raises(Exception, match="Weights only load failed"):
        SafeCheckpointIO().load_checkpoint(folder, weights_only=False)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None


# --- disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_full_disk_is_one_line_and_the_previous_checkpoint_stays(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = save(tmp_path, 1)
    _fill_disk_after(room, monkeypatch)
    with pytest.raises(MachineError) as caught:
        save(tmp_path, 2)
    message = str(caught.value)
    assert "no space" in message and "step-00000002" in message and "\n" not in message
    assert "MB are free" in message and caught.value.exit_code == 1
    monkeypatch.undo()
    assert last_checkpoint(tmp_path) == previous
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001"]


def _fill_disk_after(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mediphi.checkpointing import safe_io

    left = room

    def write_all(file: Any, view: memoryview) -> None:
        nonlocal left
        left -= len(view)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.raw.write(view)

    monkeypatch.setattr(safe_io._HashedFile, "_write_all", write_all)


def test_retention_keeps_the_newest_valid_ones(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    flip(made[2] / "state.pt", 800)
    retain(tmp_path, 2)
    assert checkpoints_in(tmp_path) == made[1:]


def test_retention_never_deletes_the_only_valid_one(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in (1, 2, 3)]
    for damaged in made[1:]:
        flip(damaged / "state.pt", 800)
    retain(tmp_path, 1)
    assert made[0] in checkpoints_in(tmp_path)


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of the files that are hashed from now on."""
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.parent.name)
        return file_sha256(path)

    monkeypatch.setattr(safe_io, "file_sha256", count)
    return hashed


def test_retention_hashes_nothing_that_this_process_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = count_hashes(monkeypatch)
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
        retain(tmp_path, 2)
    save(tmp_path, 4)  # in the place of another
    retain(tmp_path, 2)
    assert not hashed
    assert [step_of(found) for found in checkpoints_in(tmp_path)] == [3, 4]


def test_retention_hashes_once_what_another_process_has_written(
    tmp_path: Path, warm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(start(save_two, str(tmp_path))) == 0
    hashed = count_hashes(monkeypatch)
    for _ in range(3):
        retain(tmp_path, 2)
    assert sorted(hashed) == ["step-00000001", "step-00000002"]


def test_retention_hashes_again_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its time of change was set back."""
    made = [save(tmp_path, step) for step in (1, 2)]
    state = made[1] / "state.pt"
    before = state.stat()
    time.sleep(0.02)  # the clock of files ticks every few milliseconds
    flip(state, 800)
    os.utime(state, ns=(before.st_atime_ns, before.st_mtime_ns))
    hashed = count_hashes(monkeypatch)
    retain(tmp_path, 1)
    assert hashed == ["step-00000002"] and checkpoints_in(tmp_path) == made


def test_resume_hashes_whatever_this_process_believes(tmp_path: Path) -> None:
    newest = save(tmp_path, 2)
    flip(newest / "state.pt", 800)
    verified.remember(newest, verified.stamps(newest))
    assert verified.is_unchanged(newest)
    for resume in (lambda: last_checkpoint(tmp_path), lambda: load(newest)):
        with pytest.raises(ArtifactError, match=r"state.pt: sha256 differs"):
            resume()


def load(checkpoint: Path) -> dict[str, Any]:
    return SafeCheckpointIO().load_checkpoint(checkpoint)


def test_states_of_a_phase_that_is_done_go_and_its_model_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    flip(tmp_path / "step-00000002" / "state.pt", 800)  # a damaged one is no use either
    (tmp_path / "model").mkdir()
    for _ in range(2):  # a kill half-way asks for it once more
        remove_checkpoints(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    remove_checkpoints(tmp_path / "absent")


def test_pointer_names_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert (tmp_path / "last").read_text() == "step-00000002\n"
    assert json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())["step"] == 2

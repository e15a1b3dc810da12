"""A merge that is killed leaves no model and goes on; what it left is believed only if whole."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_merges
import pytest
from small_checkpoints import change_tensors, copied, write_model

from mediphi.errors import ArtifactError, MachineError

PROGRAM = Path(killed_merges.__file__)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    return write_model(place / "base", seed=1), write_model(place / "expert", seed=2)


@pytest.fixture(scope="module")
def whole(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("undisturbed")
    killed_merges.merged(*models, place)
    return killed_merges.content(place / "model")


def child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    text = textwrap.dedent(program)
    command = [sys.executable, "-c", text, *map(str, arguments)]
    environment = {"PYTHONPATH": f"{PROGRAM.parent}:{PROGRAM.parents[1] / 'src'}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_kill_9_at_every_step_and_within_every_tensor(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Bitwise the undisturbed result, and nothing sealed is made again: asserted in the program."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *models, tmp_path],
        stdout=subprocess.PIPE,
        timeout=280,
        check=True,
    )
    report = json.loads(done.stdout)
    states = report["states"]
    assert states["within: no model"] == report["num_tensors"] == 9
    assert states["step: no model"] > 3 * report["num_tensors"]
    assert states["not killed"] == 1
    # Once its config is there the folder is whole, and one renaming away from its name.
    assert states["step: scratch/folder"] == 2


@pytest.fixture(scope="module")
def killed(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where a merge was killed within its last tensor."""
    place = tmp_path_factory.mktemp("killed")
    done = child(
        """
        import sys
        from pathlib import Path
        import killed_merges
        killed_merges.kill_within(8)
        killed_merges.merged(*map(Path, sys.argv[1:]))
        """,
        *models,
        place,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(killed_merges.journal(place)) == 8
    return place


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    return copied(killed, tmp_path / "stopped")


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def shard(place: Path) -> Path:
    """The first, which begins with the largest tensor."""
    return place / "scratch" / "shard-0.partial"


def change_journal(change: Callable[[list[bytes]], Any]) -> Callable[[Path], object]:
    def changed(place: Path) -> None:
        path = place / "scratch" / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines)
        path.write_bytes(b"".join(lines))

    return changed


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "none": (lambda place: None, 8),
    "a flipped bit in a tensor": (lambda place: flip(shard(place), -5), 7),
    "a flipped bit in a header": (lambda place: flip(shard(place), 9), 8),
    "a lost shard": (lambda place: shard(place).unlink(), 7),
    "a cut shard": (lambda place: shard(place).write_bytes(shard(place).read_bytes()[:-9]), 7),
    "a torn last line": (change_journal(lambda j: j.__setitem__(-1, j[-1][:-4])), 7),
    "a last line without its end": (change_journal(lambda j: j.__setitem__(-1, j[-1][:-1])), 7),
    "a damaged line": (change_journal(lambda j: j.__setitem__(3, b"\xff{\n")), 7),
    "a line of something else": (change_journal(lambda j: j.__setitem__(3, b"[1]\n")), 7),
    "a wrong checksum": (change_journal(lambda j: j.__setitem__(1, j[1].replace(b"2", b"3"))), 7),
    "a torn first line": (change_journal(lambda j: j.__setitem__(0, j[0][:-9])), 0),
    "an empty journal": (change_journal(lambda j: j.clear()), 0),
    "no journal": (lambda place: (place / "scratch" / "journal.jsonl").unlink(), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again(
    damage: str, models: tuple[Path, Path], stopped: Path, whole: dict[str, bytes]
) -> None:
    change, num_resumed = DAMAGE[damage]
    change(stopped)
    facts = killed_merges.merged(*models, stopped)
    assert facts.num_resumed == num_resumed
    assert killed_merges.content(stopped / "model") == whole


def test_another_job_begins_anew(models: tuple[Path, Path], stopped: Path, tmp_path: Path) -> None:
    other = copied(models[1], tmp_path / "other")
    change_tensors(other, lambda tensors: tensors["model.norm.weight"].add_(1))
    facts = killed_merges.merged(models[0], other, stopped)
    assert facts.num_resumed == 0


def test_a_model_whose_file_was_replaced_meanwhile_begins_anew(
    models: tuple[Path, Path], stopped: Path, tmp_path: Path
) -> None:
    """Of large files a sample is hashed: what it misses, the file's time tells."""
    other = copied(models[1], tmp_path / "other")
    assert killed_merges.merged(models[0], other, copied(stopped, tmp_path / "one")).num_resumed
    weights = other / "model.safetensors"
    state = weights.stat()
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert killed_merges.merged(models[0], other, stopped).num_resumed == 0


def test_a_published_merge_is_found_and_another_folder_left_alone(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    first = killed_merges.merged(*models, tmp_path)
    again = killed_merges.merged(*models, tmp_path)
    assert (first.num_resumed, again) == (0, first._replace(num_resumed=9))
    before = killed_merges.content(tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"model: exists; choose another name, or remove it$"):
        killed_merges.merged(models[1], models[0], tmp_path)
    assert killed_merges.content(tmp_path / "model") == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_in_one_line_and_the_merge_goes_on(
    name: str, models: tuple[Path, Path], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    stopped = child(
        """
        import os, signal, sys
        from pathlib import Path
        from mediphi.interruption import interruptible
        from mediphi.merge.engine import Job, merge

        def progress(done, total):
            if done > total // 3:
                os.kill(os.getpid(), signal.Signals[sys.argv[4]])

        base, expert, place = map(Path, sys.argv[1:4])
        with interruptible():
            merge(
                Job("slerp", {"expert": expert}, base=base, max_shard_bytes=300_000),
                values=lambda name: {"t": 0.3},
                scratch=place / "scratch",
                target=place / "model",
                progress=progress,
            )
        """,
        *models,
        tmp_path,
        name,
    )
    assert stopped.returncode == 128 + signal.Signals[name], stopped.stderr
    assert stopped.stderr == f"stopped by {name}: the same command goes on from here\n"
    assert not (tmp_path / "model").exists()
    facts = killed_merges.merged(*models, tmp_path)
    assert facts.num_resumed > 0
    assert killed_merges.content(tmp_path / "model") == whole


def test_a_disk_that_is_full_is_told_before_anything_is_computed(
    models: tuple[Path, Path], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    full = child(
        """
        import resource, sys
        from pathlib import Path
        import killed_merges
        from mediphi.errors import MachineError
        from mediphi.merge import engine
        engine.merge_tensor = None
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            killed_merges.merged(*map(Path, sys.argv[1:]))
        except MachineError as error:
            print(error)
        """,
        *models,
        tmp_path,
    )
    assert "scratch: disk full: " in full.stdout and full.stdout.count("\n") == 1, full.stderr
    assert not (tmp_path / "model").exists()
    killed_merges.merged(*models, tmp_path)
    assert killed_merges.content(tmp_path / "model") == whole


def test_too_little_room_is_refused(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mediphi.artifacts import files

    monkeypatch.setattr(files, "free_space", lambda path: 1_000_000)
    with pytest.raises(
        MachineError, match=r"scratch: disk full: 1 MB needed, 1 MB free; make room"
    ):
        killed_merges.merged(*models, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_while_publishing_leaves_nothing_half_published(
    models: tuple[Path, Path],
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mediphi.merge import folders

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_atomic", full)
    with pytest.raises(MachineError, match=r"scratch: disk full"):
        killed_merges.merged(*models, tmp_path)
    monkeypatch.undo()
    assert killed_merges.state(tmp_path, whole) == "no model"
    assert killed_merges.merged(*models, tmp_path).num_resumed == 9
    assert killed_merges.content(tmp_path / "model") == whole

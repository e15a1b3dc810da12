"""Run directories: whole or not at all, one writer, and nothing changes unseen."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mediphi.artifacts import (
    Parent,
    manifest_hash,
    open_run,
    publish,
    read_manifest,
    runs,
    verify,
)
from mediphi.errors import ArtifactError, MachineError

NOTHING = {"parents": {}, "data": {}, "extra": {}}


def opened(path: Path, *, config_hash: str = "h1", on_existing: str = "resume"):
    return open_run(path, config_yaml="seed: 0\n", config_hash=config_hash, on_existing=on_existing)


def finished(path: Path) -> Path:
    with opened(path):
        (path / "model").mkdir()
        (path / "model" / "weights.bin").write_bytes(random.Random(0).randbytes(5000))
        (path / "metrics.json").write_text('{"objective": {"name": "x", "value": 1}}')
        (path / "checkpoints").mkdir()
        (path / "checkpoints" / "last").write_text("1")
        publish(path, config_hash="h1", **NOTHING)
    return path


def script(text: str, *arguments: str, **kwargs) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


# The life of a directory.


def test_fresh_then_resume_then_finished(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path) as run:
        assert run.outcome == "fresh"
        (path / "checkpoints").mkdir()
    with opened(path) as run:
        assert run.outcome == "resume"
        publish(path, config_hash="h1", **NOTHING)
    with opened(path) as run:
        assert run.outcome == "finished"
    assert not (path / ".lock").exists()


def test_a_finished_run_is_left_byte_for_byte(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}
    with opened(path):
        pass
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}
    assert after == before


def test_another_config_under_the_same_name_is_refused(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    with pytest.raises(ArtifactError, match="another experiment"), opened(path, config_hash="h2"):
        pass
    verify(path)


def test_refuse_refuses_and_overwrite_empties(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    with pytest.raises(ArtifactError, match="refuse"), opened(path, on_existing="refuse"):
        pass
    with opened(path, config_hash="h2", on_existing="overwrite") as run:
        assert run.outcome == "fresh"
        assert sorted(p.name for p in path.iterdir()) == [".lock", "config.yaml"]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def dying_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the process dies at the call to the disk after `calls` of them.

    A folder that is being deleted then has lost one of its files.
    """
    left = iter(range(calls))

    def counted(call):
        def wrapped(path, *args, **kwargs):
            if next(left, None) is None:
                if path.is_dir():
                    os.remove(min(p for p in path.rglob("*") if p.is_file()))  # noqa: PTH107
                raise Killed
            return call(path, *args, **kwargs)

        return wrapped

    for owner, name in ((Path, "unlink"), (Path, "rename"), (runs.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def test_a_kill_while_overwriting_never_leaves_a_run_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step: all is there still, or the next start empties the folder."""
    outcomes, emptied = [], False
    while not emptied:
        calls = len(outcomes)
        path = finished(tmp_path / str(calls))
        (path / "checkpoints" / "older").write_text("0")
        whole = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
        try:
            with monkeypatch.context() as patch:
                dying_after(calls, patch)
                with opened(path, on_existing="overwrite"):
                    emptied = True
        except Killed:
            pass
        if emptied:
            break
        with opened(path) as run:
            found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {".lock"}
            outcomes.append(run.outcome)
            assert found == {
                "finished": whole,
                "resume": whole - {"manifest.json"},
                "fresh": {"config.yaml"},
            }.get(run.outcome)
    assert outcomes == ["finished", "resume", *["fresh"] * (len(outcomes) - 2)]
    assert len(outcomes) > 5


def test_a_run_that_was_given_up_is_emptied_whatever_is_asked_next(tmp_path: Path) -> None:
    for on_existing in ("resume", "overwrite", "refuse"):
        path = finished(tmp_path / on_existing)
        (path / "manifest.json").unlink()
        (path / "config.yaml").rename(path / runs.DISCARDED)
        with opened(path, config_hash="h2", on_existing=on_existing) as run:
            assert run.outcome == "fresh"
            assert sorted(p.name for p in path.iterdir()) == [".lock", "config.yaml"]


@pytest.mark.parametrize("on_existing", ["resume", "overwrite", "refuse"])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path: Path, on_existing: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a run"), opened(tmp_path, on_existing=on_existing):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_artifact_is_not_called_finished(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    (path / "model" / "weights.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"weights.bin: damaged"), opened(path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be made"), opened(tmp_path / "file" / "run"):
        pass


# Locks.


def test_of_fifty_starts_exactly_one_goes_on(tmp_path: Path) -> None:
    racers = script(
        """
        import os, sys, time
        from pathlib import Path
        from mediphi.artifacts import open_run
        from mediphi.errors import ArtifactError
        folder, start = Path(sys.argv[1]) / "run", time.monotonic() + 0.3
        for i in range(50):
            if os.fork() == 0:
                time.sleep(max(0, start - time.monotonic()))
                try:
                    with open_run(folder, config_yaml="", config_hash="h", on_existing="resume"):
                        os.write(1, b"went on\\n")
                        time.sleep(1.0)
                except ArtifactError as error:
                    os.write(1, f"{error}\\n".encode())
                os._exit(0)
        for i in range(50):
            os.wait()
        """,
        str(tmp_path),
    )
    said = racers.communicate(timeout=60)[0].splitlines()
    assert len(said) == 50
    assert said.count("went on") == 1
    assert all("in use by" in line for line in said if line != "went on")


HOLD = """
import sys, time
from pathlib import Path
from mediphi.artifacts import open_run
with open_run(Path(sys.argv[1]), config_yaml="", config_hash="h1", on_existing="resume"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_live_holder_is_named_and_a_dead_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run"
    holder = script(HOLD, str(path))
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ArtifactError, match=f"in use by process {holder.pid} on "),
            opened(path),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with opened(path) as run:
        assert run.outcome == "resume"


def test_a_worker_that_outlives_its_trainer_does_not_hold_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run"
    trainer = script(
        HOLD.replace(
            'print("held"', 'import os\n    os.fork() or time.sleep(60)\n    print("held"'
        ),
        str(path),
        start_new_session=True,
    )
    try:
        assert trainer.stdout and trainer.stdout.readline() == "held\n"
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        with opened(path) as run:
            assert run.outcome == "resume"
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.stdout.close()


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path), pytest.raises(ArtifactError, match="by this process"), opened(path):
        pass
    with opened(path):
        pass


# Manifests.


def test_a_manifest_says_what_it_was_made_from(tmp_path: Path) -> None:
    parent = finished(tmp_path / "parent")
    child = tmp_path / "child"
    with opened(child):
        digest = publish(
            child,
            config_hash="h1",
            parents={"model": Parent(str(parent), manifest_hash(parent))},
            data={"fingerprint": "f", "documents": 3, "licences": {"icd10cm": "public-domain"}},
            extra={"next": "command"},
        )
    manifest = verify(child)
    assert manifest["parents"]["model"]["sha256"] == manifest_hash(parent)
    assert manifest["data"]["documents"] == 3
    assert manifest_hash(child) == digest != manifest_hash(parent)
    assert manifest["versions"]["python"].startswith("3.")
    assert set(manifest["files"]) == {"config.yaml"}


def test_the_hash_of_a_file_is_sha256sums(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path):
        (path / "abc").write_text("abc")
        publish(path, config_hash="h1", **NOTHING)
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert verify(path)["files"]["abc"] == {"bytes": 3, "sha256": known}


def test_missing_and_extra_files_are_named(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    (path / "model" / "extra.bin").write_text("")
    with pytest.raises(ArtifactError, match=r"extra.bin: not in the manifest"):
        verify(path)
    (path / "model" / "extra.bin").unlink()
    (path / "metrics.json").unlink()
    with pytest.raises(ArtifactError, match=r"metrics.json: missing"):
        verify(path)


def test_checkpoints_and_wandb_may_change_later(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    (path / "checkpoints" / "last").write_text("2")
    (path / "wandb").mkdir()
    (path / "wandb" / "log").write_text("synced")
    vouched = verify(path)["files"]
    assert not [name for name in vouched if name.startswith(("checkpoints", "wandb"))]


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit_is_refused_and_the_file_named(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = _shared_artifact(tmp_path_factory)
    dice = random.Random(seed)
    names = ["manifest.json", "config.yaml", "metrics.json", "model/weights.bin"]
    victim = path / names[seed % 4]
    good = victim.read_bytes()
    bad = bytearray(good)
    bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
    try:
        victim.write_bytes(bad)
        with pytest.raises(ArtifactError, match=victim.name):
            verify(path)
    finally:
        victim.write_bytes(good)
    verify(path)


def _shared_artifact(factory: pytest.TempPathFactory) -> Path:
    path = factory.getbasetemp() / "shared_artifact"
    return path if path.exists() else finished(path)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"sha256": 3}', "[" * 100_000])
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(tmp_path)


def test_a_link_has_no_place_in_an_artifact(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path):
        (path / "link").symlink_to("/etc/hostname")
        with pytest.raises(ArtifactError, match="link"):
            publish(path, config_hash="h1", **NOTHING)


PUBLISH = """
import sys
from pathlib import Path
from mediphi.artifacts import open_run, publish
path = Path(sys.argv[1])
with open_run(path, config_yaml="", config_hash="h1", on_existing="overwrite"):
    for i in range(30):
        (path / f"{i}.bin").write_bytes(b"x" * 200_000)
    print("files", flush=True)
    publish(path, config_hash="h1", parents={}, data={}, extra={})
    print("done", flush=True)
"""


def test_kill_9_while_publishing_leaves_a_whole_manifest_or_none(tmp_path: Path) -> None:
    path, dice, seen = tmp_path / "run", random.Random(0), set()
    for attempt in range(12):
        child = script(PUBLISH, str(path))
        assert child.stdout and child.stdout.readline() == "files\n"
        if attempt == 0:
            assert child.stdout.readline() == "done\n"
        time.sleep(dice.random() * 0.02 if attempt > 1 else 0)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with opened(path) as run:
            seen.add(run.outcome)
            assert run.outcome == ("finished" if (path / "manifest.json").exists() else "resume")
            assert not list(path.glob(".tmp-*"))
    assert seen == {"finished", "resume"}

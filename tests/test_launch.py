"""A small parent, one process per device: their end is its end, and nobody is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mediphi import launch
from mediphi.errors import DataError, Interrupted, MachineError
from mediphi.interruption import interruptible
from mediphi.launch import Workers, one_voice

HEAD = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
PARENT = """
import sys
from mediphi.launch import Workers
sys.argv = sys.argv[1:]
with Workers(2) as workers:
    code = workers.wait()
raise SystemExit(code)
"""


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text(HEAD + body)
    return path


def ended(monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    monkeypatch.setattr(sys, "argv", [str(path), "stage=pit"])
    with Workers(2) as workers:
        code = workers.wait()
    assert all(worker.returncode is not None for worker in workers.processes)
    return code


def test_every_process_gets_the_command_line_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    body = f"from pathlib import Path\nPath({str(tmp_path)!r}, str(rank)).write_text("
    body += f"' '.join([sys.argv[1], *(os.environ[n] for n in {names}), os.environ['MINE']]))"
    monkeypatch.setenv("MINE", "kept")
    before = signal.getsignal(signal.SIGTERM)
    assert ended(monkeypatch, script(tmp_path, body)) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "0").read_text() == "stage=pit 0 0 2 127.0.0.1 kept"
    assert (tmp_path / "1").read_text() == "stage=pit 1 1 2 127.0.0.1 kept"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(2 if rank == 0 else time.sleep(100))", 2),
        ("sys.exit(3 if rank == 1 else time.sleep(100))", 3),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(100)", 137),
        ("sys.exit(5 if rank == 1 else time.sleep(0.3))", 5),
    ],
)
def test_one_that_dies_ends_the_others_and_gives_its_code(
    body: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    assert ended(monkeypatch, script(tmp_path, body)) == code
    said = capfd.readouterr().err
    assert said == ("error: a process of this run was ended by SIGKILL\n" if code == 137 else "")


def test_rank_0_may_outlive_the_others_but_not_they_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "FAREWELL", 0.2)
    slow_first = script(tmp_path, f"time.sleep(0.6) or open({str(tmp_path / 'done')!r}, 'w')\n")
    slow_first.write_text(slow_first.read_text().replace("time.sleep", "rank or time.sleep"))
    assert ended(monkeypatch, slow_first) == 0
    assert (tmp_path / "done").exists()
    assert ended(monkeypatch, script(tmp_path, "time.sleep(100 * rank)")) == 0


SAVES = """
def stop(number, frame):
    time.sleep(0.3 * (1 - rank))
    print(f"saved {rank}", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", os.getpid(), flush=True)
time.sleep(100)
"""


def start(path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent in a process of its own, and the ids of its two children, which are ready."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, [int(parent.stdout.readline().split()[1]) for _ in range(2)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_all_once_and_all_may_save(number: int, code: int, tmp_path: Path):
    parent, _ = start(script(tmp_path, SAVES))
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=60)
    assert parent.returncode == code
    assert sorted(out.split("\n")) == ["", "saved 0", "saved 1"]


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is Linux's")
def test_no_process_outlives_a_killed_parent(tmp_path: Path):
    parent, children = start(script(tmp_path, SAVES))
    parent.kill()
    parent.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- who speaks


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", seen.append)
    return seen


@pytest.mark.parametrize(("rank", "waits"), [("0", 0), ("1", 1)])
def test_rank_0_tells_an_error_at_once_and_others_after_it_could_have(
    rank: str, waits: int, naps: list[float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(DataError, match="rows:3"), one_voice():
        raise DataError("rows:3: not JSON")
    assert len(naps) == waits
    assert launch.SPEAK_AFTER > launch.GRACE > 0


def test_who_loses_its_peers_lets_them_speak_but_a_defect_shows(
    naps: list[float], monkeypatch: pytest.MonkeyPatch
):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError), one_voice():
        raise lost
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError, match="another process"), one_voice():
        raise lost
    assert len(naps) == 1
    with pytest.raises(RuntimeError, match="shapes"), one_voice():
        raise RuntimeError("shapes differ")


# --- signals outside the training loop


@pytest.mark.parametrize("slurm", [False, True])
def test_a_signal_while_an_object_is_finalised_is_not_lost(
    slurm: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Python only reports what such code raises; a loader's thread is ended there."""
    before = signal.getsignal(signal.SIGTERM)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "7")

    def loader() -> Iterator[int]:
        try:
            yield 1
        finally:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught, interruptible():
        batches = loader()
        next(batches)
        del batches
        time.sleep(5)
        raise AssertionError("the signal was dropped")
    signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert capfd.readouterr().err.count("stopped by SIGTERM") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_the_loop_is_one_line_and_its_code(
    number: int, code: int, capfd: pytest.CaptureFixture[str]
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as caught, interruptible():
        signal.raise_signal(number)
    assert caught.value.code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    (line,) = capfd.readouterr().err.splitlines()
    assert signal.Signals(number).name in line and "same command" in line


def test_in_a_slurm_job_a_second_sigterm_is_not_heard_but_sigint_is(
    monkeypatch: pytest.MonkeyPatch,
):
    ended: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        with pytest.raises(Interrupted), interruptible():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:  # cleaning up
                signal.raise_signal(signal.SIGTERM)
                with contextlib.suppress(Interrupted):
                    signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # until the process has ended
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [130]


def test_other_ranks_and_forked_children_say_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(Interrupted), interruptible():
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        monkeypatch.setenv("RANK", "1")
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == ""

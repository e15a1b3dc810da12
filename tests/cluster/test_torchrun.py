"""torchrun ends with the exit code of what it ran, and not with a traceback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = [sys.executable, "-m", "mediphi.torchrun", "--standalone", "--nproc-per-node=2"]
RANK = "import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"


def started(folder: Path, body: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(RANK + body)
    return subprocess.Popen(
        [*TORCHRUN, str(folder / "script.py")],
        cwd=folder,
        env=os.environ | environment,
        text=True,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param("", 0, marks=pytest.mark.slow),
        ("sys.exit(2 if rank == 0 else time.sleep(60))", 2),
    ],
)
def test_the_first_failure_is_the_exit_code(body: str, code: int, tmp_path: Path) -> None:
    process = started(tmp_path, body)
    _, err = process.communicate(timeout=100)
    assert process.returncode == code
    assert "Traceback" not in err


SAVES = """
def save(number, frame):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    pathlib.Path(f"heard_{rank}").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    %s
    pathlib.Path(f"saved_{rank}").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"ready_{rank}").touch()
time.sleep(60)
"""


def there_are(folder: Path, pattern: str) -> None:
    """Wait until both ranks have left a file."""
    end = time.monotonic() + 100
    while len(list(folder.glob(pattern))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(list(folder.glob(pattern))) == 2


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_told_to_stop_is_143_once_all_have_saved(times: int, tmp_path: Path) -> None:
    """In a Slurm job, however often it is told."""
    process = started(tmp_path, SAVES % "", **({"SLURM_JOB_ID": "7"} if times > 1 else {}))
    there_are(tmp_path, "ready_*")
    process.send_signal(signal.SIGTERM)
    there_are(tmp_path, "heard_*")
    for _ in range(times - 1):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.poll() is None
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    assert len(list(tmp_path.glob("saved_*"))) == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(1) if rank == 0 else time.sleep(60)", 1),  # no space, say
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSEGV) if rank == 1 else time.sleep(60)",
            139,
            marks=pytest.mark.slow,
        ),
        # Rank 0 sat an exam, and the other has lost it.
        pytest.param("sys.exit(143 if rank == 0 else 1)", 143, marks=pytest.mark.slow),
        # Too slow: killed, and on from an earlier state.
        pytest.param("time.sleep(60)", 143, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_stopping_has_its_own_code(body: str, code: int, tmp_path: Path) -> None:
    process = started(tmp_path, SAVES % body, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    there_are(tmp_path, "ready_*")
    (tmp_path / "go").touch()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == code
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_machine_whose_peer_has_failed_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RANK + "sys.exit(2 if rank == 0 else time.sleep(60))")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                *TORCHRUN[:3],
                *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=1"),
                *(f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf=is_host={int(first)}"),
                *("--local-addr=localhost", str(tmp_path / "script.py")),
            ],
            text=True,
            stderr=subprocess.PIPE,
        )
        for first in (True, False)
    ]
    said = [node.communicate(timeout=100)[1] for node in nodes]
    assert sorted(node.returncode for node in nodes) == [1, 2]
    assert "Traceback" not in "".join(said)
    assert sum("error: another machine of this run ended" in err for err in said) == 1

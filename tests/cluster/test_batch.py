"""The file that Slurm runs: its text, what reaches the program, and when a job comes back."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_slurm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediphi.cluster import Job, batch_options, batch_text
from mediphi.config.slurm import Slurm

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "slurm" / "two_nodes.sbatch"
EIGHT = Slurm(
    partition="gpu",
    account="clinic",
    qos="long",
    constraint="ib&h100",
    gpu_type="h100",
    cpus_per_task=96,
    mem_gb=0,
    hours=30.5,
    setup=("module load cuda/13.0", "source /venv/bin/activate"),
    options=("--exclusive", "--exclude=node7"),
)
TWO_NODES = Job(
    name="pit-codes",
    arguments=("/home/me/mediphi/train.py", "stage=pit", "hardware=slurm_2xh100x8_fsdp2"),
    slurm=EIGHT,
    directory=Path("/home/me/my work"),
    num_nodes=2,
    devices=8,
    environment={"MEDIPHI_RUNS": "/scratch/my runs"},
)
TOY = Job("toy", ("train.py",), Slurm(), Path("/"), needs_gpus=False)


def text(job: Job) -> str:
    return batch_text(job, log=f"/scratch/my runs/slurm/{job.name}.%j.log")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the toy cluster keeps its jobs; its commands are found."""
    for name, value in fake_slurm.install(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def kept(job: Job, folder: Path, state: str = "RUNNING") -> str:
    fake_slurm.keep(folder, "7", text(job), state=state)
    return "7"


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_the_file_is_the_committed_one() -> None:
    assert text(TWO_NODES) == GOLDEN.read_text()


@pytest.mark.parametrize("job", [TWO_NODES, TOY])
def test_bash_and_shellcheck_have_no_objections(job: Job) -> None:
    checked = subprocess.run(["bash", "-n"], input=text(job), text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    if shutil.which("shellcheck"):
        # A function that only srun calls, and an environment that only a node has.
        command = ["shellcheck", "--exclude=SC1091,SC2317,SC2329", "-"]
        said = subprocess.run(command, input=text(job), text=True, capture_output=True)
        assert said.returncode == 0, said.stdout


def test_what_is_not_asked_for_is_left_to_the_cluster() -> None:
    names = {"partition", "account", "qos", "constraint", "gres", "cpus-per-task", "mem"}
    assert names.isdisjoint(batch_options(TOY))
    assert names <= batch_options(TWO_NODES).keys()
    assert batch_options(replace(TWO_NODES, slurm=Slurm()))["gres"] == "gpu:8"


@pytest.mark.parametrize(
    ("hours", "limit"), [(24, "1-00:00:00"), (0.5, "0-00:30:00"), (30.51, "1-06:31:00")]
)
def test_hours_become_days_and_whole_minutes(hours: float, limit: str) -> None:
    assert batch_options(replace(TOY, slurm=Slurm(hours=hours)))["time"] == limit


def test_the_users_options_come_last() -> None:
    slurm = Slurm(hours=1, options=("--time=5", "--exclusive"))
    options = batch_options(replace(TOY, slurm=slurm))
    assert options["time"] == "5"
    assert "\n#SBATCH --exclusive\n" in text(replace(TOY, slurm=slurm))


def test_a_container_sees_the_folders_and_runs_its_own_python() -> None:
    job = replace(TWO_NODES, slurm=Slurm(container="my image.sif"), folders=(Path("/scratch"),))
    assert (
        "exec apptainer exec --nv --bind '/home/me/my work,/scratch' --pwd '/home/me/my work' "
        "'my image.sif' python -m mediphi.torchrun"
    ) in text(job)


@settings(max_examples=15, deadline=None)
@given(
    arguments=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=4),
    restarts=st.integers(0, 2),
)
def test_arguments_reach_the_program_as_they_were_typed(
    arguments: list[str], restarts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("typed")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in fake_slurm.install(folder).items():
            patched.setenv(name, value)
        job = replace(TOY, arguments=("train.py", *arguments), python=r"printf '%s\0'")
        number = kept(job, folder)
    assert fake_slurm.life(folder, number, restarts=restarts).wait() == 0
    *words, end = (folder / number / "life.log").read_bytes().decode().split("\0")
    assert words[words.index("train.py") :] == ["train.py", *arguments]
    assert words[:2] == ["-m", "mediphi.torchrun"] and end == ""
    assert "--rdzv-conf=is_host=1" in words and f"--rdzv-id=7.{restarts}" in words


@pytest.mark.parametrize(
    ("code", "state", "restarts", "comes_back"),
    [
        (0, "RUNNING", 0, False),
        (1, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (137, "RUNNING", 0, False),
        (143, "RUNNING", 0, True),
        (143, "RUNNING", 19, True),
        (143, "RUNNING", 20, False),
        (143, "COMPLETING", 0, False),
    ],
)
def test_only_a_job_that_was_told_to_stop_comes_back(
    code: int, state: str, restarts: int, comes_back: bool, cluster: Path
) -> None:
    number = kept(replace(TOY, python=f"sh -c 'exit {code}'"), cluster, state)
    assert fake_slurm.life(cluster, number, restarts=restarts).wait() == code
    assert ("scontrol requeue 7" in calls(cluster)) == comes_back
    said = (cluster / number / "life.log").read_text()
    assert ("submit it again" in said) == (restarts == 20)


def test_of_an_array_only_the_job_itself_comes_back(cluster: Path) -> None:
    """The array's number is also that of its last job, and stands for all of them."""
    number = kept(replace(TOY, python="sh -c 'exit 143'"), cluster)
    assert fake_slurm.life(cluster, number, index=0).wait() == 143
    assert calls(cluster)[-2:] == [
        "squeue --noheader --jobs=7_0 --format=%T",
        "scontrol requeue 7_0",
    ]


ENDS = """
import os, pathlib, signal, sys, time
code, after = sys.argv[1].split(",")[int(os.environ["SLURM_NODEID"])].split("@")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if after == "told":
    pathlib.Path("ready").touch()
    time.sleep(30)
time.sleep(after == "late")
while after == "ready" and not pathlib.Path("ready").exists():
    time.sleep(0.01)
sys.exit(int(code))
"""


@pytest.mark.parametrize(
    ("nodes", "code", "comes_back"),
    [
        ("1@ready,0@told", 1, False),  # 143 of a node that is ended because another has failed
        ("0@told,2@ready", 2, False),
        ("143@ready,0@told", 143, True),
        ("143@now,1@late", 143, True),  # told first, it ended before the other heard anything
        ("143@now,143@now", 143, True),
        ("1@now,1@now", 1, False),
    ],
)
def test_the_first_nodes_end_counts_not_those_that_it_brings_about(
    nodes: str, code: int, comes_back: bool, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "late" not in nodes:
        monkeypatch.setenv("FAKE_SLURM_KILLS", "1")
    (cluster / "ends.py").write_text(ENDS)
    python = f"{sys.executable} -S {cluster / 'ends.py'} {nodes}"
    job = replace(TOY, python=python, directory=cluster, num_nodes=2)
    fake_slurm.keep(cluster, "7", batch_text(job, log=f"{cluster}/a $1 100%%.%j.log"))
    assert fake_slurm.life(cluster, "7").wait(30) == code
    assert ("scontrol requeue 7" in calls(cluster)) == comes_back
    assert not list(cluster.glob("*.ended"))


HEARS = """
import pathlib, signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
pathlib.Path("ready").touch()
while not heard:
    time.sleep(0.01)
time.sleep(0.5)
pathlib.Path("heard").write_text(f"{len(heard)} {signal.getsignal(signal.SIGUSR1).name}")
sys.exit(143)
"""


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM])
def test_torchrun_hears_once_what_slurm_says_often(first: signal.Signals, cluster: Path) -> None:
    (cluster / "hears.py").write_text(HEARS)
    python = f"{sys.executable} -S {cluster / 'hears.py'}"
    number = kept(replace(TOY, python=python, directory=cluster), cluster)
    script = fake_slurm.life(cluster, number)
    _wait_for(cluster / "ready", script)
    fake_slurm.tell(cluster, first)
    time.sleep(0.1)
    fake_slurm.tell(cluster, signal.SIGUSR1, signal.SIGTERM)
    assert script.wait(30) == 143
    assert (cluster / "heard").read_text() == "1 SIG_IGN"
    assert "scontrol requeue 7" in calls(cluster)


def _wait_for(path: Path, script: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while not path.exists() and script.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()

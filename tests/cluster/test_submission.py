"""From a config to a job: what is submitted, and what is refused in one line."""

import os
from pathlib import Path

import fake_slurm
import pytest
from composing import composed

from mediphi.artifacts import open_run
from mediphi.cluster import job_of, submit, wanted
from mediphi.config import Config, config_hash, load, run_dir
from mediphi.config.slurm import Slurm
from mediphi.errors import ArtifactError, ConfigError, MachineError, UserError

ARGUMENTS = ["/home/me/train.py", "stage=pit", "name=codes"]


def made(*overrides: str) -> Config:
    job = ["hardware=cpu", "hardware.slurm.hours=2", "name=codes"]
    return load(composed("stage=pit", *job, *overrides))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the toy cluster keeps its jobs; the working directory stands beside it."""
    for name in ("SLURM_JOB_ID", "MEDIPHI_JOB", "MEDIPHI_RUNS", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cluster"
    for name, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def submitted(config: Config) -> None:
    slurm = wanted(config)
    assert slurm is not None
    submit(config, slurm, ARGUMENTS)


def test_a_submission_says_where_to_look(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(made())
    said, place = capsys.readouterr().out, Path.cwd() / "runs" / "slurm"
    assert said.splitlines() == [
        f"job     41  (1 x 1 devices, {place}/pit-codes.sbatch)",
        "run     runs/pit/codes",
        f"follow  tail -F {place}/pit-codes.41.log",
        "state   squeue --jobs=41; to end it: scancel 41",
    ]
    assert (slurm / "41" / "script").read_text() == (place / "pit-codes.sbatch").read_text()
    assert fake_slurm.options(slurm / "41" / "script")["output"] == f"{place}/pit-codes.%j.log"


def test_a_run_is_in_the_queue_once(slurm: Path) -> None:
    submitted(made())
    with pytest.raises(ArtifactError, match="runs/pit/codes: job 41 is in the queue"):
        submitted(made())
    submitted(made("name=others"))
    (slurm / "41" / "state").write_text("COMPLETED")
    submitted(made())
    assert sorted(p.parent.name for p in slurm.glob("*/script")) == ["41", "42", "43"]


def test_what_the_job_would_refuse_is_refused_at_once(slurm: Path) -> None:
    config = made()
    with open_run(
        run_dir(config), config_yaml="", config_hash=config_hash(config), on_existing="refuse"
    ):
        Path(run_dir(config), "checkpoints").mkdir()
    with pytest.raises(ArtifactError, match="on_existing=refuse"):
        submitted(made("on_existing=refuse"))
    with pytest.raises(ArtifactError, match="another experiment"):
        submitted(made("seed=7"))
    assert not list(slurm.glob("*/script"))
    submitted(made("on_existing=overwrite"))
    assert (run_dir(config) / "checkpoints").is_dir(), "only the job itself empties it"


def test_check_only_prints_the_file_and_leaves_nothing(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made("check_only=true")
    submit(config, Slurm(), [*ARGUMENTS, "check_only=true"])
    said = capsys.readouterr().out
    assert said.startswith("#!/bin/bash\n#SBATCH") and "check_only=" not in said
    assert not Path("runs").exists() and not (slurm / "calls").exists()


def test_without_slurm_the_file_is_there_to_be_submitted_elsewhere(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"sbatch is not on this machine: submit .*codes\.sbatch"):
        submitted(made())
    assert [p.name for p in Path("runs/slurm").iterdir()] == ["pit-codes.sbatch"]


def test_what_slurm_refuses_is_told_in_its_words(slurm: Path) -> None:
    with pytest.raises(UserError, match="sbatch: error: invalid partition specified: none"):
        submitted(made("hardware.slurm.partition=none"))
    assert not list(Path("runs/slurm").glob("*.job"))


def test_a_queue_that_does_not_answer_is_the_machines_fault(slurm: Path) -> None:
    (slurm / "bin" / "squeue").write_text("#!/bin/sh\necho 'slurm is down' >&2\nexit 1\n")
    with pytest.raises(MachineError, match="squeue: slurm is down"):
        submitted(made())


def test_inside_its_job_a_run_is_not_submitted_again(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wanted(load(composed("hardware=cpu"))) is None
    monkeypatch.setenv("SLURM_JOB_ID", "41")  # a shell that Slurm gave
    assert wanted(made()) is not None
    monkeypatch.setenv("MEDIPHI_JOB", "41")
    assert wanted(made()) is None
    monkeypatch.setenv("SLURM_JOB_ID", "42")  # submitted from within a job
    assert wanted(made()) is not None
    monkeypatch.setenv("WORLD_SIZE", "8")  # a job of the user's own that starts torchrun
    assert wanted(made()) is None


def test_the_job_has_the_places_and_not_the_secrets(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDIPHI_RUNS", "/scratch/runs")
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    job = job_of(made("hardware.devices=2", "hardware.micro_batch=2"), Slurm(), ARGUMENTS)
    assert job.environment["MEDIPHI_RUNS"] == "/scratch/runs"
    assert "0123" not in str(job)
    assert (job.num_nodes, job.devices, job.needs_gpus) == (1, 2, False)
    assert job.directory == Path.cwd()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("hardware.slurm.setup=['export HF_TOKEN=x']", r"setup\.0: holds a secret"),
        ("hardware.slurm.signal_seconds=7200", "must be below hours=2"),
        ("hardware.slurm.partition='a b'", "must match"),
        ("hardware.slurm.options=[exclusive]", "must match"),
        ("hardware.accelerator=auto", "a job says what it needs"),
    ],
)
def test_a_section_that_cannot_be_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        made(override)


def test_slurm_does_not_name_the_run() -> None:
    assert config_hash(made()) == config_hash(made("hardware.slurm.partition=gpu"))
    assert os.environ.get("MEDIPHI_JOB") is None

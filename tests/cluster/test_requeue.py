"""A job that comes back goes on with its own run, whatever `on_existing` says, and no other's."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from composing import composed

import mediphi
from mediphi.artifacts import open_run, publish
from mediphi.config import Config, config_hash, load, run_dir
from mediphi.errors import ArtifactError, Interrupted
from mediphi.launch import RunResult
from mediphi.run import run

Training = Callable[[Config], RunResult]


def made(on_existing: str, *overrides: str) -> Config:
    job = ["hardware=cpu", "hardware.slurm.hours=1", "name=codes", f"on_existing={on_existing}"]
    return load(composed("stage=dapt", "corpus=medcode", *job, *overrides))


def finishes(config: Config) -> RunResult:
    with (run_dir(config) / "trained").open("a") as file:
        file.write("x")
    publish(run_dir(config), config_hash=config_hash(config), parents={}, data={}, extra={})
    return RunResult(1.0, run_dir(config))


def preempted(config: Config) -> RunResult:
    (run_dir(config) / "trained").write_text("x")
    raise Interrupted(143)


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunResult]:
    """One life of a Slurm job, in which `training` stands for the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDIPHI_RUNS", raising=False)
    monkeypatch.setattr("mediphi.run._refuse_changed_inputs", lambda config: None)
    monkeypatch.setattr("mediphi.run.announce", lambda path: RunResult(None, path))

    def lived(config: Config, training: Training, *, job: str = "41") -> RunResult:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("MEDIPHI_JOB", job)
        module = ModuleType("mediphi.training")
        module.__dict__["train"] = training
        monkeypatch.setitem(sys.modules, "mediphi.training", module)
        monkeypatch.setattr(mediphi, "training", module, raising=False)
        return run(config)

    return lived


def trained() -> str:
    """One `x` for every life that trained in the same run."""
    return Path("runs/dapt/codes/trained").read_text()


@pytest.mark.parametrize("on_existing", ["resume", "overwrite", "refuse"])
def test_a_job_that_comes_back_goes_on_in_its_own_run(
    on_existing: str, life: Callable[..., RunResult]
) -> None:
    config = made(on_existing)
    with pytest.raises(Interrupted):
        life(config, preempted)
    assert life(config, finishes).metric == 1.0
    assert trained() == "xx"
    assert life(config, finishes).metric is None  # an administrator may requeue what is done
    assert trained() == "xx"


@pytest.mark.parametrize("other", ["same config", "another config"])
def test_a_job_stopped_before_it_began_overwrites_the_old_run_when_it_comes_back(
    other: str, life: Callable[..., RunResult]
) -> None:
    old = made("resume", *(["seed=7"] if other == "another config" else []))
    life(old, finishes, job="40")
    (run_dir(old) / "old").touch()
    # Preempted while Python started, job 41 has left nothing; its next life begins like the first.
    assert life(made("overwrite"), finishes).metric == 1.0
    assert trained() == "x" and not (run_dir(old) / "old").exists()


def test_a_job_overwrites_or_refuses_the_run_of_another_job(
    life: Callable[..., RunResult],
) -> None:
    with pytest.raises(Interrupted):
        life(made("resume"), preempted, job="40")
    with pytest.raises(ArtifactError, match="on_existing=refuse"):
        life(made("refuse"), finishes)
    life(made("overwrite"), finishes)
    assert trained() == "x"


def test_a_run_taken_over_outside_of_slurm_is_no_longer_the_jobs(
    life: Callable[..., RunResult],
) -> None:
    config = made("refuse")
    with pytest.raises(Interrupted):
        life(config, preempted)
    with open_run(
        run_dir(config), config_yaml="", config_hash=config_hash(config), on_existing="resume"
    ):
        pass
    with pytest.raises(ArtifactError, match="on_existing=refuse"):
        life(config, finishes)


def test_a_config_changed_between_two_lives_is_refused(life: Callable[..., RunResult]) -> None:
    with pytest.raises(Interrupted):
        life(made("overwrite"), preempted)
    with pytest.raises(ArtifactError, match="another experiment"):
        life(made("overwrite", "seed=7"), finishes)
    assert trained() == "x"

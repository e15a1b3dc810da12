"""Runs as jobs of a Slurm that is acted: real scripts, real torchrun, real training."""

import signal
from pathlib import Path

import fake_slurm
import pytest
from end_to_end.tiny_run import CODES, DAPT, Child, Place, checkpoints, wait_for, weights

from mediphi.artifacts import verify

RUN = [*DAPT, *CODES, "hardware.accelerator=cpu", "stage.neftune_alpha=5"]
NODES = ["hardware.num_nodes=2", "hardware.slurm.hours=1"]


@pytest.fixture
def cluster(place: Place) -> Path:
    """Where the acted Slurm keeps its jobs."""
    folder = place.folder / "cluster"
    place.environment |= fake_slurm.install(folder)
    return folder


def life(cluster: Path, place: Place, *, restarts: int = 0) -> Child:
    log = cluster / "41" / "life.log"
    return Child(fake_slurm.life(cluster, "41", restarts=restarts), log, log)


def test_slurms_number_of_a_task_is_not_the_rank(place: Place) -> None:
    """The run is held and logged by its only process, whatever that is called."""
    ended = place.program(*RUN, SLURM_PROCID="1").wait()
    assert ended.code == 0, ended
    verify(place.run_dir("dapt"))


@pytest.mark.parametrize(
    "hardware",
    [
        ["hardware=slurm_2xh100x8_fsdp2"],
        ["hardware=h100x8_fsdp2", "hardware.num_nodes=2"],
        ["hardware=cpu", "hardware.devices=8", *NODES],
    ],
    ids=lambda words: words[0],
)
def test_several_nodes_are_planned_without_slurm_or_torchrun(
    hardware: list[str], place: Place, cluster: Path
) -> None:
    ended = place.run(*DAPT, *CODES, *hardware, "stage.global_batch=32", "check_only=true")
    assert ended.code == 0, ended
    file, first, page = ended.out.rpartition("parameters  ")
    assert first and "device      16 x " in page and page.count("check only:") == 1, ended
    is_job = "slurm" in " ".join(hardware)
    assert file.startswith("#!/bin/bash\n") == is_job == ("#SBATCH --nodes=2\n" in file)
    assert not place.runs.exists() and not (cluster / "calls").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preempted_job_of_two_nodes_ends_like_a_run_that_nothing_disturbed(
    place: Place, cluster: Path, tmp_path: Path
) -> None:
    run = ["logger=wandb" if argument == "logger=csv" else argument for argument in RUN]
    submitted = place.program(*run, *NODES).wait()
    assert submitted.code == 0 and submitted.out.startswith("job     41  (2 x 1 devices"), submitted
    child = life(cluster, place)
    assert wait_for(lambda: list(place.runs.glob("dapt/*/checkpoints/*/step-*")), child)
    fake_slurm.tell(cluster, signal.SIGTERM, signal.SIGUSR1)
    ended = child.wait()
    assert ended.code == 143 and "Traceback" not in ended.out, ended
    assert "scontrol requeue 41" in (cluster / "calls").read_text()
    run_dir = place.run_dir("dapt")
    assert checkpoints(run_dir) and not (run_dir / "manifest.json").exists()

    ended = life(cluster, place, restarts=1).wait()
    assert ended.code == 0 and ended.out.count("sha256") == 1, ended
    other = Place(tmp_path / "other", place.cache, place.assets)
    undisturbed = other.program(*RUN, "hardware.devices=2").wait()
    assert undisturbed.code == 0, undisturbed
    assert weights(run_dir) == weights(other.run_dir("dapt"))
    number = (run_dir / "wandb_id").read_text().strip()
    lives = [path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")]
    assert lives == [number, number]

    again = place.program(*run, *NODES).wait()
    assert again.code == 0 and again.out.count("sha256") == 1, again
    assert [path.parent.name for path in cluster.glob("*/script")] == ["41"]

"""A sweep is one job array by submitit, and the same command goes on with what is left."""

import csv
import subprocess
from pathlib import Path

import fake_slurm
import pytest
from program import attempts, finish, start

SWEEP = ["-m", "seed=0,1", "hardware=cpu", "hardware.slurm.hours=1", "hardware.slurm.max_jobs=4"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the acted Slurm keeps its jobs; programs start in `work`."""
    for name, value in fake_slurm.install(tmp_path / "cluster").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cluster"


def swept(*arguments: str) -> tuple[int, str, str]:
    return finish(start(Path.cwd(), *SWEEP, *arguments))


def statuses() -> list[str]:
    (path,) = Path.cwd().glob("runs/sweeps/*/table.csv")
    with path.open() as file:
        return [row["status"] for row in csv.DictReader(file)]


def test_points_become_an_array_whose_jobs_are_not_submitted_twice(cluster: Path) -> None:
    code, out, err = swept()
    assert (code, err) == (0, "")
    assert "41_0  seed=0\n41_1  seed=1\n" in out and statuses() == ["queued", "queued"]
    asked = fake_slurm.options(cluster / "41" / "script")
    assert asked["array"] == "0-1%2" and asked["signal"] == "USR1@300" and asked["nodes"] == "1"
    assert "requeue" in asked and asked["job-name"].startswith("sweep-")
    checked = subprocess.run(["bash", "-n", str(cluster / "41" / "script")], check=False)
    assert checked.returncode == 0
    assert attempts(Path.cwd()) == []
    assert swept()[0] == 0 and statuses() == ["queued", "queued"]
    assert len(list(cluster.glob("*/script"))) == 1


def test_a_job_of_the_array_trains_its_point_and_a_failed_one_is_queued_again(
    cluster: Path,
) -> None:
    (Path.cwd() / "fail_1").touch()
    assert swept()[0] == 0
    lives = [fake_slurm.life(cluster, "41", index=index) for index in range(2)]
    assert [one.wait(120) for one in lives] == [0, 2]
    group = attempts(Path.cwd())[0].split()[1]
    assert sorted(attempts(Path.cwd())) == [f"0 {group}", f"1 {group}"] and group != "None"
    log = (cluster / "41" / "life.log").read_text()
    assert "error: rows.jsonl:3: not JSON" in log and "Traceback" not in log
    (cluster / "41" / "state").write_text("COMPLETED")
    code, out, _ = swept()
    assert code == 0 and statuses() == ["skipped", "queued"] and "\n42  seed=1\n" in f"\n{out}"


def test_what_slurm_refuses_is_one_line(cluster: Path) -> None:
    code, _, err = swept("hardware.slurm.partition=none")
    refusal = "sbatch: error: invalid partition specified: none"
    assert code == 2 and err.splitlines() == [refusal, f"error: submitit: {refusal}"]
    assert not list(Path.cwd().glob("runs/slurm/*.job"))


def test_without_submitit_the_way_to_it_is_one_line(cluster: Path) -> None:
    site = cluster.parent / "work-site"
    site.mkdir()
    (site / "submitit.py").write_text("raise ImportError")
    code, _, err = swept()
    assert code == 2 and err.count("\n") == 1 and "pip install -e '.[slurm]'" in err
    assert not list(cluster.glob("*/script"))

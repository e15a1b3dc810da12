"""A sweep of real runs: what is done is skipped, what failed is tried again."""

import csv
import shutil

import pytest
from end_to_end.tiny_chat import ChatRun
from end_to_end.tiny_run import CODES, DAPT, Place

from mediphi.artifacts import verify

COMMAND = ["-m", "stage=dapt", *CODES, *DAPT[1:], "stage.phase.lr=1e-3,3e-3"]


def statuses(place: Place) -> list[str]:
    (path,) = place.runs.glob("sweeps/*/table.csv")
    with path.open(newline="") as file:
        return [row["status"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_finished_points_are_skipped_and_failed_ones_run_again(place: Place) -> None:
    first = place.program(*COMMAND).wait()
    assert first.code == 0, first
    assert statuses(place) == ["done", "done"]
    one, two = sorted((place.runs / "dapt").iterdir())
    kept = (one / "manifest.json").read_bytes()
    model = two / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    second = place.program(*COMMAND).wait()
    assert second.code == 1, second
    assert sorted(statuses(place)) == ["failed", "skipped"]
    assert f"{model}: damaged" in second.out
    shutil.rmtree(two)
    third = place.program(*COMMAND).wait()
    assert third.code == 0, third
    assert sorted(statuses(place)) == ["done", "skipped"]
    assert (one / "manifest.json").read_bytes() == kept
    for run_dir in (one, two):
        verify(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("num_jobs", [1, 4])
def test_four_points_of_dpo_share_one_reference_pass(
    num_jobs: int, alone: Place, dpo_run: ChatRun
) -> None:
    options = [a for a in dpo_run.command if not a.startswith("stage.phase.lr")]
    options += ["stage.beta=0.1,0.5", "stage.phase.lr=1e-3,3e-3", f"hydra.sweeper.jobs={num_jobs}"]
    ended = alone.program("-m", *options).wait(400)
    assert ended.code == 0, ended
    assert statuses(alone) == ["done"] * 4
    logs = [path.read_text() for path in sorted(alone.runs.glob("sweeps/*/*.log"))]
    assert len(logs) == 4
    assert sum(log.count(" pairs in ") for log in logs) == 1
    assert sum("reference   from " in log for log in logs) == 3
    (kept,) = (alone.cache / "references").glob("*.bin")
    made = kept.stat().st_mtime_ns
    runs = sorted((alone.runs / "dpo").iterdir())
    assert len({(run / "model" / "model.safetensors").read_bytes() for run in runs}) == 4
    assert "stage.beta=0.5" in ended.out and "exam/all" in ended.out
    again = alone.program("-m", *options).wait(200)
    assert again.code == 0, again
    assert statuses(alone) == ["skipped"] * 4
    assert kept.stat().st_mtime_ns == made
    for run in runs:
        verify(run)

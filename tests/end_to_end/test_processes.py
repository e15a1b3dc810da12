"""Two processes on the CPU by the real command: one voice, one exit code, nobody waits forever."""

import shutil
import signal
from pathlib import Path

import pytest
from end_to_end.tiny_run import (
    CODES,
    DAPT,
    PIT,
    TORCHRUN,
    Place,
    checkpoints,
    one_line,
    wait_for,
    weights,
)
from safetensors.torch import load_file

TWO = ["hardware.devices=2", "hardware.accelerator=cpu"]
RUN = [*DAPT, *CODES, *TWO, "stage.neftune_alpha=5"]


def only_run(place: Place) -> list[Path]:
    return [p for p in place.runs.glob("dapt/*") if p.is_dir()]


def test_two_processes_stop_on_a_signal_go_on_and_announce_a_finished_run(place: Place) -> None:
    child = place.program(*RUN)
    assert wait_for(lambda: [c for run in only_run(place) for c in checkpoints(run)], child)
    child.send(signal.SIGTERM)
    ended = child.wait()
    assert ended.code == 143, ended
    (said,) = [line for line in ended.err.splitlines() if not line.startswith("dapt")]
    assert "SIGTERM" in said and "same command" in said
    done = place.program(*RUN).wait()
    assert done.code == 0, done
    assert all(line.startswith("dapt step") for line in done.err.splitlines()), done
    assert done.out.count("sha256") == 1
    again = place.program(*RUN).wait()
    assert again.code == 0 and again.err == "", again
    assert done.out.endswith(again.out)


@pytest.mark.slow
def test_a_resumed_run_of_two_is_bitwise_the_undisturbed_one_and_torchrun_announces_it(
    place: Place, tmp_path: Path
) -> None:
    other = Place(tmp_path / "other", place.cache, place.assets)
    child = place.program(*RUN)
    assert wait_for(lambda: [c for run in only_run(place) for c in checkpoints(run)], child)
    assert child.kill().code == -signal.SIGKILL
    for where in (place, other):
        ended = where.program(*RUN).wait()
        assert ended.code == 0, ended
    assert weights(place.run_dir("dapt")) == weights(other.run_dir("dapt"))
    place.starter = TORCHRUN
    ended = place.program(*RUN).wait(60)
    assert ended.code == 0 and ended.out.count("sha256") == 1, ended


def test_under_torchrun_one_rank_prints_the_plan(place: Place) -> None:
    place.starter = TORCHRUN
    weightless = ["model.init=pretrained", f"model.path={place.assets / 'model'}"]
    ended = place.program(*RUN, *weightless, "check_only=true").wait()
    assert ended.code == 0, ended
    for line in ("a run would end with", "parameters ", "device ", "check only:"):
        assert ended.out.count(line) == 1, ended


@pytest.mark.parametrize(
    ("broken", "content"),
    [  # rank 0 reads the first, both read the second
        ("codes/icd10cm_tabular_2021.xml", "<ICD10CM.tabular><chapter>"),
        ("model/tokenizer.json", "{"),
    ],
)
def test_what_is_broken_is_one_line_and_exit_2(
    broken: str, content: str, alone: Place, tmp_path: Path
) -> None:
    shutil.copytree(alone.assets, tmp_path / "assets")
    (tmp_path / "assets" / broken).write_text(content)
    place = Place(alone.folder, alone.cache, tmp_path / "assets")
    ended = place.program(*RUN).wait()
    assert ended.code == 2, ended
    assert Path(broken).stem in one_line(ended) or Path(broken).parent.name in one_line(ended)


def test_a_signal_before_the_training_loop_is_one_line_at_once(place: Place) -> None:
    child = place.program(*PIT)
    assert wait_for(lambda: list(place.runs.glob("pit/*/config.yaml")), child)
    child.send(signal.SIGINT)
    ended = child.wait()
    assert ended.code == 130, ended
    (said,) = ended.err.splitlines()
    assert "SIGINT" in said


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_two_processes_train_what_one_trains(
    stage: str, alone: Place, request: pytest.FixtureRequest
) -> None:
    """In float32, without noise; DPO's reference pass is shared out, too."""
    command = [*request.getfixturevalue(f"{stage}_run").command, "hardware.precision=32-true"]
    command += ["hardware.micro_batch=1"] + ["stage.neftune_alpha=0"] * (stage == "sft")
    two = Place(alone.folder / "two", alone.folder / "two" / "cache", alone.assets)
    for place, devices in ((alone, 1), (two, 2)):
        ended = place.program(*command, f"hardware.devices={devices}").wait()
        assert ended.code == 0, ended
        assert ended.out.count("sha256") == 1
        assert ended.out.count(" pairs in ") == (stage == "dpo")
    first, second = (
        load_file(place.run_dir(stage) / "model" / "model.safetensors") for place in (alone, two)
    )
    start = request.getfixturevalue("sft_run").run_dir / "model" / "model.safetensors"
    moved = max(float((first[n] - t).abs().max()) for n, t in load_file(start).items())
    for name, tensor in first.items():
        difference = float((second[name] - tensor).abs().max())
        assert difference < 1e-3 * moved, (name, difference, moved)

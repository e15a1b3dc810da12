"""ZeRO-3 and FSDP2 by the real command: one device's model, through stops, kills and changes."""

import csv
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from end_to_end import tiny_run
from end_to_end.tiny_chat import ChatRun, dpo
from end_to_end.tiny_run import (
    CODES,
    DAPT,
    Child,
    Place,
    checkpoints,
    curve,
    wait_for,
    weights,
)
from safetensors.torch import load_file

from mediphi.checkpointing import step_of

EXACT = ["hardware.accelerator=cpu", "hardware.precision=32-true", "name=run"]
RUN = [*DAPT, *CODES, *EXACT, "hardware.micro_batch=1", "hardware.checkpoints.every_steps=1"]
RUN += ["stage.neftune_alpha=0"]
TWO = "hardware.devices=2"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TORCHRUN += ["--max-restarts=5", "--monitor-interval=0.1"]


@pytest.fixture(scope="module")
def plain(shared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    place = Place(tmp_path_factory.mktemp("plain"), shared.cache, shared.assets)
    ended = place.program(*RUN).wait()
    assert ended.code == 0, ended
    return run_dir(place)


def run_dir(place: Place) -> Path:
    return place.runs / "dapt" / "run"


def stop_after_a_step(place: Place, *how: str) -> None:
    """Run until a new checkpoint is there, then ask it to stop."""
    before = len(checkpoints(run_dir(place)))
    child = place.program(*RUN, *how)
    assert wait_for(lambda: len(checkpoints(run_dir(place))) > before, child)
    child.send(signal.SIGTERM)
    assert child.wait().code == 143
    assert not (run_dir(place) / "manifest.json").exists()


def losses(run: Path) -> list[float]:
    """Held-out preference losses."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(r["heldout/loss"]) for r in csv.DictReader(file) if r["heldout/loss"]]


def assert_same_model(ours: Path, theirs: Path) -> None:
    left, right = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert left.keys() == right.keys()
    off = max(float((left[name] - right[name]).abs().max()) for name in left)
    assert off < 1e-4  # measured: 1e-5, after eight steps of AdamW at up to 1e-3


def test_one_run_goes_on_under_another_strategy_and_number_of_processes(
    near: Place, plain: Path
) -> None:
    stop_after_a_step(near)
    stop_after_a_step(near, "hardware.strategy=zero3", TWO)
    ended = near.program(*RUN, "hardware.strategy=fsdp2", TWO).wait()
    assert ended.code == 0 and ended.out.count("sha256") == 1, ended
    assert_same_model(run_dir(near), plain)
    assert len(curve(run_dir(near))) == len(curve(plain))


def test_preferences_are_trained_alike_by_all_strategies(
    near: Place, sft_run: ChatRun, tmp_path: Path
) -> None:
    """Log-probabilities of the reference too: each strategy computes its own."""
    command = [*dpo(near.assets, sft_run.run_dir), *EXACT, "hardware.micro_batch=2"]
    made = {}
    for how in ([], ["hardware.strategy=zero3", TWO], ["hardware.strategy=fsdp2", TWO]):
        place = Place(tmp_path / str(len(made)), tmp_path / f"cache{len(made)}", near.assets)
        ended = place.program(*command, *how).wait()
        assert ended.code == 0 and ended.out.count("\nreference ") == 1, ended
        made[len(made)] = place.runs / "dpo" / "run"
    for other in (made[1], made[2]):
        assert_same_model(other, made[0])
        assert losses(other) == pytest.approx(losses(made[0]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_a_resumed_run_of_two_is_bitwise_the_undisturbed_one(
    strategy: str, near: Place, plain: Path, tmp_path: Path
) -> None:
    how = (f"hardware.strategy={strategy}", TWO)
    other = Place(tmp_path / "other", near.cache, near.assets)
    stop_after_a_step(near, *how)
    for place in (near, other):
        ended = place.program(*RUN, *how).wait()
        assert ended.code == 0, ended
    assert weights(run_dir(near)) == weights(run_dir(other))
    assert curve(run_dir(near)) == curve(run_dir(other))
    assert_same_model(run_dir(near), plain)


def newest_step(place: Place) -> int:
    return max((step_of(found) for found in checkpoints(run_dir(place))), default=0)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiny_run, "PYTHON", TORCHRUN)
    yield


def second_process(child: Child) -> int | None:
    """The process of rank 1 that torchrun has started, if it runs."""
    for status in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{child.pid}\n" in (status / "status").read_text()
            if is_child and b"\0RANK=1\0" in b"\0" + (status / "environ").read_bytes():
                return int(status.name)
        except OSError:
            continue  # ended meanwhile
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_rank_1_killed_at_random_steps_and_started_again_changes_nothing(
    strategy: str, near: Place, tmp_path: Path, torchrun: None
) -> None:
    """torchrun ends the others and starts all anew; they go on from the last checkpoint."""
    how = (f"hardware.strategy={strategy}", TWO)
    other = Place(tmp_path / "other", near.cache, near.assets)
    assert other.program(*RUN, *how).wait().code == 0
    rng, killed, last = random.Random(3), 0, 0
    child = near.program(*RUN, *how)
    for _ in range(2):
        target = last + rng.randint(1, 3)
        if wait_for(lambda at=target: newest_step(near) >= at, child):
            last = newest_step(near)
            if pid := second_process(child):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    ended = child.wait()
    assert ended.code == 0, ended
    assert killed == 2 and ended.err.count("exitcode: -9") == 2
    assert weights(run_dir(near)) == weights(run_dir(other))
    assert curve(run_dir(near)) == curve(run_dir(other))

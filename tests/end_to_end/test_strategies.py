"""DDP, ZeRO-3 and FSDP2 by the real command: plain training's model, through stops and kills."""

import csv
import random
import signal
import sys
from pathlib import Path

import pytest
from end_to_end.rank_killing import EXACT, RUN, TWO, RankKills, command, killed_ranks, run_dir
from end_to_end.tiny_chat import ChatRun, dpo
from end_to_end.tiny_run import Place, checkpoints, curve, wait_for, weights
from safetensors.torch import load_file

SECONDS = 12.0
"""About what a run under torchrun takes; moments are drawn from it."""


@pytest.fixture(scope="module")
def plain(shared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    place = Place(tmp_path_factory.mktemp("plain"), shared.cache, shared.assets)
    ended = place.program(*RUN).wait()
    assert ended.code == 0, ended
    return run_dir(place)


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(other, marks=pytest.mark.slow) for other in ("zero3", "fsdp2"))],
)
def test_a_run_whose_rank_1_was_killed_ends_with_plain_training_s_model(
    strategy: str, near: Place, plain: Path
) -> None:
    plan = RankKills(1, rank=1, rng=random.Random(4), moments=("steps",))
    outcome = killed_ranks(strategy, near, plan, reference=plain, seconds=SECONDS)
    assert len(outcome.kills) == 1 and outcome.attempts == 2
    assert "step-" in outcome.kills[0].checkpoint  # there was something to go on from
    assert_same_model(run_dir(near), plain)
    assert len(curve(run_dir(near))) == len(curve(plain))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), ("zero3", 1), ("fsdp2", 1), ("ddp", 0)])
def test_a_rank_killed_at_random_steps_and_started_again_changes_nothing(
    strategy: str, rank: int, near: Place, tmp_path: Path
) -> None:
    """torchrun ends the others and starts all anew; they go on from the last checkpoint."""
    other = Place(tmp_path / "other", near.cache, near.assets)
    assert other.program(*command(strategy)).wait().code == 0
    plan = RankKills(2, rank=rank, rng=random.Random(3), moments=("steps", "save"))
    outcome = killed_ranks(strategy, near, plan, reference=run_dir(other), seconds=SECONDS)
    assert len(outcome.kills) == 2 and outcome.attempts == 3
    assert outcome.equal_weights and outcome.equal_curve

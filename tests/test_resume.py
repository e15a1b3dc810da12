"""A run that was killed or stopped ends like one that was not."""

import errno
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from torch import Tensor
from toy_training import (
    NUM_STEPS,
    SendSignal,
    Toy,
    equal,
    exit_code,
    rows_without_clock,
    start,
    train,
    train_and_signal,
    train_slowly,
    wait_for_newer,
    weights,
)

from mediphi.checkpointing import (
    PeriodicCheckpoint,
    StopOnSignal,
    last_checkpoint,
    step_of,
)
from mediphi.checkpointing.periodic import rng_states, set_rng_states
from mediphi.checkpointing.safe_io import checkpoints_in
from mediphi.errors import Interrupted
from mediphi.interruption import interruptible
from mediphi.tracking.progress import silence_lightning


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return run_dir, weights(train(run_dir))


# --- resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, NUM_STEPS))
def test_resuming_from_any_step_gives_the_same_weights_and_rows(
    step: int, undisturbed: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    run_dir, final = undisturbed
    _copy_up_to(run_dir, tmp_path, step)
    assert equal(weights(train(tmp_path)), final)
    assert rows_without_clock(tmp_path) == rows_without_clock(run_dir)


def test_without_the_random_states_resume_differs(
    undisturbed: tuple[Path, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, final = undisturbed
    _copy_up_to(run_dir, tmp_path, 4)
    monkeypatch.setattr(PeriodicCheckpoint, "load_state_dict", lambda self, state: None)
    assert not equal(weights(train(tmp_path)), final)


def _copy_up_to(source: Path, target: Path, step: int) -> None:
    """A run directory as a kill right after the save of `step` leaves it, rows ahead included."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for checkpoint in checkpoints_in(target / "checkpoints" / "phase1"):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    with (target / "metrics.csv").open("a") as file:
        file.write("17,phase1,0.3")  # torn


def test_random_states_are_restored_bitwise(tmp_path: Path) -> None:
    path = tmp_path / "states.pt"
    torch.save(rng_states(), path)
    expected = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    set_rng_states(torch.load(path, weights_only=True))
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == expected


def test_on_another_number_of_processes_noise_is_drawn_anew(tmp_path: Path) -> None:
    drawn = []
    for step, rank in ((3, 0), (3, 1), (4, 0), (3, 0)):
        checkpoint = PeriodicCheckpoint(tmp_path, every_steps=1, keep=1)
        checkpoint.load_state_dict({"rng": [rng_states(), rng_states()]})
        trainer: Any = SimpleNamespace(world_size=3, global_step=step, global_rank=rank)
        checkpoint.on_train_start(trainer, Toy())
        drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


@pytest.fixture(scope="module")
def warm() -> None:
    """Start the server from which the children fork, so that a kill hits their work."""
    assert exit_code(start(silence_lightning)) == 0


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_steps_change_neither_weights_nor_rows(
    kills: int, undisturbed: tuple[Path, list[Tensor]], tmp_path: Path, warm: None
) -> None:
    rng, killed = random.Random(1), 0
    for lives in range(kills):
        run_dir = tmp_path / str(lives // 4)  # four kills, then to the end
        folder = run_dir / "checkpoints" / "phase1"
        newest = max(map(step_of, checkpoints_in(folder)), default=0)
        process = start(train_slowly, str(run_dir))
        wait_for_newer(folder, newest, process)
        code = exit_code(process, rng.random() * 0.02)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if lives % 4 == 3:
            assert equal(weights(train(run_dir)), undisturbed[1])
            assert rows_without_clock(run_dir) == rows_without_clock(undisturbed[0])
    assert killed >= kills // 2


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [3, 4, NUM_STEPS])
def test_signal_saves_the_step_and_leaves_with_its_code(
    number: int, code: int, step: int, undisturbed: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as caught:
        train(
            tmp_path,
            callbacks=lambda c: [SendSignal(number, step=step), StopOnSignal(c)],
            every_steps=100,
            rows_every=1,
        )
    assert caught.value.code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    found = last_checkpoint(tmp_path / "checkpoints" / "phase1")
    assert found is not None and step_of(found) == step
    assert equal(weights(train(tmp_path)), undisturbed[1])
    assert rows_without_clock(tmp_path) == rows_without_clock(undisturbed[0])


@pytest.mark.parametrize(("times", "saved"), [(1, True), (2, False)])
def test_process_exits_143_and_a_second_sigterm_ends_it_at_once(
    times: int, saved: bool, tmp_path: Path, warm: None
) -> None:
    assert exit_code(start(train_and_signal, str(tmp_path), signal.SIGTERM, times)) == 143
    assert bool(checkpoints_in(tmp_path / "checkpoints" / "phase1")) is saved


@pytest.fixture
def slurm_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Slurm job, in which a signal may leave this process deaf."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("step", [3, 4, NUM_STEPS])
def test_in_a_slurm_job_no_further_sigterm_ends_the_save(
    step: int, slurm_job: None, tmp_path: Path
) -> None:
    sender = SendSignal(signal.SIGTERM, step=step, times=3, also_in_saves=True)
    with pytest.raises(Interrupted) as caught, interruptible():
        train(tmp_path, callbacks=lambda c: [sender, StopOnSignal(c)], every_steps=100)
    assert caught.value.code == 143
    found = last_checkpoint(tmp_path / "checkpoints" / "phase1")
    assert found is not None and step_of(found) == step


class FullDisk(Callback):
    """No save succeeds."""

    def state_dict(self) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_save_that_fails_in_stopping_is_an_error_and_no_stop(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sender = SendSignal(signal.SIGTERM, step=3)
    with pytest.raises(OSError, match="No space left"), interruptible():
        train(tmp_path, callbacks=lambda c: [sender, FullDisk(), StopOnSignal(c)])
    assert signal.getsignal(signal.SIGTERM) is before

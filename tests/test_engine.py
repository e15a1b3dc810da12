"""What `hardware` comes down to, and how many processes there are."""

import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composing import composed
from lightning import Callback, LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from mediphi import engine, launch
from mediphi.checkpointing import SafeCheckpointIO
from mediphi.config import Config, load
from mediphi.config.schema import Hardware
from mediphi.errors import Interrupted, MachineError, UserError
from mediphi.interruption import interruptible
from mediphi.process_group import join_processes, wait_for_all
from mediphi.run import run
from mediphi.tracking.progress import silence_lightning


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpus: int, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    properties = SimpleNamespace(total_memory=85_029_158_912, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


# --- resolve


def test_without_a_gpu_everything_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, gpus=0)
    device = engine.resolve(Hardware())
    assert (device.type, device.kernel) == ("cpu", "sdpa")
    assert device.precision in ("32-true", "bf16-mixed") and device.memory_bytes is None


def test_a_gpu_is_taken_unless_the_config_says_cpu(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, gpus=2)
    device = engine.resolve(Hardware(devices=2))
    assert (device.type, device.precision) == ("cuda", "bf16-mixed")
    assert device.kernel in ("flash", "varlen") and device.memory_bytes == 85_029_158_912
    assert engine.resolve(Hardware(accelerator="cpu")).type == "cpu"
    assert engine.resolve(Hardware(precision="32-true")).precision == "32-true"


def test_an_old_gpu_trains_in_float32(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, gpus=1, bf16=False)
    old = engine.resolve(Hardware())
    assert (old.precision, old.kernel) == ("32-true", "sdpa")


@pytest.mark.parametrize(
    ("gpus", "wanted", "message"),
    [
        (0, {"accelerator": "gpu"}, "hardware.accelerator=gpu.*use hardware=cpu"),
        (1, {"devices": 2}, "hardware.devices=2.*sees 1"),
        (0, {"attention": "varlen"}, "hardware.attention=varlen cannot run on this cpu"),
        (1, {"attention": "varlen"}, "hardware.attention=varlen computes in half precision"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, gpus: int, wanted: dict[str, Any], message: str
):
    pretend(monkeypatch, gpus=gpus, bf16=False)
    with pytest.raises(UserError, match=message) as error:
        engine.resolve(Hardware(**wanted))
    assert "\n" not in str(error.value)


def test_the_peak_rate_is_the_data_sheets_or_measured():
    h100 = engine.Device("cuda", "NVIDIA H100 80GB HBM3", "bf16-mixed", "varlen")
    assert engine.peak_flops(h100) == 989e12
    assert engine.peak_flops(replace(h100, precision="32-true")) == 67e12
    cpu = engine.Device("cpu", "2-core CPU", "32-true", "sdpa")
    assert 1e8 < engine.peak_flops(cpu) < 1e15


# --- trainer


def trainer(hardware: Hardware) -> Any:
    device = engine.Device("cpu", "test", "32-true", "sdpa")
    return engine.make_trainer(
        hardware,
        device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[],
        loggers=[],
        loop={"max_steps": 1, "accumulate_grad_batches": 3},
    )


def test_one_device_needs_no_process_group_and_several_keep_their_own_meters():
    assert isinstance(trainer(Hardware(accelerator="cpu")).strategy, SingleDeviceStrategy)
    strategy = trainer(Hardware(accelerator="cpu", devices=2)).strategy
    assert isinstance(strategy, DDPStrategy)
    # the default copies rank 0's buffers, meters among them, over everyone's at every step
    assert strategy._ddp_kwargs["broadcast_buffers"] is False


def test_the_trainer_writes_checkpoints_our_way_and_nothing_by_itself(tmp_path: Path):
    made = trainer(Hardware(accelerator="cpu"))
    assert isinstance(made.strategy.checkpoint_io, SafeCheckpointIO)
    assert made.checkpoint_callbacks == [] and made.loggers == []
    assert made.accumulate_grad_batches == 3


def test_a_cpu_run_beside_a_gpu_is_told_nothing(monkeypatch: pytest.MonkeyPatch):
    """Lightning would advise the GPU that the config does not want, in every run."""
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="GPU available but not used"):
            trainer(Hardware(accelerator="cpu"))
        silence_lightning()
        trainer(Hardware(accelerator="cpu"))


def test_a_signal_while_validating_is_not_lost():
    """Lightning's own handler would only note it, and end with exit code 0."""
    made = trainer(Hardware(accelerator="cpu"))
    made.callbacks.append(SendSignal())
    with pytest.raises(Interrupted) as caught, interruptible():
        made.validate(Nothing(), DataLoader([1, 2, 3]), verbose=False)
    assert caught.value.code == 143


class SendSignal(Callback):
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        signal.raise_signal(signal.SIGTERM)


class Nothing(LightningModule):
    def validation_step(self, batch: Any) -> None:
        return None


def test_a_full_device_memory_names_what_to_lower():
    hardware = Hardware(micro_batch=4)
    message = "micro_batch.*it is 4.*hardware.activation_checkpointing=true"
    with pytest.raises(MachineError, match=message) as error, engine.failing_alone(hardware):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_threads_are_limited_only_when_asked():
    before = torch.get_num_threads()
    try:
        engine.limit_threads(Hardware())
        assert torch.get_num_threads() == before
        engine.limit_threads(Hardware(num_threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_alone_there_is_nothing_to_join_or_wait_for():
    join_processes(Hardware())
    wait_for_all()
    assert not torch.distributed.is_initialized()


# --- launch


def config(*overrides: str) -> Config:
    return load(composed("stage=pit", "corpus=medcode", "stage.global_batch=8", *overrides))


TWO = ("hardware=cpu", "hardware.devices=2", "hardware.micro_batch=1")


def test_several_devices_need_processes_once(monkeypatch: pytest.MonkeyPatch):
    assert not launch.needs_processes(config("hardware=cpu", "hardware.micro_batch=1"))
    assert launch.needs_processes(config(*TWO))
    assert not launch.needs_processes(config(*TWO, "check_only=true"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.needs_processes(config(*TWO))


@pytest.mark.parametrize("started", ["1", "3"])
def test_another_number_of_processes_than_configured_is_refused(
    monkeypatch: pytest.MonkeyPatch, started: str
):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(UserError, match=f"{started} processes were started.*= 2") as error:
        launch.needs_processes(config(*TWO))
    assert "\n" not in str(error.value)


def test_several_nodes_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch):
    nodes = config(*TWO, "hardware.num_nodes=2")
    with pytest.raises(UserError, match="torchrun --nnodes 2 --nproc-per-node 2"):
        launch.needs_processes(nodes)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not launch.needs_processes(nodes)


def test_a_plan_for_several_nodes_needs_no_other_process():
    nodes = config(*TWO, "hardware.num_nodes=2", "check_only=true")
    assert not launch.needs_processes(nodes)


def test_the_rank_is_the_starters_and_never_slurms(monkeypatch: pytest.MonkeyPatch):
    """Who is not rank 0 takes no lock, and a task of Slurm alone trains into the same folder."""
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert launch.rank() == 0
    monkeypatch.setenv("RANK", "1")
    assert launch.rank() == 1


ONCE = (
    ["hardware=cpu"],
    ["hardware=cpu", "check_only=true"],
    ["hardware=cpu", "stage=doctor"],
    ["hardware=cpu", "hardware.slurm.hours=2"],
    TWO,
)


@pytest.mark.parametrize("overrides", ONCE, ids=" ".join)
def test_several_tasks_of_srun_are_refused_and_write_nothing(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"hardware=slurm_.*torchrun") as error:
        run(load(composed("corpus=medcode", *overrides)))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


SHELL = {"SLURM_NTASKS": "4"}  # of `salloc -n 4`, or a batch file
ALONE = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}  # srun -n 1 --pty
TASK = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
"""The second of two tasks of srun; each runs torchrun in these."""


@pytest.mark.parametrize(
    ("around", "rank", "starts"),
    [
        ({}, 0, True),
        (SHELL, 0, True),
        (ALONE, 0, True),
        (TASK | {"WORLD_SIZE": "2", "RANK": "0"}, 0, False),
        (TASK | {"WORLD_SIZE": "2", "RANK": "1"}, 1, False),
    ],
    ids=str,
)
def test_one_process_in_an_allocation_and_torchruns_ranks_pass(
    around: dict[str, str], rank: int, starts: bool, monkeypatch: pytest.MonkeyPatch
):
    """One process starts the ranks of its devices; torchrun's are the ranks themselves."""
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    launch.refuse_several_tasks()
    assert launch.rank() == rank
    assert launch.needs_processes(config(*TWO)) is starts
    if starts:
        assert not launch.needs_processes(config("hardware=cpu"))


@pytest.mark.parametrize("gpus", [0, 2])
def test_without_enough_gpus_no_process_is_started(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretend(monkeypatch, gpus=gpus)
    program = tmp_path / "program.py"
    program.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    monkeypatch.setattr("sys.argv", [str(program)])
    with pytest.raises(UserError, match=f"hardware.devices=8 .*torch sees {gpus} GPUs") as error:
        launch.run_in_processes(config("hardware=gpu8_ddp"))
    assert "\n" not in str(error.value) and not (tmp_path / "started").exists()
    pretend(monkeypatch, gpus=8)
    with pytest.raises(SystemExit) as ended:
        launch.run_in_processes(config("hardware=gpu8_ddp"))
    assert ended.value.code == 0 and (tmp_path / "started").exists()


PARENT = """
import sys
from mediphi.config.schema import Hardware
from mediphi.launch import refuse_missing_gpus
refuse_missing_gpus(Hardware(accelerator="cpu", devices=2))
raise SystemExit("torch" in sys.modules)
"""


def test_a_parent_on_a_cpu_does_without_torch():
    assert subprocess.run([sys.executable, "-c", PARENT], check=False).returncode == 0

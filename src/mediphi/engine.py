"""Hardware config -> Lightning Trainer. Speed and memory are decided here, never the result."""

import atexit
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import Strategy

from mediphi.attention import Kernel, choose_kernel
from mediphi.config.schema import GpuName, Hardware
from mediphi.errors import MachineError, UserError
from mediphi.process_group import is_one_of_several
from mediphi.strategies.whole import Ddp, OneDevice


class Gpu(NamedTuple):
    """A vendor's data sheet.

    Attributes:
        memory: bytes.
        bf16_flops: dense bfloat16 FLOP/s.
        float32_flops: FLOP/s in float32, which PyTorch does not round to TF32.
        bandwidth: bytes a second of its memory.
        pcie: bytes a second to the machine, each way.
        nvlink: bytes a second to the GPUs beside it, each way; 0: over PCIe.
    """

    memory: float
    bf16_flops: float
    float32_flops: float
    bandwidth: float
    pcie: float
    nvlink: float = 0.0

    def flops(self, precision: str) -> float:
        """FLOP/s of matrix products under `hardware.precision`."""
        return self.bf16_flops if precision == "bf16-mixed" else self.float32_flops


GPUS: dict[GpuName, Gpu] = {
    "H200": Gpu(141e9, 989e12, 67e12, 4.8e12, pcie=64e9, nvlink=450e9),
    "H100": Gpu(80e9, 989e12, 67e12, 3.35e12, pcie=64e9, nvlink=450e9),
    "A100 80GB": Gpu(80e9, 312e12, 19.5e12, 2.0e12, pcie=32e9, nvlink=300e9),
    "A100": Gpu(40e9, 312e12, 19.5e12, 1.56e12, pcie=32e9, nvlink=300e9),
    "L40S": Gpu(48e9, 362e12, 91.6e12, 0.86e12, pcie=32e9),
    "A10": Gpu(24e9, 125e12, 31.2e12, 0.6e12, pcie=32e9),
    "RTX 4090": Gpu(24e9, 165e12, 82.6e12, 1.01e12, pcie=32e9),
}
"""The words of a device's name that tell it -> its numbers, SXM modules' where there are such; the
first that fits counts."""
OTHER_BOARDS = ("PCIe", "PCIE", "NVL")
"""Words of boards that have the chip of a module, and neither its speed nor its links."""

LOSS_CHUNK_TOKENS = {"cuda": 2048, "cpu": 128}
"""Large products keep a GPU busy; few logits stay in a CPU's cache."""


@dataclass(frozen=True, slots=True)
class Device:
    """What `hardware` came down to on this machine; `memory_bytes` of a GPU.

    `is_here`: False of one that a run is only planned for.
    """

    type: str
    name: str
    precision: str
    kernel: Kernel
    loss_chunk_tokens: int = 128
    memory_bytes: float | None = None
    is_here: bool = True


def resolve(hardware: Hardware, *, shares_prompts: bool = False, planning: bool = False) -> Device:
    """Choose accelerator, precision and attention kernel by what this machine can do.

    Args:
        planning: devices that are not here may be asked for, by `hardware.planned_gpu`.

    Raises:
        UserError: asked for what is not there.
    """
    cuda = torch.cuda.is_available()
    if planning and _is_elsewhere(hardware, cuda=cuda):
        return _absent(hardware, shares_prompts=shares_prompts)
    if hardware.accelerator == "gpu" and not cuda:
        raise UserError("hardware.accelerator=gpu, but torch sees no CUDA device: use hardware=cpu")
    on_gpu = cuda and hardware.accelerator != "cpu"
    if on_gpu and hardware.devices > torch.cuda.device_count() and not planning:
        raise UserError(
            f"hardware.devices={hardware.devices}, but torch sees {torch.cuda.device_count()}"
        )
    kind = "cuda" if on_gpu else "cpu"
    name = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()}-core CPU"
    memory = torch.cuda.get_device_properties().total_memory if on_gpu else None
    precision = _precision(hardware.precision, on_gpu)
    return Device(
        type=kind,
        name=name,
        precision=precision,
        kernel=choose_kernel(
            hardware.attention,
            device_type=kind,
            shares_prompts=shares_prompts,
            half=precision != "32-true",
        ),
        loss_chunk_tokens=hardware.loss_chunk_tokens or LOSS_CHUNK_TOKENS[kind],
        memory_bytes=memory,
    )


def _is_elsewhere(hardware: Hardware, *, cuda: bool) -> bool:
    """Whether the GPU that is planned for is another one than this machine's."""
    if hardware.planned_gpu is None:
        return hardware.accelerator == "gpu" and not cuda
    return not cuda or data_sheet(torch.cuda.get_device_name()) != GPUS[hardware.planned_gpu]


def _absent(hardware: Hardware, *, shares_prompts: bool) -> Device:
    """A GPU that a run is planned for on a machine that has none, or another one."""
    if hardware.planned_gpu is None:
        raise UserError(
            "hardware.planned_gpu=null: no GPU here to plan for; name one of "
            f"{', '.join(GPUS)}, as in hardware.planned_gpu={next(iter(GPUS))}"
        )
    precision = "bf16-mixed" if hardware.precision == "auto" else hardware.precision
    return Device(
        type="cuda",
        name=hardware.planned_gpu,
        precision=precision,
        kernel=choose_kernel(
            hardware.attention,
            device_type="cuda",
            shares_prompts=shares_prompts,
            half=precision != "32-true",
            is_here=False,
        ),
        loss_chunk_tokens=hardware.loss_chunk_tokens or LOSS_CHUNK_TOKENS["cuda"],
        memory_bytes=GPUS[hardware.planned_gpu].memory,
        is_here=False,
    )


def make_trainer(
    hardware: Hardware,
    device: Device,
    *,
    checkpoint_io: CheckpointIO,
    callbacks: list[L.Callback],
    loggers: list[Logger],
    loop: dict[str, Any],
    strategy: Strategy | None = None,
) -> L.Trainer:
    """A Trainer for one phase; `loop` holds steps, accumulation, clipping and evaluation.

    `strategy`: in place of the one that `hardware` asks for.
    """
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=make_strategy(hardware, device) if strategy is None else strategy,
        precision=device.precision,  # type: ignore[arg-type]
        # Not guessed: Lightning would take a Slurm allocation around us for the starter.
        plugins=[
            checkpoint_io,
            TorchElasticEnvironment() if is_one_of_several() else LightningEnvironment(),
        ],
        callbacks=callbacks,
        logger=loggers,
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        inference_mode=False,  # compiled layers would have a form for it and one for `no_grad`
        default_root_dir=Path.cwd(),
        **loop,
    )
    # Its SIGTERM handler ends with exit code 0, and waits for the other ranks inside the handler.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def make_strategy(hardware: Hardware, device: Device) -> Strategy:
    """How the processes of `hardware` share a model.

    Raises:
        UserError: DeepSpeed is asked for and not installed.
    """
    if hardware.strategy == "zero3":
        from mediphi.strategies.zero3 import Zero3Strategy

        return Zero3Strategy(device_type=device.type, offload=hardware.offload)
    if hardware.strategy == "fsdp2":
        from mediphi.strategies.fsdp2 import Fsdp2Strategy

        return Fsdp2Strategy()
    if hardware.devices * hardware.num_nodes == 1:
        return OneDevice(torch.device("cuda", 0) if device.type == "cuda" else torch.device("cpu"))
    # Its successor `forward_sync_buffers` is not in every torch that we allow.
    warnings.filterwarnings("ignore", r".*`broadcast_buffers` is deprecated", FutureWarning)
    return Ddp()


@contextmanager
def failing_alone(hardware: Hardware) -> Iterator[None]:
    """A full device memory is told in one line; a failing rank waits for no other at its end.

    Raises:
        MachineError: out of device memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        atexit.unregister(dist.destroy_process_group)
        raise MachineError(
            f"out of device memory: lower hardware.micro_batch (it is {hardware.micro_batch}) or "
            "set hardware.activation_checkpointing=true "
            f"(it is {json.dumps(hardware.activation_checkpointing)})"
        ) from None
    except BaseException:
        atexit.unregister(dist.destroy_process_group)
        raise


def limit_threads(hardware: Hardware) -> None:
    """Threads of PyTorch's CPU kernels; busy machines want fewer than all cores."""
    if hardware.num_threads is not None:
        torch.set_num_threads(hardware.num_threads)


def training_flops(
    *,
    num_matmul_parameters: int,
    hidden: int,
    layers: int,
    pairs: int,
    tokens: int,
    num_frozen_parameters: int = 0,
) -> float:
    """Floating-point operations of forward and backward (Kaplan et al. 2020, eq. 2.2).

    Six per parameter in a matrix product and token, of `num_frozen_parameters` among them four:
    they have no gradient of their own. Attention by its true size: `pairs` counts the (query, key)
    pairs that causal attention really computes, 12 operations per layer and hidden unit each (two
    products, forward and twice backward).
    """
    per_token = 6.0 * num_matmul_parameters - 2.0 * num_frozen_parameters
    return per_token * tokens + 12.0 * layers * hidden * pairs


def peak_flops(device: Device) -> float:
    """Peak rate for MFU: the data sheet's on a known GPU, else a matrix product's here."""
    if device.type == "cuda":
        known = data_sheet(device.name)
        if known is not None:
            return known.flops(device.precision)
    dtype = torch.bfloat16 if device.precision == "bf16-mixed" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device.type) for _ in range(2))
    fastest = min(_timed_matmul(left, right) for _ in range(6))
    return 2.0 * size**3 / fastest


def data_sheet(name: str) -> Gpu | None:
    """Numbers of the GPU that a name, such as `NVIDIA H100 80GB HBM3`, belongs to, if any."""
    words = re.split(r"[\s-]", name)
    if any(word in words for word in OTHER_BOARDS):
        return None
    return next((gpu for key, gpu in GPUS.items() if all(w in words for w in key.split())), None)


def _timed_matmul(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    _ = left @ right
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _precision(wanted: str, on_gpu: bool) -> str:
    """`auto`: bf16 autocast where the chip has bf16 matrix units, else float32."""
    if wanted != "auto":
        return wanted
    if on_gpu:
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if capable else "32-true"

"""Devices, cores, memory: what the config wants, and what is here."""

import os
import shutil
import subprocess
from collections.abc import Iterator

from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.errors import UserError
from mediphi.resources import free_memory, num_cores

BUSY = 0.5
"""Share of the cores that others may use before it is worth a word."""
GB = 1e9
FLOAT32, TRAINED_BYTES = 4, 20
"""Of an offloaded weight; and of a trained one besides: gradient, its copy, master weight and two
moments, all in float32."""
MORE_MEMORY = (
    "more devices with hardware.strategy=zero3 or fsdp2, "
    "hardware.activation_checkpointing=true, a smaller hardware.micro_batch, "
    "or for SFT and DPO stage.lora.rank=16"
)


def device(case: Case) -> Iterator[Finding]:
    """Accelerator and precision; then a line for every GPU."""
    from mediphi import engine

    wanted = case.config.hardware
    here = case.device()
    try:
        engine.resolve(wanted)
    except UserError as error:
        remedy = "run it where the devices are, or take hardware=auto; the rest is looked at here"
        yield failure("device", str(error), remedy=remedy)
    else:
        processes = f"{wanted.devices} x " if wanted.devices > 1 else ""
        yield ok("device", f"{processes}{here.name}, {here.precision}")
    if here.type == "cuda":
        yield from _gpus()
    elif wanted.accelerator != "cpu" and (driver := _driver()):
        yield warning(
            "device",
            f"there is an NVIDIA driver ({driver}), but this PyTorch sees no GPU",
            remedy="install PyTorch's CUDA build for this driver (pytorch.org, Get started)",
        )


def _gpus() -> Iterator[Finding]:
    import torch

    cuda = f"CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        text = (
            f"{number}: {properties.name}, {free / GB:.0f} of {total / GB:.0f} GB free, compute "
            f"capability {properties.major}.{properties.minor}, {cuda}"
        )
        if not bf16:
            remedy = "hardware.precision=32-true, or a GPU of compute capability 8.0 or more"
            yield warning("gpu", f"{text}: no bf16", remedy=remedy)
        elif free < 0.9 * total:
            remedy = "nvidia-smi shows who uses it; end that, or choose by CUDA_VISIBLE_DEVICES"
            yield warning("gpu", f"{text}: in use by others", remedy=remedy)
        else:
            yield ok("gpu", f"{text}, bf16")


def _driver() -> str:
    """Version of NVIDIA's driver, empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def cores(case: Case) -> Iterator[Finding]:
    """Threads against the cores that we may really use, and who else uses them."""
    import torch

    usable, load = num_cores(), os.getloadavg()[0]
    hardware = case.config.hardware
    threads = hardware.num_threads or torch.get_num_threads()
    on_cpu = case.device().type == "cpu"
    if on_cpu and hardware.devices > 1 and not hardware.num_threads:
        threads = int(os.environ.get("OMP_NUM_THREADS", max(1, usable // hardware.devices)))
    total = threads * (hardware.devices if on_cpu else 1)
    setting = os.environ.get("OMP_NUM_THREADS")
    noun = "thread" if total == 1 else "threads"
    text = f"{usable} usable, {total} {noun} (OMP_NUM_THREADS {setting or 'not set'})"
    remedy = f"hardware.num_threads={max(1, usable // (hardware.devices if on_cpu else 1))}"
    if total > usable:
        yield warning("cores", f"{text}: they would wait for one another", remedy=remedy)
    elif load > BUSY * usable and total > 1:
        text = f"{text}, but others are at work (load {load:.1f})"
        yield warning("cores", text, remedy="hardware.num_threads=1 while they are")
    else:
        yield ok("cores", text)


def memory(case: Case) -> Iterator[Finding]:
    """What training all parameters takes, against what is free where it would be."""
    import torch

    here, hardware = case.device(), case.config.hardware
    on_gpu = here.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory()
    place = "GPU" if on_gpu else "main"
    wanted = case.budget().memory_bytes
    needed = wanted if on_gpu else wanted * hardware.devices
    text = (
        f"{free / GB:.1f} GB of {place} memory free; full-parameter training of "
        f"{case.budget().num_parameters:,} parameters takes about {needed / GB:.1f} GB"
    )
    if needed < free:
        yield ok("memory", text)
    else:
        yield warning("memory", text, remedy=MORE_MEMORY)
    if on_gpu and hardware.offload:
        yield _offloaded(case)


def _offloaded(case: Case) -> Finding:
    """What ZeRO-3 keeps in this machine's memory, of all its processes."""
    share = case.config.hardware.devices / case.config.world_size
    budget, free = case.budget(), free_memory()
    needed = (FLOAT32 * budget.num_parameters + TRAINED_BYTES * budget.num_trained) * share
    text = f"{free / GB:.1f} GB of main memory free; what is offloaded takes {needed / GB:.1f} GB"
    if needed < free:
        return ok("memory", text)
    remedy = "more machines (hardware.num_nodes), or for SFT and DPO stage.lora.rank=16"
    return warning("memory", text, remedy=remedy)

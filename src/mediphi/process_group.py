"""How the processes of one run find one another; needs PyTorch alone, so that it starts quickly."""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from mediphi.config.schema import Hardware

LONGEST_WAIT = timedelta(days=7)
"""Ranks wait for rank 0 while it tokenises or asks the quiz; the launcher sees who dies."""


def is_one_of_several() -> bool:
    return "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def join_processes(hardware: Hardware) -> None:
    """Join the process group of all ranks, so that they can wait for one another."""
    if not is_one_of_several() or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available() and hardware.accelerator != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_store(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=LONGEST_WAIT,
    )
    atexit.register(dist.destroy_process_group)


def _store() -> dist.Store:
    """Where ranks find one another.

    torchrun keeps one over its restarts, without telling them apart: a rank would read where
    another listened before it was killed, and wait there for ever.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=LONGEST_WAIT))
    return dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

"""How the processes of one run find one another, and what they do together.

Needs PyTorch alone, so that it starts quickly. Before there is a group, `launch.rank` knows who one
is, from the environment and without PyTorch.
"""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mediphi.config.schema import Hardware

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(days=7)
"""Ranks wait for rank 0 while it tokenises or asks the quiz; the launcher sees who dies."""


def is_one_of_several() -> bool:
    return "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def join_processes(hardware: Hardware) -> None:
    """Join the process group of all ranks, so that they can wait for one another."""
    if not is_one_of_several() or is_distributed():
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


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """Whether this is the rank that speaks for all; also where there is one alone."""
    return not is_distributed() or dist.get_rank() == 0


def wait_for_all() -> None:
    """A barrier over all ranks; nothing where there is one."""
    if is_distributed():
        dist.barrier()


def from_all_ranks(mine: Value) -> list[Value]:
    """What every rank has, in their order."""
    if not is_distributed():
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def largest_of_all_ranks(mine: Tensor) -> Tensor:
    """`mine`, changed in place to the largest of all ranks; with NCCL the host does not wait."""
    if is_distributed():
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return mine


def from_rank_zero(mine: Value) -> Value:
    """What rank 0 has, on every rank."""
    return from_all_ranks(mine)[0]


def together(action: Callable[[], Value]) -> list[Value]:
    """Every rank's result, in their order, on every rank; none waits for one that has failed.

    Raises:
        OSError: of the first rank whose action raised one; all ranks raise it.
    """
    if not is_distributed():
        return [action()]
    mine: tuple[Value | None, OSError | None]
    try:
        mine = action(), None
    except OSError as error:
        mine = None, OSError(error.errno, error.strerror)
    found = from_all_ranks(mine)
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]  # type: ignore[misc]

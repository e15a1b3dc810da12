"""What all ranks of a run do together, so that none waits for one that has failed."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """Whether this is the rank that speaks for all; also where there is one alone."""
    return not is_distributed() or dist.get_rank() == 0


def together(action: Callable[[], Result]) -> list[Result]:
    """Every rank's result, in their order, on every rank.

    Raises:
        OSError: of the first rank whose action raised one; all ranks raise it.
    """
    if not is_distributed():
        return [action()]
    mine: tuple[Result | None, OSError | None]
    try:
        mine = action(), None
    except OSError as error:
        mine = None, OSError(error.errno, error.strerror)
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]  # type: ignore[misc]

"""One of several processes that sum their numbers: `python -m mediphi.doctor.all_reduce cpu`."""

import sys
from typing import Literal

import torch
import torch.distributed as dist

from mediphi.config.schema import Hardware
from mediphi.process_group import join_processes


def main(accelerator: Literal["cpu", "gpu"]) -> None:
    """Join as a training's rank does, and check the sum.

    Raises:
        SystemExit: with words, where the sum is wrong.
    """
    join_processes(Hardware(accelerator=accelerator))
    device = "cuda" if accelerator == "gpu" else "cpu"
    mine = torch.full((1000,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(mine)
    right = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    if not bool((mine == right).all()):
        raise SystemExit(f"the sum is {mine[0].item():g} and should be {right:g}")


if __name__ == "__main__":
    main("gpu" if sys.argv[1:] == ["gpu"] else "cpu")

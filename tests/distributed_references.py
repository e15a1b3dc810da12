"""One of several ranks that bring the reference's numbers, in a process of its own."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from small_runs import first_backbone, set_up

from mediphi.config.schema import Hardware
from mediphi.process_group import join_processes
from mediphi.references import bring_references


def bring(rank: int, port: int, *, folder: Path, model: Path, out: Path) -> None:
    """Join the other rank, bring the numbers, save them as `out/rank<rank>.pt`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"GROUP_RANK": 0, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in place.items()}}
    join_processes(Hardware(accelerator="cpu", devices=2))
    run = set_up(folder, "dpo", "hardware.devices=2", model=model)
    plan = run.phases[0]
    bring_references(run, plan, first_backbone(run))
    references = plan.data.references
    assert references is not None
    mine = {side: torch.from_numpy(own) for side, own in references._asdict().items()}
    torch.save(mine, out / f"rank{rank}.pt")
    dist.barrier()

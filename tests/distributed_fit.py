"""One rank of a DDP fit, started by torchrun: `distributed_fit.py model cache out [max_rows]`."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback
from small_training import fit, unequal_store

from mediphi.config.schema import Hardware
from mediphi.launch import rank
from mediphi.process_group import join_processes


class SaveMeters(Callback):
    """What a checkpoint at the end would hold of the meters."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        checkpoint = {"state_dict": pl_module.state_dict()}
        pl_module.on_save_checkpoint(checkpoint)
        self.saved = {n: t for n, t in checkpoint["state_dict"].items() if "train_meter" in n}


def main(folder: str, cache: str, out: str, max_rows: str = "20") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join_processes(Hardware(accelerator="cpu", devices=2))
    store = unequal_store(Path(cache))
    settings = {"world_size": 2, "max_steps": None, "max_rows": int(max_rows)}
    meters = SaveMeters()
    run = fit(Path(folder), store, settings=settings, heldout=store, callbacks=[meters])
    mine = {"weights": run.weights, "train": run.train, "heldout": run.heldout[0]}
    mine |= {"saved": meters.saved, "noise": torch.initial_seed()}
    torch.save(mine, Path(out) / f"rank{rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

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


class CountBuckets(Callback):
    """In how many tensors gradients lie, after backward and at the start of the next step."""

    def __init__(self) -> None:
        self.counts: set[tuple[int, int]] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._count(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step:
            self._count(pl_module)

    def _count(self, module: Any) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        kept = {p.grad.untyped_storage().data_ptr() for p in trained if p.grad is not None}
        self.counts.add((len(kept), len(trained)))


def main(folder: str, cache: str, out: str, max_rows: str = "20") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join_processes(Hardware(accelerator="cpu", devices=2))
    store = unequal_store(Path(cache))
    settings = {"world_size": 2, "max_steps": None, "max_rows": int(max_rows)}
    meters, buckets = SaveMeters(), CountBuckets()
    run = fit(Path(folder), store, settings=settings, heldout=store, callbacks=[meters, buckets])
    mine = {"weights": run.weights, "train": run.train, "heldout": run.heldout[0]}
    mine |= {"saved": meters.saved, "noise": torch.initial_seed()}
    mine["buckets"] = sorted(buckets.counts)
    torch.save(mine, Path(out) / f"rank{rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

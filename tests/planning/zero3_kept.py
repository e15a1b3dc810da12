"""What DeepSpeed keeps of a model under ZeRO-3: `zero3_kept.py place` leaves `kept.json`.

DeepSpeed changes the process that it runs in, so it gets one of its own.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from small_models import write_small_folder
from small_training import fit, spec_of, unequal_store

from mediphi.strategies.zero3 import Zero3Strategy


class Look(Callback):
    """Bytes of distinct storages by what they are for, after an optimizer step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        linear = pl_module.backbone.get_decoder().layers[0].mlp.down_proj
        linear.register_forward_pre_hook(lambda layer, _: self._see(layer.weight))

    def _see(self, weight: Any) -> None:
        self.gathered = [str(weight.dtype), str(weight.comm_dtype), weight.numel()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            return  # no moments yet
        zero = trainer.strategy.deepspeed_engine.optimizer
        flat = zero.fp32_partitioned_groups_flat
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.parameters = sum(p.ds_numel for p in trained)
        seen: set[int] = set()
        self.kept = {
            "weights": _bytes([p.ds_tensor for p in trained], seen),
            "master copy": _bytes(flat, seen),
            "gradients": _bytes([zero.grad_partitions_flat_buffer], seen),
            "gradient copy": _bytes([f.grad for f in flat if f.grad is not None], seen),
            "moments": _bytes(
                [zero.state[f][key] for f in flat for key in ("exp_avg", "exp_avg_sq")], seen
            ),
        }


def _bytes(tensors: list[torch.Tensor], seen: set[int]) -> int:
    """Of storages that were not seen before."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    new = {place: size for place, size in storages.items() if place not in seen}
    seen.update(new)
    return sum(new.values())


def main(place: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = write_small_folder(place / "model")
    found = {}
    for name in ("zero3", "zero3 offload"):
        look = Look()
        fit(
            model,
            unequal_store(place / "cache"),
            settings={"max_steps": 1},
            precision="bf16-mixed",
            backbone=spec_of(model),
            sgd=False,
            callbacks=[look],
            strategy=Zero3Strategy(device_type="cpu", offload="offload" in name, whole_numel=1),
        )
        kept = {use: size for use, size in look.kept.items() if size}
        found[name] = {"parameters": look.parameters, "kept": kept, "gathered": look.gathered}
    (place / "kept.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""ZeRO-3 in one process that nobody started for it: `zero3_alone.py place` leaves `alone.pt`.

DeepSpeed changes the process that it runs in, so it gets one of its own.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from small_training import fit, spec_of, unequal_store
from strategies.sharded_fit import run_case, run_predicted
from torch import nn

from mediphi.strategies.zero3 import Zero3Strategy


class LookInside(Callback):
    """What DeepSpeed has made of its config and of the model."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        engine = trainer.strategy.deepspeed_engine
        zero, names = engine.optimizer, {p: n for n, p in pl_module.backbone.named_parameters()}
        self.found = {
            "config": {
                "accumulation": engine.gradient_accumulation_steps(),
                "managed": engine.managed_gradient_accumulation(),
                "clipping": engine.gradient_clipping(),
                "stage": engine.zero_optimization_stage(),
                "whole_numel": engine.zero_param_persistence_threshold(),
                "autocast": engine.torch_autocast_enabled(),
                "timer": engine.tput_timer.config.enabled,
                "half": engine.bfloat16_enabled() or engine.fp16_enabled(),
            },
            "sent rounded": [n for p, n in names.items() if hasattr(p, "comm_dtype")],
            "reduced as": [str(dtype) for dtype in zero.ipg_buckets],
            "decay": {
                names[p]: zero.param_groups[number]["weight_decay"]
                for number, group in enumerate(zero.fp16_groups)
                for p in group
            },
            "held": {n: p.numel() for p, n in names.items()},
            "numel": {n: p.ds_numel for p, n in names.items()},
            "buffers": {n: str(b.dtype) for n, b in pl_module.backbone.named_buffers()},
            "linear is patched": nn.functional.linear is not LINEAR,
        }


LINEAR = nn.functional.linear


def main(place: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"imported early": "deepspeed" in sys.modules}
    environment, look = dict(os.environ), LookInside()
    fit(
        place / "tied",
        unequal_store(place / "cache"),
        settings={"max_steps": 1},
        sgd=False,
        precision="bf16-mixed",
        backbone=spec_of(place / "tied"),
        callbacks=[look],
        strategy=Zero3Strategy(device_type="cpu", whole_numel=1500),
    )
    found["inside"] = look.found
    found["environment"] = dict(os.environ) == environment
    found["linear"] = nn.functional.linear is LINEAR
    found["bf16"] = run_case(place, "bf16", strategy="zero3")
    found["saved"] = run_case(place, "saved", strategy="zero3")
    found["resumed"] = run_case(place, "resumed:zero3-1", strategy="zero3")
    found["offloaded"] = run_case(place, "saved", strategy="zero3_offload")
    found["predicted"] = run_predicted(place, strategy="zero3", processes=1)
    torch.save(found, place / "alone.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

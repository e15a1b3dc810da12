"""One rank of fits under a strategy, started by torchrun.

`sharded_fit.py strategy place case...` leaves `place/<strategy>-<processes>/<case>-<rank>.pt`. The
same `run_case` without a strategy is the plain fit to compare with.
"""

import os
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load_file, save_file
from small_models import write_small_folder
from small_training import (
    CPU,
    fit,
    make_dpo_module,
    make_module,
    pair_settings,
    random_pairs,
    spec_of,
    unequal_store,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mediphi.backbone import build_model
from mediphi.checkpointing import FiniteGuard, PeriodicCheckpoint, SafeCheckpointIO
from mediphi.config.schema import Hardware
from mediphi.config.stages import Lora
from mediphi.data.datamodule import PackedDataModule, References
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import once_through
from mediphi.engine import make_trainer
from mediphi.errors import UserError
from mediphi.modules.dpo import Objective
from mediphi.modules.language_model import LanguageModelModule
from mediphi.process_group import join_processes
from mediphi.strategies.whole import Ddp, OneDevice, WholeModel

TESTS = Path(__file__).parents[1]
PAIRS = [tuple(map(int, row)) for row in np.random.default_rng(2).integers(2, 12, (19, 3))]
MODELS: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": 4097},  # rows that two ranks cannot share evenly
    "tied": {"tie_word_embeddings": True},
    "deep": {"num_hidden_layers": 8, "intermediate_size": 1024},
}
PRETRAINED: dict[str, Any] = {"init": "pretrained"}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"spec": {"recomputed_layers": 99}},
    "tied": {"model": "tied", "spec": PRETRAINED, "clip": 0.5},
    "lora": {"spec": {**PRETRAINED, "lora": Lora(rank=4)}, "sgd": False, "clip": 0.5},
    "lora_bf16": {
        "spec": {**PRETRAINED, "lora": Lora(rank=4)},
        "sgd": False,
        "clip": 0.5,
        "precision": "bf16-mixed",
    },
    "dpo": {"spec": PRETRAINED, "sgd": False, "clip": 0.5, "make": make_dpo_module},
    "bf16": {"spec": PRETRAINED, "sgd": False, "clip": 0.5, "precision": "bf16-mixed"},
    "saved": {"spec": PRETRAINED, "sgd": False, "clip": 0.5},
    "resumed": {"spec": PRETRAINED, "sgd": False, "clip": 0.5},
}


def write_place(place: Path) -> Path:
    """Models with weights in several files, and what they are trained on."""
    for name, changes in MODELS.items():
        folder = write_small_folder(place / name, **changes)
        build_model(spec_of(folder)).save_pretrained(folder, max_shard_size="200KB")
    damage(place / "model", place / "damaged")
    unequal_store(place / "cache")
    random_pairs(place / "cache", PAIRS)
    return place


def damage(source: Path, target: Path) -> None:
    """A copy whose head ends in NaN."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][-1, -1] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})


def start(strategy: str, place: Path, cases: Sequence[str], *, processes: int) -> dict[str, Any]:
    """Every case's results, one a rank, from processes of their own."""
    paths = [str(TESTS), str(TESTS / "data"), os.environ.get("PYTHONPATH", "")]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *launch, __file__, strategy, str(place), *cases],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    out = place / f"{strategy}-{processes}"
    return {
        case: [
            torch.load(out / f"{case}-{rank}.pt", weights_only=True) for rank in range(processes)
        ]
        for case in cases
    }


def make_strategy(name: str) -> Strategy:
    if name == "one":
        return OneDevice("cpu")
    if name == "ddp":
        return Ddp()
    if name.startswith("zero3"):
        from mediphi.strategies.zero3 import Zero3Strategy

        # Small matrices stay whole, large ones are split: both ways of DeepSpeed.
        return Zero3Strategy(device_type="cpu", offload="offload" in name, whole_numel=1500)
    from mediphi.strategies.fsdp2 import Fsdp2Strategy

    return Fsdp2Strategy()


def run_case(
    place: Path, case: str, *, strategy: str | None = None, processes: int = 1
) -> dict[str, Any]:
    """Five steps with accumulation: weights, the norm of each step's gradient, metrics.

    `saved` also leaves checkpoints; `resumed:<strategy>-<processes>` goes on from those.
    """
    name, _, origin = case.partition(":")
    changes = dict(CASES[name])
    folder = place / changes.pop("model", "model")
    spec = replace(spec_of(folder), **changes.pop("spec"))
    norms, dtypes = Norms(), Dtypes()
    callbacks: list[Callback] = [norms, dtypes]
    if name == "sgd" and strategy:
        callbacks.append(LookFirst())
    if name in ("saved", "resumed"):
        saves = place / f"{strategy}-{processes}" / f"checkpoints-{case}"
        callbacks.append(PeriodicCheckpoint(saves, every_steps=2, keep=9))
    if origin:
        changes["checkpoint"] = place / origin / "checkpoints-saved" / "step-00000002"
    store = unequal_store(place / "cache")
    settings: Any = {"world_size": processes}
    if name == "dpo":
        store = random_pairs(place / "cache", PAIRS)
        settings = pair_settings(world_size=processes, max_steps=5)
        logps = -60 * np.random.default_rng(3).random((len(PAIRS), 2), dtype=np.float32)
        changes["references"] = References(train=logps, heldout=logps)
        changes["objective"] = Objective(beta=0.02, sft_weight=0.1)
    run = fit(
        folder,
        store,
        settings=settings,
        heldout=store,
        callbacks=callbacks,
        strategy=make_strategy(strategy) if strategy else None,
        backbone=spec,
        **changes,
    )
    return {
        "weights": run.weights,
        "norms": norms.found,
        "dtypes": dtypes.found,
        "train": run.train,
        "heldout": run.heldout[0],
    }


class Norms(Callback):
    """Norm of the gradient before clipping, of every optimizer step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.found.append(float(pl_module._grad_norm))


class Dtypes(Callback):
    """In which precision the modules of a forward pass see their weights."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found: dict[str, str] = {}
        decoder = pl_module.backbone.get_decoder()
        for name in ("layers.0.mlp.down_proj", "layers.0.input_layernorm", "embed_tokens"):
            decoder.get_submodule(name).register_forward_pre_hook(partial(self._see, name))

    def _see(self, name: str, module: Any, inputs: Any) -> None:
        weight = module.weight if hasattr(module, "weight") else module.base_layer.weight
        self.found[name.rpartition(".")[2]] = str(weight.dtype)


class LookFirst(Callback):
    """Before training, a validation step in inference mode, which Lightning uses on GPUs."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        batch = next(iter(trainer.datamodule.val_dataloader()))
        with torch.inference_mode():
            trainer.strategy.validation_step(batch, 0)


def run_predicted(place: Path, *, strategy: str | None, processes: int) -> Tensor:
    """Log-probabilities of both answers by row, `[rows, 2]`; NaN where another rank scores."""
    store = random_pairs(place / "cache", PAIRS)
    data = PackedDataModule(store, heldout=None, settings=pair_settings(world_size=processes))
    spec = replace(spec_of(place / "model"), **PRETRAINED)
    trainer = make_trainer(
        Hardware(accelerator="cpu", devices=processes),
        CPU,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[],
        loggers=[],
        loop={},
        strategy=make_strategy(strategy) if strategy else None,
    )
    pairs = once_through(store, data.settings)
    loader: Any = PackedLoader(pairs, rank=trainer.global_rank)
    shares: Any = trainer.predict(make_dpo_module(place / "model", data, backbone=spec), loader)
    found = torch.full((len(PAIRS), 2), torch.nan)
    for scored in shares:
        found[scored.document_index] = scored.logps
    return found


# --- what goes wrong


class Poisoned(LanguageModelModule):
    """The last rank's loss, or only its gradient or value, is not finite after the first step."""

    gradient_only = value_only = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 0 or self.global_rank < self.trainer.world_size - 1:
            return loss
        if self.gradient_only:
            loss.register_hook(lambda grad: grad * float("inf"))
            return loss
        return loss + float("nan") if self.value_only else loss * float("nan")


class PoisonedGradient(Poisoned):
    gradient_only = True


class PoisonedValue(Poisoned):
    """No gradient tells the other ranks."""

    value_only = True


class KeepWeights(Callback):
    """This rank's slices after the first step, and its documents in the second."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.rows += batch.document_index.tolist()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps = trainer.global_step
        if self.steps == 1:
            self.kept = own_weights(trainer.strategy)
            self.strategy = trainer.strategy


def own_weights(strategy: Any) -> dict[str, Tensor]:
    """Of a model that is not split also moments and step counts."""
    if isinstance(strategy, WholeModel):
        state = strategy.optimizers[0].state
        return {
            f"{name} {key}": tensor.detach().clone()
            for name, p in strategy._trained()
            for key, tensor in {"weight": p, **state[p]}.items()
        }
    return {s.name: s.tensors["weight"].clone() for s in strategy.local_slices()}


def run_poisoned(
    place: Path, *, kind: type[Poisoned] = Poisoned, strategy: str, processes: int
) -> Any:
    """What the guard says, and whether the weights are still those of the first step."""
    weights = KeepWeights()
    message = ""
    try:
        fit(
            place / "model",
            unequal_store(place / "cache"),
            settings={"world_size": processes},
            clip=0.5,
            callbacks=[weights, FiniteGuard(lambda row: f"row {row}")],
            strategy=make_strategy(strategy),
            make=lambda folder, data, **changes: make_module(folder, data, kind=kind, **changes),
        )
    except UserError as error:
        message = str(error)
    after = own_weights(weights.strategy)
    unchanged = all(torch.equal(after[name], kept) for name, kept in weights.kept.items())
    found = {"message": message, "unchanged": unchanged, "tensors": len(after)}
    return {**found, "rows": weights.rows, "steps": weights.steps}


def run_damaged(place: Path, *, strategy: str, processes: int) -> Any:
    """What building says to weights of which only the last rank reads the damaged part."""
    try:
        fit(
            place / "damaged",
            unequal_store(place / "cache"),
            settings={"world_size": processes},
            strategy=make_strategy(strategy),
            backbone=replace(spec_of(place / "damaged"), **PRETRAINED),
        )
    except UserError as error:
        return str(error)
    return ""


# --- memory


class LiveBytes(TorchDispatchMode):
    """Largest sum of the bytes of all tensors on the CPU that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or isinstance(tensor, DTensor):
            return  # a DTensor's own tensor is seen by itself
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live -= size


class Watched(LanguageModelModule):
    def configure_model(self) -> None:
        with LiveBytes() as live:
            super().configure_model()
        self.peak = live.peak


def run_memory(place: Path, *, strategy: str | None, processes: int) -> dict[str, int]:
    """Bytes alive at once while the model was built from files."""
    run = fit(
        place / "deep",
        unequal_store(place / "cache"),
        settings={"world_size": processes, "max_steps": 1},
        strategy=make_strategy(strategy) if strategy else None,
        backbone=replace(spec_of(place / "deep"), **PRETRAINED),
        make=lambda folder, data, **changes: make_module(folder, data, kind=Watched, **changes),
    )
    return {"peak": run.module.peak}


def main(strategy: str, place: str, *cases: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    join_processes(Hardware(accelerator="cpu", devices=processes))
    special = {
        "poisoned": run_poisoned,
        "poisoned_gradient": partial(run_poisoned, kind=PoisonedGradient),
        "poisoned_value": partial(run_poisoned, kind=PoisonedValue),
        "damaged": run_damaged,
        "memory": run_memory,
        "predicted": run_predicted,
    }
    out = Path(place) / f"{strategy}-{processes}"
    out.mkdir(exist_ok=True)
    for case in cases:
        run = special.get(case, partial(run_case, case=case))
        found = run(place=Path(place), strategy=strategy, processes=processes)
        torch.save(found, out / f"{case}-{dist.get_rank()}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

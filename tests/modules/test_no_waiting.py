"""A micro-batch never asks its device for a number: the host would wait for all queued work.

Proven on the meta device, whose numbers nobody can read. `tests/gpu` proves it on a GPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_small_folder
from small_training import (
    SETTINGS,
    make_dpo_module,
    make_module,
    pair_settings,
    random_pairs,
    spec_of,
    unequal_store,
)
from torch import Tensor

from mediphi import attention
from mediphi.batches import IGNORE, TokenBatch
from mediphi.budget import Budget
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.loader import PackedLoader

PAIRS = [(7, 3, 2), (4, 1, 5), (20, 9, 12), (3, 6, 1), (9, 4, 4)]
ROPES: dict[str, dict[str, Any]] = {"longrope": {}, "plain": {"rope_scaling": None}}
MICRO_BATCHES = 5
"""More than one optimizer step: the last one of the pairs has a filler."""


@pytest.fixture
def data(tmp_path: Path, request: pytest.FixtureRequest) -> PackedDataModule:
    if request.param == "text":
        settings, store = replace(SETTINGS, micro_batch=1), unequal_store(tmp_path)
    else:
        settings, store = pair_settings(request.param), random_pairs(tmp_path, PAIRS)
    return PackedDataModule(store, heldout=None, settings=settings)


def build(data: PackedDataModule, folder: Path, kernel: attention.Kernel) -> Any:
    """A module of the data's kind, on the meta device."""
    make = make_module if data.settings.layout == "text" else make_dpo_module
    noise = {"neftune_alpha": 5.0} if make is make_module else {}
    spec = replace(spec_of(folder), kernel=kernel)
    module: Any = make(folder, data, backbone=spec, **noise)
    module.configure_model()
    return module.to("meta")


@pytest.mark.parametrize("data", ["text", "pairs", "shared_pairs"], indirect=True)
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_step_reads_nothing_from_its_device(
    data: PackedDataModule,
    kernel: attention.Kernel,
    rope: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if rope == "longrope" and tuple(map(int, version("transformers").split(".")[:2])) < (5, 23):
        pytest.skip("before 5.23 transformers reads the largest position from the device")
    # The meta device knows no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    module = build(data, write_small_folder(tmp_path / "model", **ROPES[rope]), kernel)
    budget = Budget(module.backbone.config, 1, 1, 1, 0, torch.float32, 0)
    loader = PackedLoader(data.train_plan, group_names=data.group_names)
    for number in range(MICRO_BATCHES):
        batch = loader[number % len(loader)]
        flops = budget.batch_flops(batch)
        batch = batch.to("meta")
        module.training_step(batch, number).backward()
        assert budget.batch_flops(batch) == flops > 0
    module.configure_gradient_clipping(module.configure_optimizers(), 1.0)
    assert all(p.grad is not None for p in module.parameters())


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda ids: ids.max().item(),
    "int": lambda ids: int(ids.max()),
    "truth": lambda ids: bool((ids > 0).all()),
    "tolist": lambda ids: ids.tolist(),
    "cpu": lambda ids: ids.cpu(),
    "nonzero": lambda ids: (ids != IGNORE).nonzero(),
    "mask": lambda ids: ids[ids != IGNORE],
    "bincount": lambda ids: torch.bincount(ids, minlength=4),
    "repeat": lambda ids: torch.repeat_interleave(ids, ids),
}


@pytest.mark.parametrize("read", READS)
def test_what_reads_from_the_device_fails_on_meta(read: str):
    """The control."""
    ids = torch.tensor([0, 2, 1, 3])
    READS[read](ids)
    with pytest.raises((RuntimeError, NotImplementedError)):
        READS[read](ids.to("meta"))


@pytest.mark.parametrize("data", ["text", "pairs", "shared_pairs"], indirect=True)
def test_what_the_host_knows_of_a_batch_is_what_its_tensors_say(data: PackedDataModule):
    for batch in PackedLoader(data.train_plan):
        assert list(batch.lengths) == batch.cu_seqlens.diff().tolist()
        if isinstance(batch, TokenBatch):
            (places,) = (batch.target_ids[0] != IGNORE).nonzero(as_tuple=True)
            assert batch.target_index.tolist() == places.tolist()
            assert batch.label_ids.tolist() == batch.target_ids[0, places].tolist()

"""Nothing in a training step reads a number of the device: the real Trainer, AdamW and guard.

On a CPU every tensor is on the host, so tensors are told apart by where they come from. Parameters,
buffers and batches count as the device's, and so does all that is computed from them; what the host
makes by itself, from lengths that it knows, it may read. A copy that waits (`tensor.to("cpu")`) is
not seen here, because nothing is copied; `modules/test_no_waiting.py` sees it on the meta device,
and `gpu/test_training.py` lets CUDA raise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from small_models import write_small_folder
from small_training import (
    SETTINGS,
    fit,
    make_dpo_module,
    make_module,
    pair_settings,
    random_pairs,
    unequal_store,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mediphi.checkpointing import FiniteGuard, PeriodicCheckpoint, StopOnSignal
from mediphi.data.datamodule import References
from mediphi.modules.language_model import LanguageModelModule
from mediphi.tracking.progress import make_progress
from mediphi.tracking.training_rows import TrainingRows

PAIRS = [(7, 3, 2), (4, 1, 5), (20, 9, 12), (3, 6, 1), (9, 4, 4), (12, 30, 4)]
READS = {
    "_local_scalar_dense",  # item, bool, float, int, allclose
    "nonzero",
    "masked_select",
    "equal",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = ("tolist", "numpy", "cpu", "__array__")
"""They go past the dispatcher where the tensor is on a CPU."""


class DeviceTensors:
    """Which memory counts as the device's, and what was read of it."""

    def __init__(self) -> None:
        self.watching = False
        self.reads: list[str] = []
        self._found: set[StorageWeakRef] = set()
        self._on_their_way: set[StorageWeakRef] = set()

    def add(self, *tensors: Any) -> None:
        self._found |= {_memory(t) for t in tensors if isinstance(t, Tensor)}

    def send_home(self, tensor: Tensor) -> None:
        """A copy to the host that nobody waits for; who reads it at once, does."""
        self._on_their_way.add(_memory(tensor))

    def end_step(self) -> None:
        self._on_their_way.clear()

    def holds(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return _memory(value) in self._found | self._on_their_way

    def note(self, what: str) -> None:
        if self.watching:
            self.reads.append(what)


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class Operations(TorchDispatchMode):
    """Follows what is computed, also in backward and in C++, and notes what asks for numbers."""

    def __init__(self, device: DeviceTensors) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, device = kwargs or {}, self.device
        name, inputs = func._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
        is_device = any(map(device.holds, inputs))
        if is_device and _asks(name, args, kwargs):
            device.note(name)
        to_host = name == "copy_" and True in (*args[2:], kwargs.get("non_blocking"))
        to_host = to_host and not device.holds(args[0])
        out = func(*args, **kwargs)
        if is_device and to_host:
            device.send_home(out)
        elif is_device:  # what returns nothing changes its inputs
            device.add(*(inputs if out is None else tree_leaves(out)))
        return out


def _asks(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation has to know numbers, or how many there are, before it can go on."""
    if name in MASKED:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in READS


class Watch(Callback):
    """From the first batch to the last optimizer step; goes before the others."""

    def __init__(self, device: DeviceTensors) -> None:
        self.device = device
        self.num_steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.device.add(*pl_module.parameters(), *pl_module.buffers())
        self.device.watching = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.device.add(*(getattr(batch, field.name) for field in fields(batch)))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > self.num_steps:
            self.num_steps = trainer.global_step
            self.device.end_step()

    def on_train_end(self, *_: Any) -> None:
        self.device.watching = False


@contextmanager
def watched() -> Iterator[DeviceTensors]:
    device = DeviceTensors()
    with pytest.MonkeyPatch.context() as patch, Operations(device):
        for name in METHODS:
            patch.setattr(Tensor, name, _noting(device, getattr(Tensor, name)))
        yield device


def _noting(device: DeviceTensors, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def read(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if device.holds(tensor):
            device.note(method.__name__)
        return method(tensor, *args, **options)

    return read


def reads_of_fit(place: Path, layout: str, callbacks: Any = (), **options: Any) -> list[str]:
    """What is read in three optimizer steps of several micro-batches, clipped, with a guard."""
    folder = write_small_folder(place / "model")
    references = None
    if layout == "text":
        store, settings = unequal_store(place / "cache"), replace(SETTINGS, max_steps=3)
        make: Any = make_module
        options = {"neftune_alpha": 5.0, **options}
    else:
        store = random_pairs(place / "cache", PAIRS)
        settings = pair_settings(layout, global_batch=2, epochs=3, max_steps=3)  # type: ignore[arg-type]
        logps = np.full((len(PAIRS), 2), -40.0, dtype=np.float32)
        references, make = References(logps, logps), make_dpo_module
    with watched() as device:
        watch = Watch(device)
        run = fit(
            folder,
            store,
            settings=settings,
            references=references,
            make=make,
            clip=0.5,
            callbacks=[watch, FiniteGuard(store.document_id), *callbacks],
            **{"sgd": False, **options},
        )
    assert watch.num_steps == 3 and run.data.train_plan.accumulate > 1
    assert run.train["grad_norm"] > 0.5  # clipping bites
    return device.reads


@pytest.mark.parametrize("layout", ["text", "pairs", "shared_pairs"])
def test_nothing_is_read_in_a_step(layout: str, tmp_path: Path) -> None:
    """Transfer, forward, backward, guard, clipping, AdamW, schedule and meters."""
    assert reads_of_fit(tmp_path, layout) == []


@pytest.mark.parametrize("rows_every", [2, 100])
def test_the_callbacks_of_a_phase_read_nothing_but_rows(rows_every: int, tmp_path: Path) -> None:
    rows = TrainingRows(every_steps=rows_every, num_steps=100)
    progress = make_progress("test", num_steps=100, every_seconds=0.0)
    saving = PeriodicCheckpoint(tmp_path / "checkpoints", every_steps=100, keep=1)
    found = reads_of_fit(tmp_path, "text", [rows, progress, StopOnSignal(saving), saving])
    assert bool(found) is (rows_every == 2)


# --- the control --------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "truth": (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "cpu": (lambda x: x.cpu(), "cpu"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "mask": (lambda x: x[x > 0], "index"),
    "assignment": (lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())), "index_put_"),
    "repeat": (lambda x: x.repeat_interleave((x * 0).long()), "repeat_interleave"),
    "equality": (lambda x: torch.equal(x, x), "equal"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", ["forward", "backward", "update"])
def test_a_read_anywhere_in_the_step_is_seen(fault: str, place: str, tmp_path: Path) -> None:
    ask, seen = FAULTS[fault]

    def read(tensor: Tensor) -> None:
        ask(tensor.detach().reshape(1))

    class Reading(LanguageModelModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if place == "forward":
                read(loss)
            if place == "backward":
                loss.register_hook(read)
            return loss

        def on_before_zero_grad(self, optimizer: Any) -> None:
            if place == "update" and optimizer.state:
                read(next(iter(optimizer.state.values()))["step"])

    found = reads_of_fit(tmp_path, "text", kind=Reading)
    assert found and set(found) == {seen}


def test_looking_at_once_is_seen(tmp_path: Path) -> None:
    """As the guard does for an optimizer that cannot leave out an update by itself."""
    assert reads_of_fit(tmp_path, "text", sgd=True) == 3 * ["_local_scalar_dense"]


def test_what_the_host_makes_by_itself_may_be_read() -> None:
    with watched() as device:
        device.watching = True
        here, there = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
        device.add(there)
        assert here.sum().item() == 3.0 and here.tolist() == [1.0, 2.0]
        assert not device.reads
        assert (here * there).sum().item() == 9.0
        assert device.reads == ["_local_scalar_dense"]

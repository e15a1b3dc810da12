"""Training on a CUDA device: the numbers of a CPU, and a host that does not wait for it."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from small_models import write_small_folder
from small_training import (
    SETTINGS,
    SpoilGradient,
    make_dpo_module,
    make_module,
    pair_settings,
    random_pairs,
    spec_of,
    unequal_store,
)

from mediphi import attention, engine
from mediphi.checkpointing import FiniteGuard, SafeCheckpointIO
from mediphi.config.schema import Hardware
from mediphi.data.datamodule import PackedDataModule, References
from mediphi.errors import NonFiniteError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PAIRS = [(7, 3, 2), (4, 1, 5), (20, 9, 12), (3, 6, 1), (9, 4, 4), (12, 30, 4)]
LONGROPE_WAITS = tuple(map(int, version("transformers").split(".")[:2])) < (5, 23)
"""It read the largest position from the device until then."""
LAYOUTS = ["text", "pairs", "shared_pairs"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain: dict[str, Any] = {"rope_scaling": None} if LONGROPE_WAITS else {}
    return write_small_folder(tmp_path / "model", initializer_range=0.2, **plain)


@pytest.fixture
def data(tmp_path: Path, request: pytest.FixtureRequest) -> PackedDataModule:
    """Three optimizer steps of several micro-batches."""
    if request.param == "text":
        store = unequal_store(tmp_path / "cache")
        settings = replace(SETTINGS, max_steps=3)
        return PackedDataModule(store, heldout=None, settings=settings, prefetch=2)
    store = random_pairs(tmp_path / "cache", PAIRS)
    settings = pair_settings(request.param, global_batch=2, epochs=3, max_steps=3)
    logps = torch.full((len(PAIRS), 2), -40.0).numpy()
    return PackedDataModule(
        store, heldout=None, settings=settings, references=References(logps, logps), prefetch=2
    )


class Losses(Callback):
    """Of every micro-batch, kept on the device."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(outputs["loss"].detach())


class NoWaiting(Callback):
    """From micro-batch `first` to the last, whatever makes the host wait raises; goes first.

    The compiler may wait before.
    """

    def __init__(self, *, first: int = 0) -> None:
        self.first = first

    def on_train_start(self, *_: Any) -> None:
        self._forbid(0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forbid(batch_idx + 1)

    def _forbid(self, next_batch: int) -> None:
        if next_batch >= self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


class CompilesOnce(Callback):
    """Once the first micro-batch has been trained on, compiling anew raises."""

    def on_train_batch_end(self, *_: Any) -> None:
        torch.compiler.set_stance("fail_on_recompile")


@pytest.fixture(autouse=True)
def waiting_and_compiling_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def fit(
    data: PackedDataModule,
    folder: Path,
    *,
    accelerator: Any = "gpu",
    callbacks: tuple[Callback, ...] = (),
    **spec: Any,
) -> list[float]:
    """Losses of all micro-batches; float32 on a CPU, bf16 autocast on a GPU."""
    precision: Any = "bf16-mixed" if accelerator == "gpu" else "32-true"
    hardware = Hardware(accelerator=accelerator, precision=precision)
    device = engine.resolve(hardware, shares_prompts=True)
    make = make_module if data.settings.layout == "text" else make_dpo_module
    backbone = replace(spec_of(folder), kernel=device.kernel, **spec)
    module = make(folder, data, sgd=False, backbone=backbone)
    losses = Losses()
    trainer = engine.make_trainer(
        hardware,
        device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[*callbacks, FiniteGuard(data.train.document_id), losses],
        loggers=[],
        loop={
            "max_steps": data.train_plan.num_steps,
            "accumulate_grad_batches": data.train_plan.accumulate,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
        },
    )
    trainer.fit(module, data)
    assert trainer.global_step == 3
    return [float(loss) for loss in losses.found]


@pytest.mark.parametrize("data", LAYOUTS, indirect=True)
def test_three_steps_give_the_losses_of_a_cpu(data: PackedDataModule, folder: Path):
    """The second and third step have learnt: a wrong gradient or update would show."""
    expected = fit(data, folder, accelerator="cpu")
    got = fit(data, folder)
    assert len(got) == 3 * data.train_plan.accumulate
    # bf16 autocast on a CPU: up to 0.02 of the loss
    assert got == pytest.approx(expected, rel=0.06, abs=0.02)


@pytest.mark.parametrize("data", LAYOUTS, indirect=True)
def test_nothing_makes_the_host_wait_in_a_step(data: PackedDataModule, folder: Path):
    """The transfer of batches, forward, backward, guard, clipping, AdamW, schedule and meters."""
    assert data.train_plan.accumulate > 1
    fit(data, folder, callbacks=(NoWaiting(),))


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("data", ["text"], indirect=True)
def test_a_step_that_is_not_finite_changes_nothing(data: PackedDataModule, folder: Path, step: int):
    """Nor does what the host has queued behind it; of the last step it hears at the end."""
    spoil = SpoilGradient(step)
    with pytest.raises(NonFiniteError, match=rf"^step {step}: gradient norm nan is not finite"):
        fit(data, folder, callbacks=(spoil,))
    assert spoil.changed_nothing()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns, and hides it by itself
@pytest.mark.parametrize("data", LAYOUTS, indirect=True)
def test_compiled_layers_give_the_losses_of_plain_ones(data: PackedDataModule, folder: Path):
    """And compile once, though no two rows are alike: the stance lets nothing compile later."""
    plain = fit(data, folder)
    compiled = fit(data, folder, callbacks=(CompilesOnce(),), compiled_tokens=data.max_tokens)
    assert compiled == pytest.approx(plain, rel=0.03, abs=0.02)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", LAYOUTS, indirect=True)
def test_compiled_layers_make_the_host_wait_no_more(data: PackedDataModule, folder: Path):
    losses = fit(data, folder, callbacks=(NoWaiting(first=1),), compiled_tokens=data.max_tokens)
    assert len(losses) == 3 * data.train_plan.accumulate


def test_reads_and_copies_of_ordinary_memory_are_seen():
    """The control."""
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    torch.cuda.set_sync_debug_mode("error")
    for wait in (lambda: there.sum().item(), lambda: there.nonzero(), lambda: here.to("cuda")):
        with pytest.raises(RuntimeError, match="synchroniz"):
            wait()


@pytest.mark.parametrize("data", LAYOUTS, indirect=True)
def test_a_batch_arrives_whole_while_the_device_is_busy(data: PackedDataModule):
    """The copy waits in the device's queue, after the host's memory may have been used anew."""
    batch = data.train_dataloader()[0]
    busy = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 4096
    sent = batch.to("cuda")
    _ = [torch.full((batch.num_tokens,), -1).pin_memory() for _ in range(50)]
    for name in batch.__slots__:
        here, there = getattr(batch, name), getattr(sent, name)
        same = torch.equal(here, there.cpu()) if isinstance(here, torch.Tensor) else here == there
        assert same or name == "reference_logps", name


def test_the_kernel_of_a_gpu_is_a_varlen_kernel():
    device = engine.resolve(Hardware())
    assert device.type == "cuda" and device.precision == "bf16-mixed"
    assert device.kernel in ("flash", "varlen")
    assert attention.IMPLEMENTATIONS[device.kernel] in ("flash_attention_2", "mediphi_varlen")


@pytest.mark.parametrize("data", ["pairs"], indirect=True)
def test_a_live_reference_is_where_the_pairs_are(data: PackedDataModule, folder: Path):
    """Also in the validation that comes before training."""
    module = make_dpo_module(folder, data, sgd=False, live_reference=spec_of(folder))
    module.configure_model()
    module.cuda()
    loss, *_ = module.loss(data.train_dataloader()[0].to("cuda"))
    assert loss.losses.isfinite().all()

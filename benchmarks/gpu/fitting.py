"""How the sides of the GPU benchmarks train: Lightning around ours, arguments of TRL's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import trainers
from measuring import DeviceMeter
from sides import Train, serve

LR = 1e-8
"""So small that the losses of all steps are those of the first weights: they can be compared."""


def of(task: Any, meter: DeviceMeter) -> Any:
    """What a run trains."""
    return task.first_step if meter.what == "parity" else task


def passes_per_step(rows: int, *, size: int, steps: int) -> int:
    """Passes of `size` packed rows in each of so many optimizer steps.

    As many as leave no row over; where that would make fewer steps, one less, and the last rows are
    not trained.

    Raises:
        SystemExit: there are not enough rows.
    """
    passes = -(-rows // (steps * size))
    if -(-rows // (passes * size)) < steps:
        passes -= 1
    if not passes:
        raise SystemExit(
            f"--rows {size}: {steps} optimizer steps need more than {rows} packed rows; "
            f"at most {max(1, rows // steps)} go through the model at a time"
        )
    return passes


# ---------------------------------------------------------------------------------- parity
def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What the first process to need it has made; sides take turns, so none waits for another."""
    import torch

    if not path.exists():
        made = make()
        torch.save(made, path)
    return torch.load(path)


def judged(train: Train, judge: Callable[[DeviceMeter], dict[str, float]]) -> Train:
    """A side's run that answers how far it is off; nothing where it is timed."""

    def run(meter: Any) -> dict[str, float]:
        train(meter)
        meter.release()  # what it is compared with needs the memory
        return judge(meter) if meter.what == "parity" else {}

    return run


def serve_judged(
    side: str, task_file: Path, task: Any, *, make: Any, reference: Any, judge: Any
) -> None:
    """Serve a side whose parity run is judged before anything is timed.

    Args:
        make: of (task, side, folder), a run.
        reference: of the task, what a parity run is compared with; made once for all sides.
        judge: of (meter, reference) and a precision, how far a run is off.
    """
    known = partial(kept, task_file.with_name("reference.pt"), partial(reference, task))

    def prepare(folder: Path) -> Train:
        train = make(task, side, folder)
        return judged(train, lambda meter: judge(meter, known(), precision=task.precision))

    serve(prepare, lambda offs: offs, meters=DeviceMeter)


class Progress:
    """Starts the meter behind the warm-up; sums what its steps hold."""

    def __init__(self, meter: DeviceMeter, task: Any) -> None:
        self.meter, self.warmup, self.done = meter, task.warmup_steps, 0

    def begin(self) -> None:
        if self.done == self.warmup:
            self.meter.start()

    def add(self, *, tokens: int, positions: int, loss: Any, pairs: int = 0) -> None:
        """A pass; losses are kept on the device."""
        if self.done >= self.warmup:
            self.meter.tokens += tokens
            self.meter.positions += positions
            self.meter.pairs += pairs
        self.meter.step_losses.append(loss.detach())

    def end_of_step(self) -> None:
        self.done += 1
        self.meter.steps = self.done - self.warmup
        self.begin()


# ---------------------------------------------------------------------------------- ours
def fit(task: Any, data: Any, module: Any, meter: DeviceMeter) -> None:
    """The Trainer of a phase with its guard against NaN; no rows, checkpoints or export.

    `task`: has `steps`, `warmup_steps` and `precision`.
    """
    import lightning as L

    from mediphi import engine
    from mediphi.checkpointing import FiniteGuard, SafeCheckpointIO
    from mediphi.config.schema import Hardware
    from mediphi.tracking.progress import silence_lightning

    silence_lightning()
    progress = Progress(meter, task)

    class Clock(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            progress.begin()

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            tokens, pairs = batch.num_tokens, getattr(batch, "num_pairs", 0)
            positions = module.spec.compiled_tokens or tokens
            progress.add(tokens=tokens, positions=positions, loss=outputs["loss"], pairs=pairs)
            if trainer.global_step > progress.done:
                progress.end_of_step()

        def on_train_end(self, *_: Any) -> None:
            meter.stop()

    assert data.train_plan.num_steps == task.steps, "ours: another number of steps"
    hardware = Hardware(precision=task.precision)
    trainer = engine.make_trainer(
        hardware,
        engine.resolve(hardware),
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[FiniteGuard(data.train.document_id), Clock()],
        loggers=[],
        loop={
            "max_steps": task.steps,
            "accumulate_grad_batches": data.train_plan.accumulate,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
        },
    )
    trainer.fit(module, data)


# ---------------------------------------------------------------------------------- TRL
def peer_arguments(task: Any, folder: Path, own: dict[str, Any]) -> dict[str, Any]:
    """What SFTConfig and DPOConfig share; what is not named is TRL's default."""
    common = trainers.peer_arguments(folder, precision=task.precision)
    for name in ("gradient_checkpointing", "dataloader_pin_memory"):
        del common[name]
    common |= {"learning_rate": LR, "use_cpu": measuring.device() == "cpu"}
    if measuring.device() == "cpu":
        common["dataloader_pin_memory"] = False
    return {**common, "train_sampling_strategy": "sequential", **own}


def peer_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def peer_clock(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            progress.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            progress.end_of_step()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            progress.meter.stop()

    return Clock()

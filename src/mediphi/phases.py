"""The phases of a training stage: what each trains on, and how one becomes a model folder."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mediphi import engine, tracking
from mediphi.artifacts import Parent, publish, rename_folder, room_for
from mediphi.backbone import BackboneSpec, original_positions
from mediphi.budget import Budget
from mediphi.checkpointing import (
    FiniteGuard,
    PeriodicCheckpoint,
    SafeCheckpointIO,
    StopOnSignal,
    last_checkpoint,
    step_of,
)
from mediphi.config import config_hash
from mediphi.config.schema import Config
from mediphi.config.stages import ChatStage, DpoStage, Phase, SftStage
from mediphi.data.corpora import Side
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.heldout_prompts import heldout_prompts
from mediphi.data.plan import PlanSettings, TrainingPlan
from mediphi.errors import DataError, UserError
from mediphi.export import export_model, reload_and_compare
from mediphi.launch import rank
from mediphi.modules.causal_lm import CausalLMModule
from mediphi.preparation import PreparedData
from mediphi.samples import SAMPLES, GreedySamples
from mediphi.stages import TrainingStage, make_module, phase_key, phases_of
from mediphi.strategies.sharding import Sharded, whole_model
from mediphi.tracking.progress import make_progress
from mediphi.tracking.training_rows import TrainingRows

Loggers = list[Any]

SAMPLE_TOKENS = 64
"""Longest sample where no exam sets a bound."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """A phase with its data, built before anything is written, so that it can be shown.

    `first_step` is the number of optimizer steps in the phases before.
    """

    name: str
    phase: Phase
    data: PackedDataModule
    first_step: int

    @property
    def num_steps(self) -> int:
        return self.data.train_plan.num_steps


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that stays the same over the phases of one run.

    `parents` are the artifacts that it starts from, as they were verified before the first step.
    """

    config: Config
    device: engine.Device
    tokenizer: PreTrainedTokenizerFast
    data: PreparedData
    phases: tuple[PhasePlan, ...]
    budget: Budget
    folder: Path
    parents: Mapping[str, Parent]

    @property
    def too_long(self) -> dict[Side, dict[str, int]]:
        """Documents of each source that no row of `max_length` tokens holds, so left out."""
        data = self.phases[0].data  # only stages of one phase leave any out
        plans: dict[Side, TrainingPlan | None] = {
            "train": data.train_plan,
            "heldout": data.heldout_plan if isinstance(self.config.stage, ChatStage) else None,
        }
        return {
            side: {} if plan is None else plan.store.documents_per_source(plan.too_long)
            for side, plan in plans.items()
        }

    @property
    def compiled_tokens(self) -> int | None:
        """Positions of every row, where there are layers to compile; else None."""
        layers = self.budget.model_config.num_hidden_layers
        if not self.config.hardware.compile or self.budget.recomputed_layers == layers:
            return None
        return max(plan.data.max_tokens for plan in self.phases)

    def checkpoints(self, plan: PhasePlan) -> Path:
        return self.folder / "checkpoints" / plan.name

    def model_folder(self, plan: PhasePlan) -> Path:
        """The last phase's model is the run's; the others hand theirs to the next phase."""
        is_last = plan is self.phases[-1]
        return self.folder / "model" if is_last else self.checkpoints(plan) / "model"


def plan_phases(config: Config, *, data: PreparedData, model_config: Any) -> tuple[PhasePlan, ...]:
    """Decide which tokens every optimizer step of the stage holds."""
    plans: list[PhasePlan] = []
    first_step = 0
    for name, phase, kinds, layout, learnt in phases_of(config.training):
        settings = PlanSettings(
            kinds=kinds,
            layout=layout,
            learnt=learnt,
            capacity=config.training.max_length,
            global_batch=config.training.global_batch,
            micro_batch=config.hardware.micro_batch,
            world_size=config.world_size,
            epochs=phase.epochs,
            seed=config.seed,
            weights={name: source.weight for name, source in config.corpus.sources.items()},
            long_above=original_positions(model_config),
            max_steps=phase.max_steps,
        )
        module = PackedDataModule(
            data.train,
            heldout=data.heldout,
            settings=settings,
            max_heldout_rows=config.training.eval_max_rows,
            prefetch=config.hardware.prefetch,
        )
        try:
            _refuse_long_warmup(config, name, phase, module.train_plan.num_steps)
            _judge_too_long(config.training, module)
        except DataError as error:
            raise DataError(f"corpus {config.corpus.name!r}: {error}") from None
        plans.append(PhasePlan(name, phase, module, first_step))
        first_step += plans[-1].num_steps
    return tuple(plans)


def _refuse_long_warmup(config: Config, name: str, phase: Phase, num_steps: int) -> None:
    """A warm-up that never ends would train at a fraction of the learning rate, in silence."""
    if phase.warmup_steps < num_steps:
        return
    key = phase_key(config.training, name)
    told = (
        f"{key}.warmup_steps={phase.warmup_steps}: the phase has only {num_steps} "
        f"optimizer steps; set {key}.warmup_steps below that, lower stage.global_batch, "
        f"raise {key}.epochs or take more data, as in corpus=paper/..."
    )
    if not config.check_only:
        raise UserError(told)
    print(f"steps       a run would end with: {told}")


def _judge_too_long(stage: TrainingStage, data: PackedDataModule) -> None:
    """A conversation is never cut: what does not fit is left out and told, or stops the run."""
    if not isinstance(stage, ChatStage):
        return
    plans = {"training": data.train_plan, "held-out": data.heldout_plan}
    long = {side: plan for side, plan in plans.items() if plan is not None and len(plan.too_long)}
    if not long:
        return
    noun = "pairs" if isinstance(stage, DpoStage) else "conversations"
    counts = (
        f"{len(plan.too_long):,} of {len(plan.too_long) + len(plan.sequences.length):,} {side}"
        for side, plan in long.items()
    )
    what = f"{' and '.join(counts)} {noun} exceed stage.max_length={stage.max_length} tokens"
    if stage.too_long == "refuse":
        plan = next(iter(long.values()))
        first = plan.store.document_id(int(plan.too_long[0]))
        raise UserError(f"{what}, the first is {first}: raise it or set stage.too_long=drop")
    if rank() == 0:
        print(f"left out    {what}")


def fit_phase(run: Training, plan: PhasePlan, *, backbone: BackboneSpec, loggers: Loggers) -> None:
    """Train one phase from its last checkpoint and export its model folder, atomically."""
    config, steps = run.config, plan.data.train_plan
    state = last_checkpoint(run.checkpoints(plan))
    tracking.begin_phase(
        loggers,
        plan.name,
        first_step=plan.first_step,
        resumed_step=0 if state is None else step_of(state),
    )
    L.seed_everything(config.seed, verbose=False)
    module = make_module(config, plan.phase, data=plan.data, backbone=backbone)
    every = min(config.training.eval_every_steps, steps.num_steps)
    has_heldout = plan.data.heldout_plan is not None
    trainer = engine.make_trainer(
        config.hardware,
        run.device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=_callbacks(run, plan),
        loggers=loggers,
        loop={
            "max_steps": steps.num_steps,
            "accumulate_grad_batches": steps.accumulate,
            "gradient_clip_val": config.training.optimizer.max_grad_norm,
            "val_check_interval": every * steps.accumulate,
            "limit_val_batches": None if has_heldout else 0,
            "log_every_n_steps": config.logger.every_steps,
        },
    )
    if has_heldout and state is None:
        trainer.validate(module, plan.data, verbose=False)  # where training starts from
    trainer.fit(module, plan.data, ckpt_path=None if state is None else str(state))
    if has_heldout and steps.num_steps % every:
        trainer.validate(module, plan.data, verbose=False)
    model = _whole_model(trainer, module)
    if rank() == 0:
        _export(run, plan, model)


def _callbacks(run: Training, plan: PhasePlan) -> list[L.Callback]:
    """In this order: rows are written and signals seen before the state that counts them."""
    config, steps = run.config, plan.data.train_plan
    numbers = config.hardware.checkpoints
    saving = PeriodicCheckpoint(
        run.checkpoints(plan), every_steps=numbers.every_steps, keep=numbers.keep
    )

    def position(step: int) -> dict[str, float]:
        at = plan.data.position(step)
        return {"epoch": at.epoch, "tokens_seen": at.tokens, "packing_efficiency": steps.fill}

    guard = FiniteGuard(run.data.train.document_id)
    rows = TrainingRows(
        every_steps=config.logger.every_steps,
        num_steps=steps.num_steps,
        position=position,
        flops=run.budget.batch_flops,
        peak_flops=engine.peak_flops(run.device),
        settle=guard.settle,
    )
    progress = make_progress(plan.name, num_steps=steps.num_steps)
    return [guard, *_samples(run), rows, progress, StopOnSignal(saving), saving]


def _samples(run: Training) -> list[L.Callback]:
    """Answers to be read, of sources whose licence lets their text be shown."""
    stage, sources = run.config.stage, run.config.corpus.sources
    if not isinstance(stage, SftStage) or not stage.num_samples:
        return []
    drawn = heldout_prompts(
        run.data.heldout,
        run.tokenizer,
        per_task=stage.num_samples,
        max_prompt_tokens=stage.max_length,
        seed=run.config.seed,
    )
    shown = [prompt for prompt in drawn if sources[prompt.source].licence.may_be_shown]
    tasks = {prompt.task_type: prompt for prompt in reversed(shown)}
    first_of_each = {prompt.id: prompt for prompt in (*tasks.values(), *shown)}
    prompts = [*first_of_each.values()][: stage.num_samples]
    if not prompts:
        return []
    options = {"tokenizer": run.tokenizer, "device": run.device}
    longest = stage.exam.max_new_tokens if stage.exam else SAMPLE_TOKENS
    path = run.folder / SAMPLES
    return [GreedySamples(path, prompts=prompts, max_new_tokens=longest, **options)]


def _exports_adapter(config: Config) -> bool:
    stage = config.stage
    return (
        isinstance(stage, ChatStage) and stage.lora is not None and stage.lora.export == "adapter"
    )


def _whole_model(trainer: L.Trainer, module: CausalLMModule) -> PreTrainedModel:
    """What was trained, on rank 0 in one piece."""
    strategy: Any = trainer.strategy
    if not isinstance(strategy, Sharded):
        return module.backbone
    return whole_model(strategy, module.spec, module.backbone)


def _export(run: Training, plan: PhasePlan, model: PreTrainedModel) -> None:
    """Write beside the target, compare what a stranger would load, vouch for it, then rename."""
    target = run.model_folder(plan)
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    # The next phase goes on from full precision; only what is published is rounded.
    dtype = run.budget.weights_dtype if plan is run.phases[-1] else torch.float32
    try:
        with room_for(target, run.budget.num_parameters * dtype.itemsize):
            export_model(
                model,
                run.tokenizer,
                staging,
                dtype=dtype,
                with_adapter=_exports_adapter(run.config),
            )
            reload_and_compare(model, staging, dtype=dtype)
            publish(
                staging,
                config_hash=config_hash(run.config),
                parents=run.parents,
                data={"fingerprint": run.data.fingerprint},
                extra={"phase": plan.name},
            )
            rename_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

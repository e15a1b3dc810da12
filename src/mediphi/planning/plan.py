"""The plan of a run, and of the same run with changes: memory of a rank, time."""

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pydantic import ValidationError

from mediphi.backbone import BackboneSpec
from mediphi.batches import Batch
from mediphi.budget import Budget, estimate
from mediphi.config.schema import Config
from mediphi.config.stages import ChatStage, DpoStage, Lora
from mediphi.data.loader import PackedLoader
from mediphi.engine import Device
from mediphi.modules.causal_lm import takes_padding
from mediphi.phases import PhasePlan, Training, plan_phases
from mediphi.planning.dry_run import Footprint, dry_run
from mediphi.planning.memory import Memory, memory_of
from mediphi.planning.speed import FACTORS, Factors, Link, Rates, Work, link_of, rates_of, work_of
from mediphi.resources import free_memory
from mediphi.stages import make_module
from mediphi.strategies.memory import splits

LOOKED_AT = 16
"""Micro-batches of a phase of which the largest is planned for; packed rows are alike."""
RESERVE = 0.05
"""Share of a device's memory: a plan that leaves less than that free fits closely."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will need.

    Attributes:
        memory: of one rank.
        available: bytes of its device.
        host: bytes that all ranks of a machine keep in its memory, offloaded.
        host_free: bytes of that memory which are free; None: another machine is planned for.
        works: of all optimizer steps, a phase each.
        tokens: of all optimizer steps, of all ranks.
        footprint: of the micro-batch that memory is planned for.
        rates: of the device.
        link: what it sends to the others over.
        factors: what of the rates is reached.
    """

    memory: Memory
    available: float
    host: float
    host_free: float | None
    works: tuple[Work, ...]
    tokens: int
    footprint: Footprint
    rates: Rates
    link: Link
    factors: Factors

    @property
    def seconds(self) -> float:
        """Of all optimizer steps; start, exams and checkpoints apart."""
        return sum(work.seconds(self.rates, self.factors, link=self.link) for work in self.works)

    @property
    def fits(self) -> bool:
        """The device's memory is enough, and the machine's as far as that is known."""
        return self.memory.total <= self.available and self.host_fits

    @property
    def is_close(self) -> bool:
        """Less than `RESERVE` of the device's memory stays free."""
        return self.memory.total > (1 - RESERVE) * self.available

    @property
    def host_fits(self) -> bool:
        return self.host_free is None or self.host <= self.host_free


Change = Mapping[str, Any]
"""Dotted key -> its new value."""


class Planner:
    """Plans a run, and the same run with changes."""

    def __init__(self, run: Training) -> None:
        self.run = run
        self._rates: Rates | None = None
        self._footprints: dict[tuple[object, ...], Footprint] = {}
        self._phases: dict[tuple[object, ...], tuple[PhasePlan, ...]] = {}

    def plan(self, run: Training | None = None) -> Plan:
        run = self.run if run is None else run
        self._rates = self._rates or rates_of(run.device)
        plans = [_largest(plan) for plan in run.phases]
        phase, batch = max(plans, key=lambda found: _size(found[1]))
        footprint = self._footprint(run, phase, batch)
        works = (_work(run, p, batch, footprint).times(p.num_steps) for p in run.phases)
        memory = memory_of(footprint, config=run.config, device=run.device)
        return Plan(
            memory=memory,
            available=available_memory(run.device, config=run.config),
            host=run.config.hardware.devices * sum(memory.host.values()),
            host_free=free_memory() if run.device.is_here else None,
            works=tuple(works),
            tokens=sum(plan.data.train_plan.num_tokens for plan in run.phases),
            footprint=footprint,
            rates=self._rates,
            link=link_of(self._rates, config=run.config),
            factors=FACTORS[run.device.type, run.device.precision],
        )

    def changed(self, change: Change) -> Training | None:
        """The run with other hardware or adapters; None where that cannot be."""
        run = self.run
        config = with_change(run.config, change)
        if config is None:
            return None
        budget = estimate(planned_folder(run), config=config, device=run.device)
        phases = self._phases_of(config, budget)
        return replace(run, config=config, phases=phases, budget=budget)

    def _phases_of(self, config: Config, budget: Budget) -> tuple[PhasePlan, ...]:
        key = (config.hardware.micro_batch, config.world_size, config.stage.model_dump_json())
        if key not in self._phases:
            with contextlib.redirect_stdout(io.StringIO()):  # it has been told
                found = plan_phases(config, data=self.run.data, model_config=budget.model_config)
            self._phases[key] = found
        return self._phases[key]

    def _footprint(self, run: Training, phase: PhasePlan, batch: Batch) -> Footprint:
        hardware, stage = run.config.hardware, run.config.stage
        is_ddp = run.config.world_size > 1 and not splits(hardware.strategy)
        accumulates = phase.data.train_plan.accumulate > 1 or is_ddp
        lora = stage.lora if isinstance(stage, ChatStage) else None
        mixed = run.device.precision == "bf16-mixed"
        reference = stage.reference if isinstance(stage, DpoStage) else None
        key = (hardware.micro_batch, run.budget.recomputed_layers, lora, accumulates, reference)
        key = (*key, run.compiled_tokens)
        if key not in self._footprints:
            backbone = planned_backbone(run, lora)

            def make() -> Any:
                return make_module(run.config, phase.phase, data=phase.data, backbone=backbone)

            self._footprints[key] = dry_run(make, batch, mixed=mixed, accumulates=accumulates)
        return self._footprints[key]


def recomputed_share(run: Training) -> float:
    """Of the decoder's layers, those whose activations are recomputed in backward."""
    return run.budget.recomputed_layers / run.budget.model_config.num_hidden_layers


def with_change(config: Config, change: Change) -> Config | None:
    """The config as these overrides would make it; None where it would break a rule."""
    plain = config.model_dump(mode="json")
    for key, value in change.items():
        *sections, last = key.split(".")
        place = plain
        for name in sections:
            place[name] = place[name] or {}  # no adapters yet
            place = place[name]
        place[last] = value
    try:
        return Config.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError:
        return None


def planned_folder(run: Training) -> str:
    """Where config and tokenizer were found."""
    return run.tokenizer.name_or_path


def planned_backbone(run: Training, lora: Lora | None) -> BackboneSpec:
    """The model that is trained, its weights drawn: a dry run needs no files."""
    device = run.device
    return BackboneSpec(
        folder=planned_folder(run),
        init="random",
        revision=run.config.model.revision,
        kernel="varlen" if device.kernel == "flash" else device.kernel,  # flash-attn may be absent
        recomputed_layers=run.budget.recomputed_layers,
        compiled_tokens=run.compiled_tokens,
        loss_chunk_tokens=device.loss_chunk_tokens,
        lora=lora,
    )


def available_memory(device: Device, *, config: Config) -> float:
    """Bytes that a rank may fill: the GPU's own, or its share of the machine's free memory."""
    if device.type == "cpu":
        return free_memory() / config.hardware.devices
    assert device.memory_bytes is not None  # known of every GPU
    return device.memory_bytes


def _work(run: Training, plan: PhasePlan, batch: Batch, footprint: Footprint) -> Work:
    """Of a mean micro-batch: the largest one's, by the tokens that it really holds.

    The footprint is of a padded row, where layers are compiled.
    """
    train, tokens = plan.data.train_plan, run.compiled_tokens
    mean = train.num_tokens / (train.num_steps * run.config.accumulate * run.config.world_size)
    padded = tokens if tokens and takes_padding(round(mean), tokens) else None
    budget: Budget = run.budget
    return work_of(
        flops=budget.batch_flops(batch) * (padded or mean) / batch.num_tokens,
        traffic=footprint.traffic * (1 if padded else mean / batch.num_tokens),
        budget=budget,
        recomputed_share=recomputed_share(run),
        config=run.config,
    )


def _largest(plan: PhasePlan) -> tuple[PhasePlan, Batch]:
    loader = PackedLoader(plan.data.train_plan, group_names=plan.data.group_names)
    return plan, max(islice(loader, LOOKED_AT), key=_size)


def _size(batch: Batch) -> tuple[int, int]:
    return batch.num_tokens, len(batch.label_ids)

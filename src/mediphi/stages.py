"""What sets the training stages apart: their phases, their sequences, their module."""

from dataclasses import replace
from typing import Any, NamedTuple

from mediphi.backbone import BackboneSpec
from mediphi.config.schema import Config
from mediphi.config.stages import DaptStage, DpoStage, Phase, PitStage, SftStage
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.groups import group_names
from mediphi.data.sequences import CHAT_KINDS, PAIR_KINDS, Layout
from mediphi.modules import dpo
from mediphi.modules.causal_lm import CausalLMModule
from mediphi.modules.language_model import LanguageModelModule
from mediphi.modules.meters import UNNAMED
from mediphi.records import PIECE_KINDS, TASK_KINDS, PieceKind
from mediphi.tracking.names import Objective

TrainingStage = PitStage | DaptStage | SftStage | DpoStage


class PhaseSpec(NamedTuple):
    """One phase: its schedule, and how the token store becomes sequences (`PlanSettings`)."""

    name: str
    phase: Phase
    kinds: tuple[PieceKind, ...]
    layout: Layout = "text"
    learnt: tuple[PieceKind, ...] = ()


def phases_of(stage: TrainingStage) -> list[PhaseSpec]:
    """PIT: task outputs alone, then with their documents (Jiang et al. 2024); the others: one."""
    match stage:
        case PitStage():
            return [
                PhaseSpec("phase1", stage.phase1, TASK_KINDS),
                PhaseSpec("phase2", stage.phase2, ("document", *TASK_KINDS)),
            ]
        case DaptStage():
            return [PhaseSpec("dapt", stage.phase, ("document",))]
        case SftStage():
            learnt = CHAT_KINDS if stage.train_on_prompt else ("answer",)
            return [PhaseSpec("sft", stage.phase, CHAT_KINDS, "chat", learnt)]
        case DpoStage():
            layout: Layout = "shared_pairs" if stage.share_prompt else "pairs"
            return [PhaseSpec("dpo", stage.phase, PAIR_KINDS, layout)]


def phase_key(stage: TrainingStage, name: str) -> str:
    """Where the config keeps a phase's schedule."""
    return f"stage.{name}" if isinstance(stage, PitStage) else "stage.phase"


def objective_of(stage: TrainingStage) -> Objective:
    return "pairs" if isinstance(stage, DpoStage) else "tokens"


def metric_groups(stage: TrainingStage, data: PackedDataModule) -> dict[str, list[str]]:
    """Names that fill the slots of metric names: of each split those that its text has."""
    read = {kind for phase in phases_of(stage) for kind in phase.learnt or phase.kinds}
    found: dict[str, list[str]] = {}
    for split, store in (("train", data.train), ("heldout", data.heldout)):
        if store is None:
            continue
        kinds = read.intersection(count.kind for count in store.manifest.counts)
        names = group_names([store])
        found |= {
            f"{split}/kind": [kind for kind in PIECE_KINDS if kind in kinds],
            f"{split}/source": list(names["source"]),
        }
        for slot, label in (("task", "task_type"), ("error", "error_type")):
            # Rows without a name are told apart only where others have one, on whichever side.
            is_named = any(data.group_names[label])
            found[f"{split}/{slot}"] = [n or UNNAMED for n in names[label]] if is_named else []
    return found


def make_module(
    config: Config, phase: Phase, *, data: PackedDataModule, backbone: BackboneSpec
) -> CausalLMModule:
    """The LightningModule of a phase."""
    stage, plan = config.training, data.train_plan
    options: dict[str, Any] = {
        "backbone": backbone,
        "phase": phase,
        "optimizer": stage.optimizer,
        "num_steps": plan.num_steps,
        "splits": plan.accumulate * config.world_size,
    }
    names = data.group_names
    if isinstance(stage, DpoStage):
        reference = replace(backbone, lora=None, recomputed_layers=0)
        return dpo.DpoModule(
            objective=dpo.Objective(
                loss=stage.loss,
                beta=stage.beta,
                label_smoothing=stage.label_smoothing,
                length_normalised=stage.length_normalised,
                sft_weight=stage.sft_weight,
                uses_reference=stage.reference != "none",
            ),
            live_reference=reference if stage.reference == "live" else None,
            group_names={
                "source": names["source"],
                "error": names["error_type"],
                "task": names["task_type"],
            },
            **options,
        )
    return LanguageModelModule(
        group_names={
            "kind": PIECE_KINDS,
            "source": names["source"],
            "task": names["task_type"],
        },
        neftune_alpha=stage.neftune_alpha,
        **options,
    )

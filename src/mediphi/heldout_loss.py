"""What every held-out conversation costs a model, so that two models can be compared pairwise."""

from dataclasses import dataclass
from typing import Any

import torch

from mediphi.backbone import BackboneSpec
from mediphi.batches import TokenBatch
from mediphi.chat_exams import prompt_clusters
from mediphi.config.stages import Optimizer, Phase
from mediphi.data.loader import NO_DOCUMENT, PackedLoader
from mediphi.data.plan import PlanSettings, once_through
from mediphi.data.tokens import TokenStore
from mediphi.engine import Device
from mediphi.evaluate.scores import Scored, Unit
from mediphi.modules.language_model import LanguageModelModule

ALL = "held-out loss"
"""The one group."""


@dataclass(frozen=True, slots=True)
class HeldoutLoss:
    """Mean cross-entropy per learnt token of each held-out conversation that fits into a row."""

    store: TokenStore
    settings: PlanSettings
    device: Device
    title: str = "What do held-out answers cost? Loss per answer token, mean per conversation"
    noun: str = "conversations"
    metric: str = "loss"
    unit: Unit = "nats/token"
    groups: tuple[str, ...] = (ALL,)
    overall: bool = False
    baseline: str = ""

    @torch.inference_mode()
    def sit(self, backbone: BackboneSpec) -> list[Scored]:
        """Score every conversation, in the order of the store."""
        module = LanguageModelModule(
            group_names={"kind": ("",), "source": ("",), "task": ("",)},
            backbone=backbone,
            phase=Phase(lr=1.0),
            optimizer=Optimizer(),
            num_steps=1,
            splits=1,
        )
        module.configure_model()
        module.eval().to(self.device.type)
        plan = once_through(self.store, self.settings)
        bf16 = self.device.precision == "bf16-mixed"
        costs: dict[int, float] = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            for batch in PackedLoader(plan):
                assert isinstance(batch, TokenBatch)
                costs |= _costs(module.loss(batch.to(self.device.type)), batch)
        clusters = prompt_clusters(self.store)
        return [
            Scored(self.store.document_id(row), ALL, costs[row], cluster=clusters[row])
            for row in sorted(costs)
        ]


def _costs(out: Any, batch: TokenBatch) -> dict[int, float]:
    """Row of the store -> loss per learnt token."""
    losses = out.per_target.double().cpu()
    ends = torch.searchsorted(batch.target_index, batch.cu_seqlens.long()).tolist()
    costs = {}
    for row, start, end in zip(batch.document_index.tolist(), ends, ends[1:], strict=False):
        if row != NO_DOCUMENT:
            costs[row] = float(losses[start:end].mean())
    return costs

"""Sizes of the model, without its weights, and what follows from them: FLOPs, state, disk."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mediphi.backbone import LOAD_ERRORS
from mediphi.batches import Batch, PreferenceBatch
from mediphi.config.schema import Config
from mediphi.config.stages import ChatStage
from mediphi.engine import training_flops
from mediphi.errors import UserError
from mediphi.lora import add_adapters


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of the model, and what follows from them.

    Attributes:
        model_config: the Hugging Face config.
        num_parameters: all of them.
        num_matmul_parameters: those in matrix products (without the embedding's look-up).
        num_head_parameters: of those the output head's, which works at targets only.
        num_adapter_parameters: trained in place of all others; 0: all others are trained.
        weights_dtype: of the published weights.
        disk_bytes: run directory with checkpoints and model.
    """

    model_config: Any
    num_parameters: int
    num_matmul_parameters: int
    num_head_parameters: int
    num_adapter_parameters: int
    weights_dtype: torch.dtype
    disk_bytes: int

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient and AdamW's moments."""
        return self.num_adapter_parameters or self.num_parameters

    def batch_flops(self, batch: Batch) -> float:
        """Operations of training on a batch, attention by the pairs it really computes.

        Beside adapters the weights are frozen: they only hand a gradient on. Those of the first
        layer that need not even that, as nothing below is trained, count like the others.
        """
        lengths = batch.lengths
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        if isinstance(batch, PreferenceBatch):
            num_targets = len(batch.label_ids)
            if batch.shares_prompt:
                parts = zip(lengths[0::3], lengths[1::3], lengths[2::3], strict=True)
                pairs += sum(prompt * (chosen + rejected) for prompt, chosen, rejected in parts)
        else:
            num_targets = len(batch.target_index)
        num_body = self.num_matmul_parameters - self.num_head_parameters
        body = training_flops(
            num_matmul_parameters=num_body + self.num_adapter_parameters,
            num_frozen_parameters=num_body if self.num_adapter_parameters else 0,
            hidden=self.model_config.hidden_size,
            layers=self.model_config.num_hidden_layers,
            pairs=pairs,
            tokens=batch.num_tokens,
        )
        per_head_parameter = 4.0 if self.num_adapter_parameters else 6.0
        return body + per_head_parameter * self.num_head_parameters * num_targets


def estimate(folder: str, *, config: Config) -> Budget:
    """Size up the model of a folder or hub id without its weights.

    Raises:
        UserError: no model config there.
    """
    try:
        model_config = AutoConfig.from_pretrained(
            folder, revision=config.model.revision, trust_remote_code=False
        )
    except LOAD_ERRORS as error:
        reason = _reason(error)
        raise UserError(f"model {folder}: no config can be loaded; {reason}") from error
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except Exception as error:  # a config's numbers can be wrong in any way
        raise UserError(f"model {folder}: no model fits config.json; {_reason(error)}") from None
    num_parameters = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    num_matmul = sum(m.weight.numel() for m in linear)
    num_adapter = _num_adapter_parameters(model, config)
    trained = num_adapter or num_parameters
    state = trained * 12  # weights and AdamW's two moments
    keep = config.hardware.checkpoints.keep
    return Budget(
        model_config=model_config,
        num_parameters=num_parameters,
        num_matmul_parameters=num_matmul,
        num_head_parameters=model_config.vocab_size * model_config.hidden_size,
        num_adapter_parameters=num_adapter,
        weights_dtype=_dtype(model_config),
        disk_bytes=state * (keep + 1) + 2 * num_parameters * 4,
    )


def _num_adapter_parameters(model: PreTrainedModel, config: Config) -> int:
    """Without adapters 0; adapters that cannot be are refused here."""
    stage = config.stage
    if not isinstance(stage, ChatStage) or stage.lora is None:
        return 0
    add_adapters(model, stage.lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _dtype(model_config: Any) -> torch.dtype:
    """Of the published weights: the config's own."""
    dtype = model_config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

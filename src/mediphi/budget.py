"""Sizes of the model, without its weights, and what follows from them: FLOPs, state, disk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mediphi import hub
from mediphi.backbone import LOAD_ERRORS
from mediphi.batches import Batch, PreferenceBatch
from mediphi.config.schema import Config
from mediphi.config.stages import ChatStage, DpoStage
from mediphi.engine import Device, training_flops
from mediphi.errors import UserError
from mediphi.lora import add_adapters
from mediphi.strategies.memory import (
    FLOAT32,
    Sizes,
    added,
    layer_sizes,
    master_copy,
    reserved,
    splits,
)

KEPT_BYTES = {"32-true": (44, 16), "bf16-mixed": (30, 8)}
"""What a layer keeps for backward of a token: bytes for each unit of its hidden state, and of its
feed-forward state. Autocast leaves the residual stream and the norms in float32."""

STATE_BYTES = 12
"""Of a checkpoint for each trained parameter: float32 weight and AdamW's two moments."""

USABLE = 0.9
"""Share of a GPU's memory that may be filled by the estimate; the rest is for what it misses."""


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
        memory_bytes: of one process, by formulas; `planning/` looks closer.
        disk_bytes: run directory with checkpoints and model.
        recomputed_layers: those whose activations are recomputed in backward.
    """

    model_config: Any
    num_parameters: int
    num_matmul_parameters: int
    num_head_parameters: int
    num_adapter_parameters: int
    weights_dtype: torch.dtype
    memory_bytes: int
    disk_bytes: int
    recomputed_layers: int = 0

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient and AdamW's moments."""
        return self.num_adapter_parameters or self.num_parameters

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint: float32 weights and AdamW's two moments."""
        return STATE_BYTES * self.num_trained

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


def estimate(folder: str, *, config: Config, device: Device) -> Budget:
    """Size up the model of a folder or hub id without its weights, and plan the memory.

    Raises:
        UserError: no model config there.
    """
    try:
        model_config = AutoConfig.from_pretrained(
            folder,
            revision=config.model.revision,
            trust_remote_code=False,
            local_files_only=not hub.reachable(folder),
        )
    except LOAD_ERRORS as error:
        reason = _reason(error)
        raise UserError(f"model {folder}: no config can be loaded; {reason}") from error
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except Exception as error:  # a config's numbers can be wrong in any way
        raise UserError(f"model {folder}: no model fits config.json; {_reason(error)}") from None
    layers = layer_sizes(model)
    num_parameters = layers["parameters"]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    num_matmul = sum(m.weight.numel() for m in linear)
    num_adapter = _num_adapter_parameters(model, config)
    trained = num_adapter or num_parameters
    sizes = Sizes(trained=trained, **layers)
    state = STATE_BYTES * trained
    memory = partial(_memory_bytes, model_config, config, device, sizes=sizes, products=num_matmul)
    recomputed = _recomputed_layers(model_config.num_hidden_layers, config, device, memory=memory)
    keep = config.hardware.checkpoints.keep
    return Budget(
        model_config=model_config,
        num_parameters=num_parameters,
        num_matmul_parameters=num_matmul,
        num_head_parameters=model_config.vocab_size * model_config.hidden_size,
        num_adapter_parameters=num_adapter,
        weights_dtype=_dtype(model_config),
        memory_bytes=int(memory(recomputed=recomputed)),
        disk_bytes=state * (keep + 1) + 2 * num_parameters * 4,
        recomputed_layers=recomputed,
    )


def _num_adapter_parameters(model: PreTrainedModel, config: Config) -> int:
    """Without adapters 0; adapters that cannot be are refused here."""
    stage = config.stage
    if not isinstance(stage, ChatStage) or stage.lora is None:
        return 0
    add_adapters(model, stage.lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _num_copies(config: Config) -> int:
    """Models in memory: a live reference is a second one."""
    stage = config.stage
    return 2 if isinstance(stage, DpoStage) and stage.reference == "live" else 1


def _dtype(model_config: Any) -> torch.dtype:
    """Of the published weights: the config's own."""
    dtype = model_config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _memory_bytes(
    model_config: Any,
    config: Config,
    device: Device,
    *,
    sizes: Sizes,
    products: int,
    recomputed: int,
) -> float:
    """Of one process, by the items of `planning.memory`."""
    hardware = config.hardware
    state = FLOAT32 * (sizes.parameters + 3.0 * sizes.trained)  # gradients, AdamW's two moments
    state += master_copy(sizes, strategy=hardware.strategy)
    rounded = 2.0 * products if device.precision == "bf16-mixed" else 0.0
    if splits(hardware.strategy):
        state, rounded = state / config.world_size, 0.0
    if hardware.offload and device.type == "cuda":  # a CPU's parts are in main memory anyway
        state = 0.0
    kept = _activations(model_config, config, device, recomputed=recomputed)
    largest = max(
        _loss_bytes(model_config, config, device, sizes=sizes),
        _layer_bytes(model_config, config, device) if recomputed else 0,  # one at a time comes back
    )
    items = added(sizes, strategy=hardware.strategy, precision=device.precision)
    passing = rounded + kept + largest + sum(items.values())
    reference = FLOAT32 * sizes.parameters * (_num_copies(config) - 1)
    around = reserved(passing) if device.type == "cuda" else 0.0
    return state + reference + passing + around


def _recomputed_layers(
    layers: int, config: Config, device: Device, *, memory: Callable[..., float]
) -> int:
    """As few as the device has room for, unless the config says all or none."""
    wanted = config.hardware.activation_checkpointing
    if wanted is not None:
        return layers if wanted else 0
    if device.memory_bytes is None:
        return 0
    room = USABLE * device.memory_bytes
    return next((n for n in range(layers) if memory(recomputed=n) <= room), layers)


def _activations(model_config: Any, config: Config, device: Device, *, recomputed: int) -> int:
    """Kept of one micro-batch for backward; of a recomputed layer only its input."""
    kept = model_config.num_hidden_layers - recomputed
    inputs = recomputed * _tokens(config) * model_config.hidden_size * FLOAT32
    return kept * _layer_bytes(model_config, config, device) + inputs


def _layer_bytes(model_config: Any, config: Config, device: Device) -> int:
    per_hidden, per_intermediate = KEPT_BYTES[device.precision]
    widths = per_hidden * model_config.hidden_size
    return _tokens(config) * (widths + per_intermediate * model_config.intermediate_size)


def _loss_bytes(model_config: Any, config: Config, device: Device, *, sizes: Sizes) -> int:
    """A chunk's logits and what comes of them, the head's gradient, and that of hidden states."""
    chunk, hidden = min(device.loss_chunk_tokens, _tokens(config)), model_config.hidden_size
    is_trained = sizes.trained > sizes.root  # else adapters
    head = hidden * model_config.vocab_size * (6 if is_trained else 0)  # in float32 and bfloat16
    return 3 * FLOAT32 * chunk * model_config.vocab_size + head + 8 * _tokens(config) * hidden


def _tokens(config: Config) -> int:
    """Of a micro-batch at most: a prompt that is not shared stands in its row twice."""
    stage = config.training
    times = 2 if isinstance(stage, DpoStage) and not stage.share_prompt else 1
    return times * config.hardware.micro_batch * stage.max_length


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

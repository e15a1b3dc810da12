"""What the LightningModules of all training stages share: wiring, no mathematics."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from mediphi import attention
from mediphi.backbone import BackboneSpec, build_model, float32_buffers
from mediphi.batches import Batch
from mediphi.config.stages import Optimizer, Phase
from mediphi.modules.schedules import lr_factor
from mediphi.strategies.sharding import Sharded

WORTH_PADDING = 0.5


class CausalLMModule(L.LightningModule):
    """A causal LM with its optimizer, schedule and meters; a subclass adds the step.

    The loss of a micro-batch is its *sum* over targets (or pairs), divided by those of the global
    batch (all micro-batches, all ranks) and multiplied by `accumulate * world_size`, which
    Lightning and DDP divide by again. So one device with eight micro-batches and eight devices
    with one give the same gradient, however many targets each micro-batch holds.

    Args:
        backbone: what `configure_model` builds.
        phase: learning rate and schedule.
        optimizer: AdamW's numbers.
        num_steps: optimizer steps of the phase, from the plan (asking the trainer would restart
            the data on resume).
        splits: divisor that the trainer applies: micro-batches per step times ranks.
    """

    train_meter: Any  # a `Meter` of the subclass's choice
    heldout_meter: Any

    def __init__(
        self,
        *,
        backbone: BackboneSpec,
        phase: Phase,
        optimizer: Optimizer,
        num_steps: int,
        splits: int,
    ) -> None:
        super().__init__()
        self.spec, self.phase, self.optimizer_numbers = backbone, phase, optimizer
        self.num_steps, self.splits = num_steps, splits
        self.strict_loading = backbone.lora is None  # of adapters the frozen weights are not saved
        self._grad_norm = torch.tensor(0.0)
        self._norm_of_step: Tensor | None = None  # until the step is clipped
        self._last_lr = 0.0
        self.model: Any = None  # a PreTrainedModel once configure_model has run

    def configure_model(self) -> None:
        if self.model is None:
            build = build_model if self._sharded is None else self._sharded.build
            self.model = build(self.spec)

    def on_fit_start(self) -> None:
        """Two silent failures of this stack, looked at once: eval mode and bf16 RoPE buffers."""
        if asleep := [n for n, m in self.backbone.named_modules() if not m.training]:
            raise RuntimeError(f"{len(asleep)} modules are in eval mode, the first is {asleep[0]}")
        if rounded := float32_buffers(self.backbone):
            raise RuntimeError(f"rotary buffers are not float32: {', '.join(rounded)}")
        if self.global_rank:  # the same weights, but noise of its own; a resume restores it later
            torch.manual_seed(self.spec.seed + self.global_rank)
        self._norm_of_step = None

    @property
    def _sharded(self) -> Sharded | None:
        """The strategy, where it splits the model."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, Sharded) else None

    @property
    def backbone(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError("the model is built in configure_model, which has not run")
        return self.model

    @property
    def head(self) -> Tensor:
        """Weight of the output head, `[vocab, hidden]`."""
        return self.backbone.get_output_embeddings().weight  # type: ignore[union-attr,return-value]

    def hidden_states(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """Last hidden states of a packed row, `[tokens, hidden]`."""
        spec = self.spec
        return hidden_states(
            self.backbone,
            batch,
            spec.kernel,
            embeddings=embeddings,
            compiled_tokens=spec.compiled_tokens,
        )

    def gradient_norm(self) -> Float32[Tensor, ""]:
        """L2 norm of this optimizer step's gradients, before clipping; computed once a step."""
        if self._norm_of_step is None:
            if self._sharded is None:
                found = [p.grad for p in self.parameters() if p.grad is not None]
                self._norm_of_step = nn.utils.get_total_norm(found)
            else:
                self._norm_of_step = self._sharded.gradient_norm()
        return self._norm_of_step

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and keep the norm before clipping: it is a metric."""
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        self._grad_norm = self.gradient_norm()
        self._norm_of_step = None
        if self._sharded is None:
            trained = [p for p in self.parameters() if p.requires_grad]
            nn.utils.clip_grads_with_norm_(trained, limit, self._grad_norm)
        else:
            self._sharded.clip_gradients_to(limit, self._grad_norm)
        self._last_lr = optimizer.param_groups[0]["lr"]

    def take_metrics(self) -> dict[str, float]:
        """Means over the optimizer steps since the last call, over all ranks; then starts anew."""
        means = self.train_meter.means("train", self.trainer.strategy)
        self.train_meter.reset()
        return {**means, "lr": self._last_lr, "grad_norm": float(self._grad_norm)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rank 0 saves what all ranks have summed."""
        self._change_sums(
            checkpoint, lambda sums: self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Each rank, however many there are now, goes on with an equal share."""
        self._change_sums(checkpoint, lambda sums: sums / self.trainer.world_size)

    def _change_sums(self, checkpoint: dict[str, Any], change: Callable[[Tensor], Any]) -> None:
        state = checkpoint["state_dict"]
        for name in [n for n in state if n.startswith("train_meter.")]:
            state[name] = change(state[name])

    def on_validation_epoch_start(self) -> None:
        self.heldout_meter.reset()

    def on_validation_epoch_end(self) -> None:
        means = self.heldout_meter.means("heldout", self.trainer.strategy)
        for logger in self.trainer.loggers:
            logger.log_metrics(means, step=self.trainer.global_step)

    def configure_optimizers(self) -> dict[str, Any]:
        numbers = self.optimizer_numbers
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2]
        kept = [p for p in trained if p.ndim < 2]  # norms
        groups = [
            {"params": decayed, "weight_decay": numbers.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.phase.lr,
            betas=(numbers.beta1, numbers.beta2),
            eps=numbers.eps,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.phase, step, self.num_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def takes_padding(num_tokens: int, compiled_tokens: int) -> bool:
    """Whether a row is padded for compiled layers: not if it is longer, and not if it is shorter
    than half, as the filler of a rank without rows: that costs more than compiling can win."""
    return WORTH_PADDING * compiled_tokens <= num_tokens <= compiled_tokens


def hidden_states(
    backbone: PreTrainedModel,
    batch: Batch,
    kernel: attention.Kernel,
    *,
    embeddings: Tensor | None = None,
    compiled_tokens: int | None = None,
) -> Tensor:
    """Last hidden states of a packed row, `[tokens, hidden]`; without a cache, which would leak.

    Args:
        embeddings: those of `batch.input_ids` otherwise, `[1, tokens, hidden]`.
        compiled_tokens: positions that layers are compiled for. A row that `takes_padding` is
            padded to them with zeros, which no token attends to and no gradient comes from; another
            goes through the layers uncompiled, as it would compile them anew.
    """
    row = backbone.get_input_embeddings()(batch.input_ids) if embeddings is None else embeddings
    positions, tokens = batch.position_ids, compiled_tokens or batch.num_tokens
    is_padded = takes_padding(batch.num_tokens, tokens)
    if is_padded and (tail := tokens - batch.num_tokens):
        row, positions = F.pad(row, (0, 0, 0, tail)), F.pad(positions, (0, tail))
    with nullcontext() if is_padded else torch.compiler.set_stance("force_eager"):
        out = backbone.get_decoder()(
            inputs_embeds=row,
            position_ids=positions,
            use_cache=False,
            **attention.boundaries(batch, kernel),
        )
    return out.last_hidden_state[0, : batch.num_tokens]

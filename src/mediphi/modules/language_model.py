"""Next-token training: PIT, DAPT and SFT are this, on different targets."""

from typing import Any

from torch import Tensor

from mediphi.batches import TokenBatch
from mediphi.modules.causal_lm import CausalLMModule
from mediphi.modules.losses import CrossEntropy, chunked_cross_entropy
from mediphi.modules.meters import GroupNames, TokenMeter
from mediphi.modules.neftune import add_neftune_noise


class LanguageModelModule(CausalLMModule):
    """Cross-entropy of the targets of packed rows; logits exist at targets only.

    Args:
        group_names: names of `kind_ids` (key `kind`), `source_ids` and `task_ids` in metrics.
        neftune_alpha: 0 switches the noise off (Jain et al. 2023).
        options: of `CausalLMModule`.
    """

    def __init__(
        self, *, group_names: GroupNames, neftune_alpha: float = 0.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.neftune_alpha = neftune_alpha
        self.train_meter = TokenMeter(group_names)
        self.heldout_meter = TokenMeter(group_names)

    def loss(self, batch: TokenBatch) -> CrossEntropy:
        """Cross-entropy of one micro-batch: the sum over its targets, and each one's own."""
        embeddings = self.backbone.get_input_embeddings()(batch.input_ids)
        if self.training and self.neftune_alpha:
            embeddings = add_neftune_noise(embeddings, batch.cu_seqlens, self.neftune_alpha)
        return chunked_cross_entropy(
            self.hidden_states(batch, embeddings).index_select(0, batch.target_index),
            self.head,
            batch.label_ids,
            chunk_tokens=self.spec.loss_chunk_tokens,
        )

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        out = self.loss(batch)
        self.train_meter.update(out, batch)
        return out.total * (self.splits / batch.num_global_targets)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.heldout_meter.update(self.loss(batch), batch)

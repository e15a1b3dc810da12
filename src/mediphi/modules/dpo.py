"""Direct preference optimisation on packed pairs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from mediphi.backbone import BackboneSpec, build_model
from mediphi.batches import PreferenceBatch
from mediphi.modules.causal_lm import CausalLMModule, hidden_states
from mediphi.modules.losses import token_logps
from mediphi.modules.meters import GroupNames, PairMeter
from mediphi.modules.preference_losses import PairLogps, PairLoss, PreferenceLoss, dpo_loss


class Objective(NamedTuple):
    """What is minimised; see `dpo_loss`.

    Attributes:
        sft_weight: weight of the chosen answer's cross-entropy per token, a mean over each answer
            and then over pairs; not part of the logged loss.
        uses_reference: False: log-probabilities of the reference count as 0.
    """

    loss: PairLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    sft_weight: float = 0.0
    uses_reference: bool = True


class ScoredPairs(NamedTuple):
    """Summed log-probabilities of both answers of these rows of the token store."""

    document_index: Int64[Tensor, " pairs"]
    logps: Float32[Tensor, "pairs 2"]


class DpoModule(CausalLMModule):
    """Preference loss of packed pairs, averaged over the pairs of the whole global batch.

    `predict_step` gives the log-probabilities of the answers: with a reference model's weights,
    the reference's.

    Args:
        objective: what is minimised.
        live_reference: build this model too and ask it beside every step; None: batches bring
            the reference's log-probabilities along.
        group_names: names of `source_ids` (key `source`), `error_ids` and `task_ids` in metrics.
        options: of `CausalLMModule`.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        group_names: GroupNames,
        live_reference: BackboneSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.objective, self.live_reference = objective, live_reference
        has_reference = objective.uses_reference
        self.train_meter = PairMeter(group_names, has_reference=has_reference)
        self.heldout_meter = PairMeter(group_names, has_reference=has_reference)
        # Not a submodule: neither trained nor saved.
        self._reference: tuple[Any, ...] = ()

    def configure_model(self) -> None:
        super().configure_model()
        if self.live_reference is not None and not self._reference:
            self._reference = (build_model(self.live_reference).eval().requires_grad_(False),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the reference with the module: Lightning validates before `on_fit_start`."""
        for reference in self._reference:
            reference._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def logps(self, batch: PreferenceBatch, model: Any = None) -> PairLogps:
        """Log-probabilities of both answers; logits exist at answer tokens only."""
        model = self.backbone if model is None else model
        compiled_tokens = self.spec.compiled_tokens
        hidden = hidden_states(model, batch, self.spec.kernel, compiled_tokens=compiled_tokens)
        per_token = token_logps(
            hidden.index_select(0, batch.logit_index),
            model.get_output_embeddings().weight,
            batch.label_ids,
            chunk_tokens=self.spec.loss_chunk_tokens,
        )
        sums = per_token.new_zeros(2 * batch.num_pairs).index_add(0, batch.answer_ids, per_token)
        ones = torch.ones_like(batch.answer_ids)
        sizes = ones.new_zeros(2 * batch.num_pairs).index_add(0, batch.answer_ids, ones)
        return PairLogps(sums[0::2], sums[1::2], sizes[0::2], sizes[1::2])

    def loss(self, batch: PreferenceBatch) -> tuple[PreferenceLoss, PairLogps, PairLogps | None]:
        """The preference loss of every pair, and what it was made of."""
        policy, o = self.logps(batch), self.objective
        reference = self._reference_logps(batch, policy)
        loss = dpo_loss(
            policy,
            reference,
            loss=o.loss,
            beta=o.beta,
            label_smoothing=o.label_smoothing,
            length_normalised=o.length_normalised,
        )
        return loss, policy, reference

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        loss, policy, reference = self.loss(batch)
        self.train_meter.update(loss, policy, reference, batch)
        losses = loss.losses
        if self.objective.sft_weight:
            losses = losses - self.objective.sft_weight * policy.chosen / policy.num_chosen
        return losses.sum() * (self.splits / batch.num_global_targets)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.heldout_meter.update(*self.loss(batch), batch)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> ScoredPairs:
        logps = self.logps(batch)
        both = torch.stack([logps.chosen, logps.rejected], dim=1).float()
        return ScoredPairs(batch.document_index.cpu(), both.cpu())

    def _reference_logps(self, batch: PreferenceBatch, policy: PairLogps) -> PairLogps | None:
        if not self.objective.uses_reference:
            return None
        if self._reference:
            with torch.no_grad():
                return self.logps(batch, self._reference[0])
        logps = batch.reference_logps.to(policy.chosen.dtype)
        return policy._replace(chosen=logps[:, 0], rejected=logps[:, 1])

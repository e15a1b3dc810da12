"""Means over tokens or pairs, in all and per group: sums and counts, divided once at the end.

Averaging the means of micro-batches would weigh a short batch like a long one; sums do not. The
sums are float64 buffers: they follow the module's device, and are saved with it, so that a run that
was stopped between two logged rows goes on with the same numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from mediphi.batches import PreferenceBatch, TokenBatch
from mediphi.modules.losses import CrossEntropy
from mediphi.modules.preference_losses import PairLogps, PreferenceLoss

GroupNames = Mapping[str, Sequence[str]]
UNNAMED = "other"
"""Name of the group of rows that name none."""


class Meter(nn.Module):
    """Sums per group; one row for everything that is summed.

    Args:
        group_names: names of each grouping's ids. One in which no row has a name is left out of
            the metrics.
        rows: names of what is summed.
    """

    sums: Tensor

    def __init__(self, group_names: GroupNames, *, rows: Sequence[str]) -> None:
        super().__init__()
        self.group_names, self.rows = group_names, tuple(rows)
        self._starts: dict[str, int] = {}
        size = 0
        for grouping, names in group_names.items():
            self._starts[grouping] = size
            size += len(names)
        self.register_buffer("sums", torch.zeros(len(rows), size, dtype=torch.float64))

    def reset(self) -> None:
        self.sums.zero_()

    def is_named(self, grouping: str) -> bool:
        return any(self.group_names[grouping])

    def add(
        self, values: Float64[Tensor, "rows items"], ids: Mapping[str, Int64[Tensor, " items"]]
    ) -> None:
        """Add the items to their group in every grouping."""
        for grouping, start in self._starts.items():
            self.sums.index_add_(1, ids[grouping] + start, values)

    def reduced(self, strategy: Any) -> dict[str, dict[str, dict[str, float]]]:
        """Grouping -> name -> row -> sum over all ranks; groups without items are left out."""
        sums = self.sums if strategy is None else strategy.reduce(self.sums, reduce_op="sum")
        columns = sums.T.tolist()
        return {
            grouping: {
                name or UNNAMED: dict(zip(self.rows, column, strict=True))
                for name, column in zip(names, columns[self._starts[grouping] :], strict=False)
                if any(column)
            }
            for grouping, names in self.group_names.items()
        }


class TokenMeter(Meter):
    """Loss and accuracy per token.

    Args:
        group_names: `kind` (of text), `source` and, where rows have one, `task`.
    """

    def __init__(self, group_names: GroupNames) -> None:
        super().__init__(group_names, rows=("loss", "tokens", "correct"))

    @torch.no_grad()
    def update(self, out: CrossEntropy, batch: TokenBatch) -> None:
        """Add one micro-batch."""
        losses = out.per_target.double()
        values = torch.stack([losses, torch.ones_like(losses), out.correct.double()])
        columns = {"kind": batch.kind_ids, "source": batch.source_ids, "task": batch.task_ids}
        at = batch.target_index
        self.add(values, {n: ids[0].index_select(0, at).long() for n, ids in columns.items()})

    def means(self, split: str, strategy: Any = None) -> dict[str, float]:
        """`<split>/loss`, `/perplexity` and `/accuracy`, in all and per group, over all ranks."""
        groups = self.reduced(strategy)
        total = _total(groups["source"], self.rows)
        if not total["tokens"]:
            return {}
        metrics = _token_means(split, "", total)
        for grouping, members in groups.items():
            if self.is_named(grouping):
                for name, sums in members.items():
                    if sums["tokens"]:
                        metrics |= _token_means(split, f"/{grouping}/{name}", sums)
        return metrics


class PairMeter(Meter):
    """Preference loss, rewards, accuracy and log-probabilities of pairs.

    Args:
        group_names: `source`, `error` (type of the rejected answer) and `task`.
        has_reference: without one there is no log-ratio to tell.
    """

    ROWS = (
        "pairs",
        "loss",
        "chosen_reward",
        "rejected_reward",
        "correct",
        "chosen_logp",
        "rejected_logp",
        "chosen_tokens",
        "rejected_tokens",
        "log_ratio",
        "sft_loss",
    )

    def __init__(self, group_names: GroupNames, *, has_reference: bool = True) -> None:
        super().__init__(group_names, rows=self.ROWS)
        self.has_reference = has_reference

    @torch.no_grad()
    def update(
        self,
        loss: PreferenceLoss,
        policy: PairLogps,
        reference: PairLogps | None,
        batch: PreferenceBatch,
    ) -> None:
        """Add one micro-batch."""
        margin = loss.chosen_rewards - loss.rejected_rewards
        ratio = torch.zeros_like(margin)
        if reference is not None:
            ratio = policy.chosen - reference.chosen + policy.rejected - reference.rejected
        rows = (
            torch.ones_like(margin),
            loss.losses,
            loss.chosen_rewards,
            loss.rejected_rewards,
            preferred(margin),
            policy.chosen,
            policy.rejected,
            policy.num_chosen,
            policy.num_rejected,
            ratio,
            -policy.chosen / policy.num_chosen,
        )
        ids = {
            "source": batch.source_ids.long(),
            "error": batch.error_ids.long(),
            "task": batch.task_ids.long(),
        }
        self.add(torch.stack([row.double() for row in rows]), ids)

    def means(self, split: str, strategy: Any = None) -> dict[str, float]:
        """Means per pair, log-probabilities also per token, in all and per group."""
        groups = self.reduced(strategy)
        total = _total(groups["source"], self.rows)
        if not total["pairs"]:
            return {}
        shown = [("", total)]
        for grouping in ("error", "task"):
            if self.is_named(grouping):
                shown += [(f"/{grouping}/{name}", own) for name, own in groups[grouping].items()]
        means: dict[str, float] = {}
        for group, sums in shown:
            for name, value in _pair_means(sums, has_reference=self.has_reference).items():
                means[f"{split}/{name}{group}"] = value
        return means


def preferred(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """1 where the chosen answer has the larger reward, one half where they are equal."""
    return (margin > 0).to(margin.dtype) + (margin == 0).to(margin.dtype) / 2


def _total(members: Mapping[str, Mapping[str, float]], rows: Sequence[str]) -> dict[str, float]:
    return {row: sum((sums[row] for sums in members.values()), 0.0) for row in rows}


def _token_means(split: str, group: str, sums: Mapping[str, float]) -> dict[str, float]:
    loss = sums["loss"] / sums["tokens"]
    return {
        f"{split}/loss{group}": loss,
        f"{split}/perplexity{group}": math.exp(min(loss, 700.0)),  # beyond, a float64 overflows
        f"{split}/accuracy{group}": sums["correct"] / sums["tokens"],
    }


def _pair_means(sums: Mapping[str, float], *, has_reference: bool) -> dict[str, float]:
    pairs = sums["pairs"]
    means = {
        "loss": sums["loss"] / pairs,
        "sft_loss": sums["sft_loss"] / pairs,
        "margin": (sums["chosen_reward"] - sums["rejected_reward"]) / pairs,
        "accuracy": sums["correct"] / pairs,
    }
    for side in ("chosen", "rejected"):
        means[f"reward/{side}"] = sums[f"{side}_reward"] / pairs
        means[f"logps/{side}"] = sums[f"{side}_logp"] / pairs
        means[f"logps_per_token/{side}"] = sums[f"{side}_logp"] / sums[f"{side}_tokens"]
    if has_reference:
        tokens = sums["chosen_tokens"] + sums["rejected_tokens"]
        means["kl"] = sums["log_ratio"] / tokens
    return means

"""The one data module of all training stages."""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray

from mediphi.batches import Batch
from mediphi.data.groups import GroupNames, group_names
from mediphi.data.loader import NO_DOCUMENT, PackedLoader, ResumableLoader
from mediphi.data.plan import PlanSettings, Position, TrainingPlan
from mediphi.data.tokens import TokenStore


class References(NamedTuple):
    """Log-probabilities of the answers of both sides, float32 `[documents, 2]` each."""

    train: NDArray[np.float32]
    heldout: NDArray[np.float32]


class PackedDataModule(LightningDataModule):
    """Packed rows of one phase. One Lightning epoch is the whole phase: `max_epochs=1`.

    Args:
        train: store to train on.
        heldout: store to validate on, or None.
        settings: of the training plan. Validation uses the same kinds and row size, one epoch,
            no weights, the same rows in the same order every time.
        max_heldout_rows: rows that validation reads.
        references: log-probabilities of the pairs of each store under the reference model, float32
            `[documents, 2]`.
        prefetch: batches that a thread prepares ahead; 0: none.
    """

    def __init__(
        self,
        train: TokenStore,
        *,
        heldout: TokenStore | None,
        settings: PlanSettings,
        max_heldout_rows: int = 64,
        references: References | None = None,
        prefetch: int = 0,
    ) -> None:
        super().__init__()
        self.references = references
        self.train = train
        self.heldout = heldout
        self.settings = settings
        self.max_heldout_rows = max_heldout_rows
        self.prefetch = prefetch

    @cached_property
    def group_names(self) -> GroupNames:
        """Names that the ids of a batch index, in training and validation."""
        return group_names([store for store in (self.train, self.heldout) if store is not None])

    @cached_property
    def train_plan(self) -> TrainingPlan:
        return TrainingPlan(self.train, self.settings)

    @cached_property
    def heldout_plan(self) -> TrainingPlan | None:
        """None when nothing is held out."""
        if self.heldout is None or self.heldout.num_tokens == 0:
            return None
        settings = replace(
            self.settings,
            global_batch=self.settings.micro_batch * self.settings.world_size,
            epochs=1,
            seed=0,
            weights={},
            max_rows=self.max_heldout_rows,
            max_steps=None,
        )
        return TrainingPlan(self.heldout, settings)

    @property
    def max_tokens(self) -> int:
        """Of a micro-batch at most, in training and validation."""
        plans = (self.train_plan, self.heldout_plan)
        return max(plan.max_tokens for plan in plans if plan is not None)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank.

        Raises:
            ValueError: the Trainer accumulates or shares out differently from the plan.
        """
        self._check_trainer()
        return ResumableLoader(
            self.train_plan,
            rank=self._rank,
            group_names=self.group_names,
            reference=self.references and self.references.train,
            prefetch=self.prefetch,
        )

    def val_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """Held-out batches of this rank; an empty list when nothing is held out.

        The Trainer then wants `limit_val_batches=0`: Lightning warns about empty loaders.
        """
        if self.heldout_plan is None:
            return []
        return PackedLoader(
            self.heldout_plan,
            rank=self._rank,
            group_names=self.group_names,
            reference=self.references and self.references.heldout,
        )

    def position(self, step: int) -> Position:
        """Position in the training data after so many optimizer steps."""
        return self.train_plan.position(step)

    def document_ids(self, batch: Batch) -> list[str]:
        """Which training documents a batch holds, to name them in an error."""
        rows = torch.unique(batch.document_index).tolist()
        return [self.train.document_id(row) for row in rows if row != NO_DOCUMENT]

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _check_trainer(self) -> None:
        if self.trainer is None:
            return
        planned = (self.settings.world_size, self.train_plan.accumulate)
        actual = (self.trainer.world_size, self.trainer.accumulate_grad_batches)
        if planned != actual:
            raise ValueError(f"(world_size, accumulate) is {actual}, the plan has {planned}")

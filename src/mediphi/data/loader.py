"""Turn a plan into batches, from any position."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mediphi.batches import IGNORE, Batch, TokenBatch
from mediphi.data.groups import GroupIds, GroupNames
from mediphi.data.packing import expand
from mediphi.data.pairs import collate_pairs
from mediphi.data.plan import Chunks, TrainingPlan
from mediphi.data.prefetch import ahead
from mediphi.errors import ArtifactError
from mediphi.records import PIECE_KINDS

NO_DOCUMENT = -1
"""`document_index` of the filler in a micro-batch that has no rows."""


class PackedLoader:
    """All micro-batches of a plan for one rank, always from the first.

    Args:
        plan: what to train on.
        rank: which share of every step.
        group_names: names that the ids of a batch index: `source` and those of `LABELS`; the
            store's own when None.
        reference: float32 `[documents, 2]`, log-probabilities of each pair's answers under the
            reference model.
        prefetch: batches that a thread prepares ahead; 0: none.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        *,
        rank: int = 0,
        group_names: GroupNames | None = None,
        reference: np.ndarray | None = None,
        prefetch: int = 0,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self._ids = GroupIds(plan.store, group_names)
        self._reference = reference
        self._prefetch = prefetch

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.accumulate

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._from(0))

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index` of this rank."""
        plan = self.plan
        step, part = divmod(index, plan.accumulate)
        rows = plan.micro_batch(step, index=part, rank=self.rank)
        targets = plan.num_global_targets(step)
        if plan.settings.layout in ("pairs", "shared_pairs"):
            return collate_pairs(
                plan,
                plan.chunks(rows),
                ids=self._ids,
                num_global_targets=targets,
                reference=self._reference,
            )
        if not len(rows):
            return filler(plan.store.eos_id, num_global_targets=targets)
        return collate(plan, plan.chunks(rows), ids=self._ids, num_global_targets=targets)

    def _from(self, first: int) -> Iterator[Batch]:
        return ahead((self[i] for i in range(first, len(self))), depth=self._prefetch)


class ResumableLoader(PackedLoader):
    """A `PackedLoader` that goes on where its state says.

    `consumed` counts the batches handed out. Lightning fetches no batch in advance from a loader
    of known length, so in any hook after the step, handed out means trained; a prefetched batch
    is not counted before it is handed out.
    """

    def __init__(self, plan: TrainingPlan, **options: Any) -> None:
        super().__init__(plan, **options)
        self.consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._from(self.consumed):
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank."""
        return {
            "consumed": self.consumed,
            "accumulate": self.plan.accumulate,
            "fingerprint": self.plan.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last trained optimizer step, however ranks share out its rows now.

        Raises:
            ArtifactError: the state belongs to other data, or lies inside a step.
        """
        if state["fingerprint"] != self.plan.fingerprint:
            raise ArtifactError(
                "checkpoint: its data, order or global batch differ from this run's; "
                "restore them or start afresh with on_existing=overwrite"
            )
        steps, rest = divmod(state["consumed"], state["accumulate"])
        if rest:
            raise ArtifactError(
                f"checkpoint: made inside an optimizer step (micro-batch {state['consumed']} of "
                f"{state['accumulate']} per step), its gradients are lost; use the one before it"
            )
        self.consumed = steps * self.plan.accumulate


def collate(
    plan: TrainingPlan, chunks: Chunks, *, ids: GroupIds, num_global_targets: int
) -> TokenBatch:
    """Lay chunks end to end; each is a sequence of its own.

    Targets are the next token of the same chunk, through the EOS between pieces of one document;
    `IGNORE` at the end of every chunk, and where the next token is not to be learnt.
    """
    store, settings = plan.store, plan.settings
    ends = np.cumsum(chunks.length)
    address = expand(chunks.address, chunks.length)
    input_ids = store.gather(address)
    targets = np.append(input_ids[1:], IGNORE)
    targets[ends - 1] = IGNORE
    piece = np.searchsorted(store.piece_starts, address + 1, side="right") - 1
    piece = np.minimum(piece, len(store.piece_kinds) - 1)
    kinds = store.piece_kinds[piece]
    if settings.layout == "chat":
        is_learnt = np.isin(np.arange(len(PIECE_KINDS)), [*map(PIECE_KINDS.index, settings.learnt)])
        targets[~is_learnt[kinds]] = IGNORE
    row = {
        "input_ids": input_ids,
        "target_ids": targets,
        "position_ids": expand(np.zeros_like(chunks.length), chunks.length),
        "kind_ids": kinds,
        "source_ids": ids.sources[store.piece_sources[piece]],
        "task_ids": np.repeat(ids.of(chunks.document, "task_type"), chunks.length),
    }
    return TokenBatch(
        **{name: torch.from_numpy(values).unsqueeze(0) for name, values in row.items()},
        target_index=torch.from_numpy(np.flatnonzero(targets != IGNORE)),
        cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
        lengths=tuple(chunks.length.tolist()),
        max_seqlen=int(chunks.length.max()),
        num_global_targets=num_global_targets,
        document_index=torch.from_numpy(chunks.document),
    )


def filler(eos_id: int, *, num_global_targets: int) -> TokenBatch:
    """A valid batch without a target, for a rank that has no rows left in a step."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    no_group = zero.to(torch.uint8)
    return TokenBatch(
        input_ids=zero + eos_id,
        target_ids=zero + IGNORE,
        position_ids=zero,
        kind_ids=no_group,
        source_ids=no_group,
        task_ids=no_group,
        target_index=zero[0, :0],
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        lengths=(1,),
        max_seqlen=1,
        num_global_targets=num_global_targets,
        document_index=torch.tensor([NO_DOCUMENT]),
    )

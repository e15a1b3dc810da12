"""Preference pairs of a plan -> one packed row, the prompt once or twice."""

import numpy as np
import torch

from mediphi.batches import PreferenceBatch
from mediphi.data.groups import GroupIds
from mediphi.data.packing import Ints, expand
from mediphi.data.plan import Chunks, TrainingPlan

_SEPARATE = [[0, 1], [0, 2]]
_SHARED = [[0], [1], [2]]
"""Which of prompt, chosen and rejected make up each run of tokens."""


def collate_pairs(
    plan: TrainingPlan,
    chunks: Chunks,
    *,
    ids: GroupIds,
    num_global_targets: int,
    reference: np.ndarray | None,
) -> PreferenceBatch:
    """Lay pairs end to end. A rank that has no rows left in a step gets a batch without pairs.

    Args:
        reference: float32 `[documents, 2]`; None: nobody has computed them.
    """
    shared = plan.settings.layout == "shared_pairs"
    parts = chunks.parts
    starts = chunks.address[:, None] + np.cumsum(parts, axis=1) - parts
    order = [part for run in (_SHARED if shared else _SEPARATE) for part in run]
    # Tokens in the row: runs of prompt, chosen and rejected, pair by pair.
    sizes = parts[:, order].flatten()
    first_positions = np.where(np.array(order) == 0, 0, parts[:, :1])
    positions = expand(first_positions.flatten(), sizes)
    input_ids = plan.store.gather(expand(starts[:, order].flatten(), sizes))
    ends = np.cumsum(sizes).reshape(-1, len(order))
    runs = ends if shared else ends[:, [1, 3]]
    logit_index, label_place = _answers(parts, ends, shared=shared)
    pairs = len(parts)
    if not pairs:  # attention needs a token
        input_ids, positions = np.array([plan.store.eos_id]), np.zeros(1, np.int64)
        runs = np.ones(1, np.int64)
    logps = np.full((pairs, 2), np.nan, dtype=np.float32)
    if reference is not None:
        logps = np.asarray(reference[chunks.document], dtype=np.float32)
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(np.append(0, runs).astype(np.int32)),
        lengths=tuple(np.diff(runs.flatten(), prepend=0).tolist()),
        max_seqlen=int((parts[:, 0] + parts[:, 1:].max(axis=1)).max()) if pairs else 1,
        shares_prompt=shared and pairs > 0,
        logit_index=torch.from_numpy(logit_index),
        label_ids=torch.from_numpy(input_ids[label_place]),
        answer_ids=torch.from_numpy(np.repeat(np.arange(2 * pairs), parts[:, 1:].flatten())),
        reference_logps=torch.from_numpy(logps),
        num_global_targets=num_global_targets,
        document_index=torch.from_numpy(chunks.document),
        source_ids=torch.from_numpy(_sources(plan, chunks.document, ids)),
        task_ids=torch.from_numpy(ids.of(chunks.document, "task_type")),
        error_ids=torch.from_numpy(ids.of(chunks.document, "error_type")),
    )


def _answers(parts: Ints, ends: Ints, *, shared: bool) -> tuple[Ints, Ints]:
    """Of every answer token: where its logits stand, and where it stands itself.

    The logits are one place before the token; those of an answer's first token stand at the
    prompt's last, which is elsewhere for the rejected answer behind a shared prompt.
    """
    answers = [1, 2] if shared else [1, 3]
    sizes = parts[:, 1:]
    starts = ends[:, answers] - sizes
    places = expand(starts.flatten(), sizes.flatten())
    logits = places - 1
    if shared:
        firsts = (np.cumsum(sizes.flatten()) - sizes.flatten()).reshape(-1, 2)
        logits[firsts] = ends[:, :1] - 1
    return logits, places


def _sources(plan: TrainingPlan, documents: Ints, ids: GroupIds) -> np.ndarray:
    place = np.searchsorted(plan.sequences.document, documents)
    return ids.sources[plan.sequences.source[place]]

"""The quiz on a model folder: build the model, feed packed rows, keep accuracies."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mediphi import attention
from mediphi.backbone import BackboneSpec, build_model
from mediphi.batches import IGNORE, TokenBatch
from mediphi.engine import Device
from mediphi.evaluate.multiple_choice import ScoredQuestion, TokenLogps, score
from mediphi.modules.row_logps import row_logps
from mediphi.records import MultipleChoice

TOKENS_PER_PASS = 8192


def score_quiz(
    backbone: BackboneSpec,
    *,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[MultipleChoice],
    device: Device,
) -> list[ScoredQuestion]:
    """What a model answers to every question."""
    model = build_model(backbone).eval()
    model.to(device.type)  # type: ignore[arg-type]
    return score(
        questions,
        tokenizer=tokenizer,
        token_logps=packed_logps(model, device),
        max_tokens_per_pass=TOKENS_PER_PASS,
    )


def packed_logps(model: PreTrainedModel, device: Device) -> TokenLogps:
    """Log-probabilities of whole sequences from one packed row, without padding or full logits.

    float32 weights and, where the training uses it, the same bf16 autocast.
    """
    autocast = device.precision == "bf16-mixed"

    def logps(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        batch = _flat(sequences).to(device.type)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        flat = row_logps(
            model,
            inputs | attention.boundaries(batch, device.kernel),
            index=batch.target_index,
            label_ids=batch.label_ids,
            autocast=autocast,
        )
        ends = np.cumsum([n - 1 for n in batch.lengths])
        return np.split(flat.cpu().numpy(), ends[:-1])

    return logps


def _flat(sequences: Sequence[Sequence[int]]) -> TokenBatch:
    lengths = np.array([len(s) for s in sequences])
    ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    targets = np.append(ids[1:], IGNORE)
    targets[ends[1:] - 1] = IGNORE
    positions = np.arange(len(ids)) - np.repeat(ends[:-1], lengths)
    zeros = torch.zeros(1, len(ids), dtype=torch.uint8)
    return TokenBatch(
        input_ids=torch.from_numpy(ids)[None],
        target_ids=torch.from_numpy(targets)[None],
        position_ids=torch.from_numpy(positions)[None],
        kind_ids=zeros,
        source_ids=zeros,
        task_ids=zeros,
        target_index=torch.from_numpy(np.flatnonzero(targets != IGNORE)),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        lengths=tuple(lengths.tolist()),
        max_seqlen=int(lengths.max()),
        num_global_targets=len(ids) - len(sequences),
        document_index=torch.arange(len(sequences)),
    )

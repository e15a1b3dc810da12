"""The contract between data and modules: what a batch holds.

A batch is one flat row `[1, T]` of whole sequences laid end to end (varlen layout): no padding, and
attention must stay within `cu_seqlens`. Flash attention treats packed rows as packed only in this
shape.

What the host has to know about a batch is in it as plain numbers: asking the device would stop the
host until all queued work is done.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float32, Int32, Int64, UInt8
from torch import Tensor

IGNORE = -100
"""Target of a position without a loss (PyTorch's `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One micro-batch of packed sequences.

    Attributes:
        input_ids: tokens of all sequences, end to end.
        target_ids: the *next* token of the same sequence, `IGNORE` at its end and wherever no loss
            is wanted. Already shifted.
        position_ids: restart at 0 with every sequence.
        kind_ids: index into `records.PIECE_KINDS` of each target.
        source_ids: index into the data module's source names of each target.
        task_ids: index into the data module's task types of each target; 0 where rows name none.
        target_index: positions of the row with a loss, ascending.
        cu_seqlens: sequence boundaries, 0 first and T last.
        lengths: tokens of each sequence.
        max_seqlen: longest sequence.
        num_global_targets: positions with a loss in the whole global batch, over all
            micro-batches and ranks: the denominator of the token mean.
        document_index: row of each sequence in the token store, to name it in errors.
    """

    input_ids: Int64[Tensor, "1 tokens"]
    target_ids: Int64[Tensor, "1 tokens"]
    position_ids: Int64[Tensor, "1 tokens"]
    kind_ids: UInt8[Tensor, "1 tokens"]
    source_ids: UInt8[Tensor, "1 tokens"]
    task_ids: UInt8[Tensor, "1 tokens"]
    target_index: Int64[Tensor, " targets"]
    cu_seqlens: Int32[Tensor, " sequences_plus_1"]
    lengths: tuple[int, ...]
    max_seqlen: int
    num_global_targets: int
    document_index: Int64[Tensor, " sequences"]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def label_ids(self) -> Int64[Tensor, " targets"]:
        """The tokens to be predicted, in the order of `target_index`."""
        return self.target_ids[0].index_select(0, self.target_index)

    def to(self, device: torch.device | str) -> "TokenBatch":
        return replace(self, **_sent(self, device))


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """One micro-batch of preference pairs in a packed row.

    A pair is two sequences, prompt + chosen and prompt + rejected; or, where the prompt is shared,
    three segments, prompt, chosen and rejected, of which both answers see the prompt and not one
    another. Answer tokens are listed pair by pair, chosen before rejected.

    Attributes:
        input_ids, position_ids: as in a `TokenBatch`.
        cu_seqlens: boundaries of sequences, `2 * pairs + 1`, or of segments, `3 * pairs + 1`.
        lengths: tokens of each sequence or segment.
        max_seqlen: longest sequence, prompt and answer.
        shares_prompt: which of the two.
        logit_index: position of the row whose logits predict each answer token.
        label_ids: the answer tokens.
        answer_ids: `2 * pair + side` of each answer token; side 1 is rejected.
        reference_logps: summed log-probabilities of both answers under the reference; NaN where
            nobody has computed them.
        num_global_targets: pairs in the whole global batch, over all micro-batches and ranks.
        document_index: row of each pair in the token store.
        source_ids, task_ids, error_ids: of each pair, indices into the data module's names.
    """

    input_ids: Int64[Tensor, "1 tokens"]
    position_ids: Int64[Tensor, "1 tokens"]
    cu_seqlens: Int32[Tensor, " boundaries"]
    lengths: tuple[int, ...]
    max_seqlen: int
    shares_prompt: bool
    logit_index: Int64[Tensor, " answer_tokens"]
    label_ids: Int64[Tensor, " answer_tokens"]
    answer_ids: Int64[Tensor, " answer_tokens"]
    reference_logps: Float32[Tensor, "pairs 2"]
    num_global_targets: int
    document_index: Int64[Tensor, " pairs"]
    source_ids: UInt8[Tensor, " pairs"]
    task_ids: UInt8[Tensor, " pairs"]
    error_ids: UInt8[Tensor, " pairs"]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        return len(self.document_index)

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        return replace(self, **_sent(self, device))


Batch = TokenBatch | PreferenceBatch


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, without waiting for a GPU.

    From pinned memory the copy only joins the GPU's queue; from any other the host waits for all
    that is queued before it.
    """
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _sent(batch: Any, device: torch.device | str) -> dict[str, Tensor]:
    """All tensors of a batch; to a GPU beside what it computes, before which they are there."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if torch.device(device).type != "cuda":
        return {name: send(tensor, device) for name, tensor in tensors.items()}
    now, copies = torch.cuda.current_stream(device), _copy_stream(torch.device(device))
    with torch.cuda.stream(copies):
        sent = {name: send(tensor, device) for name, tensor in tensors.items()}
    now.wait_stream(copies)
    for tensor in sent.values():
        tensor.record_stream(now)  # its memory is not given anew while `now` may read it
    return sent


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""Losses as pure functions on tensors.

The output head is multiplied with `chunk_tokens` hidden states at a time, so that the logits of
all tokens never exist together. Products are in the autocast dtype, the softmax and everything
after it in float32 (float64 inputs: float64).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


class CrossEntropy(NamedTuple):
    """`total` carries the gradient; the others are detached.

    `correct`: the target has the largest logit. Of equal logits the first in the vocabulary
    counts, as in greedy decoding; bfloat16 makes equal logits common.
    """

    total: Float[Tensor, ""]
    per_target: Float[Tensor, " targets"]
    correct: Bool[Tensor, " targets"]


def chunked_cross_entropy(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocab hidden"],
    target_ids: Int64[Tensor, " targets"],
    *,
    chunk_tokens: int,
) -> CrossEntropy:
    """Sum of next-token cross-entropy without ever holding the whole logits matrix.

    The gradient of the logits is taken in the forward pass (they are alive there), so backward
    recomputes nothing.

    Without any target the sum is 0 and has zero gradients: a rank that has no rows left in a step
    takes part in it like the others. That a whole step has none is `FiniteGuard`'s to refuse.
    """
    needs_grad = torch.is_grad_enabled()
    out = _ChunkedCrossEntropy.apply(hidden, weight, target_ids, chunk_tokens, needs_grad)
    return CrossEntropy(*out)


def token_logps(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocab hidden"],
    target_ids: Int64[Tensor, " targets"],
    *,
    chunk_tokens: int,
) -> Float[Tensor, " targets"]:
    """Log-probability of each target.

    For losses whose gradient differs from token to token and is known only after the forward pass,
    as in DPO: backward recomputes the logits of one chunk after another, at the cost of one more
    product with the head. `hidden` and `weight` are kept until then.
    """
    return _RecomputedLogps.apply(hidden, weight, target_ids, chunk_tokens)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _exact_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _Chunk(NamedTuple):
    rows: slice
    targets: Tensor  # [chunk, 1]
    logps: Tensor  # [chunk, vocab]

    def target_logps(self) -> Tensor:
        return self.logps.gather(1, self.targets).squeeze(1)


def _chunks(hidden: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int) -> Iterator[_Chunk]:
    for start in range(0, len(targets), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden[rows].to(head.dtype)
            logps = torch.log_softmax((inputs @ head.T).to(_exact_dtype(hidden)), dim=-1)
        yield _Chunk(rows, targets[rows, None], logps)


class _Gradients:
    """Gradients of Σ upstream · log p(target) in `hidden` and `weight`, where they are needed."""

    def __init__(self, hidden: Tensor, head: Tensor, needs: tuple[bool, bool]) -> None:
        self._inputs, self._head = hidden, head
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(head, dtype=_exact_dtype(hidden)) if needs[1] else None

    def add(self, chunk: _Chunk, upstream: Tensor | float) -> None:
        """Take one chunk in, and overwrite its log-probabilities.

        `upstream` [chunk, 1] scales what is of the hidden size: the vocabulary is far larger.
        """
        if self.hidden is None and self.weight is None:
            return
        minus_one = chunk.logps.new_full(chunk.targets.shape, -1.0)
        # d(log p)/d(logits) = one-hot - softmax, of which this is the negative
        slope = chunk.logps.exp_().scatter_add_(1, chunk.targets, minus_one).to(self._head.dtype)
        with torch.autocast(slope.device.type, enabled=False):
            if self.hidden is not None:
                self.hidden[chunk.rows] = ((slope @ self._head) * -upstream).to(self.hidden.dtype)
            if self.weight is not None:
                inputs = (self._inputs[chunk.rows] * -upstream).to(slope.dtype)
                self.weight += (slope.T @ inputs).to(self.weight.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; their gradient is taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = weight.to(_product_dtype(hidden))
        needs_hidden, needs_weight = (needs_grad and n for n in ctx.needs_input_grad[:2])
        gradients = _Gradients(hidden, head, (needs_hidden, needs_weight))
        losses = hidden.new_empty(len(targets), dtype=_exact_dtype(hidden))
        correct = torch.empty_like(targets, dtype=torch.bool)
        for chunk in _chunks(hidden, head, targets, chunk_tokens):
            losses[chunk.rows] = -chunk.target_logps()
            correct[chunk.rows] = chunk.logps.argmax(-1) == chunk.targets[:, 0]
            gradients.add(chunk, upstream=-1.0)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum(), losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        if hidden is not None:
            hidden = hidden * grad_total.to(hidden.dtype)
        if weight is not None:
            weight = (weight * grad_total).to(ctx.weight_dtype)
        return hidden, weight, None, None, None


class _RecomputedLogps(torch.autograd.Function):
    """Log-probability of every target; backward walks over the chunks again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk_tokens, ctx.dtype = chunk_tokens, _product_dtype(hidden)
        logps = hidden.new_empty(len(targets), dtype=_exact_dtype(hidden))
        for chunk in _chunks(hidden, weight.to(ctx.dtype), targets, chunk_tokens):
            logps[chunk.rows] = chunk.target_logps()
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(ctx.dtype)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:2])
        for chunk in _chunks(hidden, head, targets, ctx.chunk_tokens):
            gradients.add(chunk, upstream[chunk.rows, None])
        grad = gradients.weight
        return gradients.hidden, None if grad is None else grad.to(weight.dtype), None, None

"""Chunked cross-entropy and log-probabilities are torch's, at a fraction of their memory."""

from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import packed, random_documents, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mediphi.batches import IGNORE
from mediphi.modules.losses import CrossEntropy, chunked_cross_entropy, token_logps


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="none")


def problem(
    tokens: int, vocab: int, *, size: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def with_grads(
    total: Tensor, hidden: Tensor, weight: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden.grad = weight.grad = None
    (total * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 23),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1.0, -0.5, 3.7]),
)
def test_value_and_gradient_are_those_of_full_cross_entropy(
    tokens: int, vocab: int, chunk: int, dtype: torch.dtype, scale: float
):
    hidden, weight, targets = problem(tokens, vocab, dtype=dtype, seed=vocab)
    expected = reference(hidden, weight, targets)
    want = with_grads(expected.sum(), hidden, weight, scale=scale)
    got = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    # measured over 300 random cases: 1.5e-5 (float32), 1.8e-14 (float64)
    limit = {"atol": 5e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 0}
    for a, b in zip(with_grads(got.total, hidden, weight, scale=scale), want, strict=True):
        torch.testing.assert_close(a, b, **limit)
    torch.testing.assert_close(got.per_target, expected.detach(), **limit)


def test_gradients_pass_torchs_numerical_check():
    hidden, weight, targets = problem(7, 5)
    for function in (
        lambda h, w: chunked_cross_entropy(h, w, targets, chunk_tokens=3).total,
        lambda h, w: token_logps(h, w, targets, chunk_tokens=3),
    ):
        assert torch.autograd.gradcheck(function, (hidden, weight))


def test_bf16_autocast_is_as_close_to_float32_as_torchs_own_autocast():
    hidden, weight, targets = problem(64, 50, size=32, dtype=torch.float32)
    exact = with_grads(reference(hidden, weight, targets).sum(), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = with_grads(reference(hidden, weight, targets).sum(), hidden, weight)
        ours = with_grads(
            chunked_cross_entropy(hidden, weight, targets, chunk_tokens=9).total, hidden, weight
        )
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x - want).norm() / want.norm() for x in (got, peer))
        # measured: value 3e-4, gradients 6e-3, torch's own the same within a hundredth
        assert error <= 1.2 * allowed and error < 1e-2
    assert ours[1].dtype == ours[2].dtype == torch.float32


def test_bfloat16_inputs_give_bfloat16_gradients_and_float32_losses():
    hidden, weight, targets = problem(9, 20, dtype=torch.bfloat16)
    out = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    _, *grads = with_grads(out.total, hidden, weight)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert out.per_target.dtype == out.total.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_the_logits_never_exist_as_a_whole():
    tokens, vocab, size, chunk = 120, 300, 4, 10
    hidden, weight, targets = problem(tokens, vocab, size=size, dtype=torch.float32)
    with LargestTensor() as ours:
        chunked_cross_entropy(hidden, weight, targets, chunk_tokens=chunk).total.backward()
    with LargestTensor() as full:
        reference(hidden, weight, targets).sum().backward()
    assert full.largest == tokens * vocab
    assert ours.largest == max(chunk * vocab, vocab * size)


def test_no_gradient_is_computed_under_no_grad():
    hidden, weight, targets = problem(40, 30, dtype=torch.float32)
    with torch.no_grad(), LargestTensor() as silent:
        out = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    assert silent.largest == 30 * 6 and not out.total.requires_grad
    expected = reference(hidden, weight, targets)
    torch.testing.assert_close(out.total, expected.sum().detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_nothing_and_the_other_keeps_its_gradient(frozen: str):
    hidden, weight, targets = problem(30, 50)
    reference(hidden, weight, targets).sum().backward()
    expected = {"hidden": hidden.grad, "weight": weight.grad}
    live = {"hidden": hidden, "weight": weight}
    live.pop(frozen)
    hidden.grad = weight.grad = None
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked_cross_entropy(hidden, weight, targets, chunk_tokens=7).total.backward()
    (name, tensor) = live.popitem()
    torch.testing.assert_close(tensor.grad, expected[name])
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_losses_of_targets_carry_no_gradient():
    hidden, weight, targets = problem(5, 4)
    out = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=2)
    assert not out.per_target.requires_grad and not out.correct.requires_grad


def test_without_a_target_the_sum_is_zero_and_so_is_every_gradient():
    """A rank without rows takes part in the step: its gradient must be there, and be zero."""
    hidden, weight, targets = problem(0, 9)
    out = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=2)
    total, *grads = with_grads(out.total, hidden, weight)
    assert total == 0 and not any(g.any() for g in grads) and not len(out.per_target)


def gathered_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = (hidden @ weight.T).log_softmax(-1)
    return logps.gather(1, targets[:, None]).squeeze(1)


def upstream_gradient(tokens: int, dtype: torch.dtype) -> Tensor:
    """A different weight for every token, of both signs."""
    return torch.randn(tokens, generator=torch.Generator().manual_seed(tokens), dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 23),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_log_probs_and_their_gradients_are_those_of_full_log_softmax(
    tokens: int, vocab: int, chunk: int, dtype: torch.dtype
):
    hidden, weight, targets = problem(tokens, vocab, dtype=dtype, seed=vocab)
    upstream = upstream_gradient(tokens, dtype)
    expected = gathered_logps(hidden, weight, targets)
    want = with_grads(expected @ upstream, hidden, weight)
    got = token_logps(hidden, weight, targets, chunk_tokens=chunk)
    limit = {"atol": 5e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 0}
    for a, b in zip(with_grads(got @ upstream, hidden, weight), want, strict=True):
        torch.testing.assert_close(a, b, **limit)
    torch.testing.assert_close(got.detach(), expected.detach(), **limit)


def test_log_probs_in_bf16_autocast_are_as_close_to_float32_as_torchs_own():
    hidden, weight, targets = problem(64, 50, size=32, dtype=torch.float32)
    upstream = upstream_gradient(64, torch.float32)
    exact = gathered_logps(hidden, weight, targets)
    want = [exact.detach(), *with_grads(exact @ upstream, hidden, weight)[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        values = [
            gathered_logps(hidden, weight, targets),
            token_logps(hidden, weight, targets, chunk_tokens=9),
        ]
    theirs, ours = (
        [v.detach(), *with_grads((v * upstream).sum(), hidden, weight)[1:]] for v in values
    )
    for got, peer, wanted in zip(ours, theirs, want, strict=True):
        error, allowed = ((x - wanted).norm() / wanted.norm() for x in (got, peer))
        # measured: values 2e-3, gradients 6e-3, torch's own a tenth larger
        assert error <= 1.2 * allowed and error < 1e-2
    assert {x.dtype for x in ours} == {torch.float32}


def test_backward_multiplies_in_the_dtype_of_the_forward_pass():
    """It runs outside of the autocast region, or in another one."""
    hidden, weight, targets = problem(20, 30, dtype=torch.float32)
    upstream = upstream_gradient(20, torch.float32)
    grads = []
    for around_backward in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            total = token_logps(hidden, weight, targets, chunk_tokens=7) @ upstream
        with torch.autocast("cpu", torch.bfloat16, enabled=around_backward):
            grads.append(with_grads(total, hidden, weight)[1:])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_inputs_give_float32_log_probs_and_bfloat16_gradients():
    hidden, weight, targets = problem(9, 20, dtype=torch.bfloat16)
    out = token_logps(hidden, weight, targets, chunk_tokens=4)
    _, *grads = with_grads(out @ upstream_gradient(9, torch.float32), hidden, weight)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2 and out.dtype == torch.float32


@pytest.mark.parametrize("chunk", [10, 120])
def test_log_probs_and_their_backward_hold_one_chunk_of_logits(chunk: int):
    """At 120, the control, the only chunk is the whole matrix, and is seen in both passes."""
    tokens, vocab, size = 120, 300, 4
    hidden, weight, targets = problem(tokens, vocab, size=size, dtype=torch.float32)
    with LargestTensor() as forward:
        total = token_logps(hidden, weight, targets, chunk_tokens=chunk).sum()
    with LargestTensor() as backward:
        total.backward()
    assert forward.largest == backward.largest == chunk * vocab


def kept_elements(function: Any) -> list[int]:
    """Sizes of what autograd keeps for backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sizes


def test_log_probs_keep_inputs_for_backward_and_nothing_under_no_grad():
    tokens, vocab, size = 120, 300, 4
    arguments = problem(tokens, vocab, size=size, dtype=torch.float32)
    assert max(kept_elements(lambda: gathered_logps(*arguments))) == tokens * vocab
    assert max(kept_elements(lambda: token_logps(*arguments, chunk_tokens=120))) == vocab * size
    with torch.no_grad():
        assert not kept_elements(lambda: token_logps(*arguments, chunk_tokens=10))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_of_log_probs(frozen: str):
    hidden, weight, targets = problem(30, 50)
    sides, upstream = {"hidden": hidden, "weight": weight}, upstream_gradient(30, torch.float64)
    sides.pop(frozen).requires_grad_(False)
    ((name, live),) = sides.items()
    gathered_logps(hidden, weight, targets).backward(upstream)
    expected, live.grad = live.grad, None
    token_logps(hidden, weight, targets, chunk_tokens=7).backward(upstream)
    torch.testing.assert_close(live.grad, expected, msg=name)
    assert hidden.grad is None or weight.grad is None


def test_without_a_target_log_probs_have_zero_gradients():
    hidden, weight, targets = problem(0, 9)
    out = token_logps(hidden, weight, targets, chunk_tokens=2)
    _, *grads = with_grads(out.sum(), hidden, weight)
    assert not len(out) and not any(g.any() for g in grads)


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 23), chunk=st.integers(1, 30))
def test_a_target_is_correct_where_it_is_the_argmax(tokens: int, chunk: int):
    hidden, weight, targets = problem(tokens, 3, seed=tokens)
    out = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    assert torch.equal(out.correct, (hidden @ weight.T).argmax(-1) == targets)


def test_of_equal_logits_the_first_counts():
    """As greedy decoding takes it: counting all of them would flatter a bfloat16 model."""
    ones = torch.ones(3, 2)
    out = chunked_cross_entropy(ones, ones, torch.arange(3), chunk_tokens=2)
    assert out.correct.tolist() == [True, False, False]


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem(6, 5, dtype=torch.float32)
    hidden = (hidden * 1e4).detach().requires_grad_()
    out = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=2)
    total, *grads = with_grads(out.total, hidden, weight)
    assert torch.isfinite(total) and all(torch.isfinite(g).all() for g in grads)


def test_loss_and_gradients_of_a_model_are_transformers_own():
    """One document, the labels handed to transformers, which shifts and averages them itself."""
    model = small_model("sdpa")
    (document,) = random_documents([37])
    batch = packed([document])
    labels = document.clone()
    labels[5:9] = IGNORE
    batch = replace(batch, target_index=torch.tensor([*range(4), *range(8, 36)]))
    model(input_ids=document[None], labels=labels[None], use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.model(input_ids=document[None], use_cache=False).last_hidden_state[0]
    out: CrossEntropy = chunked_cross_entropy(
        hidden[batch.target_index], model.lm_head.weight, batch.label_ids, chunk_tokens=8
    )
    (out.total / 32).backward()
    for name, parameter in model.named_parameters():
        # measured: 3e-7
        torch.testing.assert_close(parameter.grad, expected[name], atol=3e-6, rtol=1e-5)


def test_signatures_are_checked_in_tests():
    """The control of `--jaxtyping-packages` in pyproject.toml: a wrong shape or dtype is seen."""
    hidden, weight, targets = problem(5, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        chunked_cross_entropy(hidden[:, :3], weight, targets, chunk_tokens=2)
    with pytest.raises(jaxtyping.TypeCheckError):
        chunked_cross_entropy(hidden, weight, targets.int(), chunk_tokens=2)

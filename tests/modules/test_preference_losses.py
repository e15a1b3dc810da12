"""Preference losses against formulas written down on their own."""

import math
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mediphi.modules.preference_losses import PairLogps, PairLoss, dpo_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


Formula = Callable[[float, float, float], tuple[float, float]]


def smoothed(m: float, beta: float, e: float) -> tuple[float, float]:
    value = (1 - e) * softplus(-beta * m) + e * softplus(beta * m)
    return value, beta * (e - sigmoid(-beta * m))


def hinge(m: float, beta: float, e: float) -> tuple[float, float]:
    return (1 - beta * m, -beta) if beta * m < 1 else (0.0, 0.0)


def ipo(m: float, beta: float, e: float) -> tuple[float, float]:
    return (m - 0.5 / beta) ** 2, 2 * m - 1 / beta


def robust(m: float, beta: float, e: float) -> tuple[float, float]:
    kept, flipped = softplus(-beta * m), softplus(beta * m)
    value = (kept - e * (kept + flipped)) / (1 - 2 * e)
    return value, -beta * (sigmoid(-beta * m) + e / (1 - 2 * e))


FORMULAS: dict[PairLoss, Formula] = dict(sigmoid=smoothed, hinge=hinge, ipo=ipo, robust=robust)
"""Loss and its derivative in the margin, in Python's floats."""


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Two to four log-probabilities per pair, token counts, and numbers a config would allow."""
    pairs = draw(st.integers(1, 5))
    loss = draw(st.sampled_from(list(FORMULAS)))
    smoothing = {"hinge": st.just(0.0), "ipo": st.just(0.0), "robust": st.floats(0.01, 0.45)}
    logps = st.lists(st.floats(-90, 0), min_size=pairs, max_size=pairs)
    counts = st.lists(st.integers(1, 40), min_size=pairs, max_size=pairs)
    return {
        "sides": [draw(logps) for _ in range(4)],
        "counts": [draw(counts) for _ in range(2)],
        "reference_free": draw(st.booleans()),
        "loss": loss,
        "beta": draw(st.floats(0.01, 2.0)),
        "label_smoothing": draw(smoothing.get(loss, st.floats(0.0, 0.45))),
        "length_normalised": draw(st.booleans()),
    }


def pair_logps(
    chosen: Any, rejected: Any, counts: Any = None, dtype: torch.dtype = torch.float64
) -> PairLogps:
    counts = counts or [[1] * len(chosen)] * 2
    first, second = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (chosen, rejected))
    return PairLogps(first, second, *(torch.tensor(n) for n in counts))


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_losses_rewards_and_gradients_are_the_formulas(case: dict[str, Any]):
    sides, counts = case["sides"], case["counts"]
    policy, reference = (pair_logps(*sides[i : i + 2], counts) for i in (0, 2))
    if case["reference_free"]:
        reference, sides = None, [*sides[:2], [0.0] * len(sides[0]), [0.0] * len(sides[0])]
    names = ("loss", "beta", "label_smoothing", "length_normalised")
    out = dpo_loss(policy, reference, **{n: case[n] for n in names})
    out.losses.sum().backward()
    for i, (chosen, rejected, old_chosen, old_rejected) in enumerate(zip(*sides, strict=True)):
        lengths = [n[i] if case["length_normalised"] else 1 for n in counts]
        ratios = [(chosen - old_chosen) / lengths[0], (rejected - old_rejected) / lengths[1]]
        formula = FORMULAS[case["loss"]]
        value, slope = formula(ratios[0] - ratios[1], case["beta"], case["label_smoothing"])
        got = [x[i].item() for x in (*out, policy.chosen.grad, policy.rejected.grad)]
        rewards = [case["beta"] * r for r in ratios]
        want = [value, *rewards, slope / lengths[0], -slope / lengths[1]]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_neither_rewards_nor_the_reference_get_a_gradient():
    policy, reference = pair_logps([-3.0], [-4.0]), pair_logps([-2.0], [-2.5])
    out = dpo_loss(policy, reference, loss="sigmoid", beta=0.1)
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    out.losses.sum().backward()
    assert reference.chosen.grad is None and reference.rejected.grad is None


logps = st.lists(st.floats(-300, 0), min_size=1, max_size=6)
betas = st.floats(0.01, 2.0)
smoothings = st.floats(0.01, 0.45)


@settings(deadline=None)
@given(values=logps, beta=betas, e=st.floats(0.0, 0.49), normalised=st.booleans())
def test_the_first_step_costs_ln_2(values: list[float], beta: float, e: float, normalised: bool):
    """Policy and reference are one model: the margin is 0, whatever the smoothing."""
    same = pair_logps(values, values[::-1], [[3] * len(values), [7] * len(values)])
    out = dpo_loss(
        same, same, loss="sigmoid", beta=beta, label_smoothing=e, length_normalised=normalised
    )
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, math.log(2)))
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()


@settings(deadline=None)
@given(values=logps, beta=betas)
def test_swapping_the_sides_negates_the_margin(values: list[float], beta: float):
    policy, old = pair_logps(values, values[::-1]), pair_logps([-1.0] * len(values), values)
    there = dpo_loss(policy, old, loss="sigmoid", beta=beta)
    sides = (PairLogps(x.rejected, x.chosen, x.num_rejected, x.num_chosen) for x in (policy, old))
    back = dpo_loss(*sides, loss="sigmoid", beta=beta)
    assert torch.equal(there.chosen_rewards, back.rejected_rewards)
    margin = there.chosen_rewards - there.rejected_rewards
    # -log sigmoid(-x) = x - log sigmoid(x)
    torch.testing.assert_close(back.losses - there.losses, margin)


@settings(deadline=None)
@given(values=logps, beta=betas, e=smoothings)
def test_the_robust_loss_is_unbiased_under_flipped_labels(
    values: list[float], beta: float, e: float
):
    """Chowdhury et al. 2024, lemma 3.1: over a share e of flips it is the loss of clean labels."""
    kept, flipped = (
        pair_logps(values, [-9.0] * len(values)),
        pair_logps([-9.0] * len(values), values),
    )
    noisy = [
        dpo_loss(x, None, loss="robust", beta=beta, label_smoothing=e).losses
        for x in (kept, flipped)
    ]
    clean = dpo_loss(kept, None, loss="sigmoid", beta=beta).losses
    torch.testing.assert_close((1 - e) * noisy[0] + e * noisy[1], clean)


def test_robust_tends_to_sigmoid_as_the_smoothing_tends_to_zero():
    policy = pair_logps([-5.0, -40.0], [-20.0, -1.0])
    clean = dpo_loss(policy, None, loss="sigmoid", beta=0.3).losses
    for e in (1e-3, 1e-6, 1e-9):
        noisy = dpo_loss(policy, None, loss="robust", beta=0.3, label_smoothing=e).losses
        torch.testing.assert_close(noisy, clean, atol=40 * e, rtol=0)


@settings(deadline=None)
@given(beta=betas, e=smoothings)
def test_smoothing_stops_at_the_margin_where_the_label_is_as_sure_as_it_is_right(
    beta: float, e: float
):
    policy = pair_logps([math.log((1 - e) / e) / beta], [0.0])
    dpo_loss(policy, None, loss="sigmoid", beta=beta, label_smoothing=e).losses.sum().backward()
    torch.testing.assert_close(policy.chosen.grad, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("loss", FORMULAS)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(loss: PairLoss, margin: float):
    policy = pair_logps([margin], [0.0], dtype=torch.float32)
    e = 0.1 if loss == "robust" else 0.0
    out = dpo_loss(policy, None, loss=loss, beta=1.0, label_smoothing=e)
    out.losses.sum().backward()
    assert torch.isfinite(out.losses).all() and torch.isfinite(policy.chosen.grad).all()


@pytest.mark.parametrize(
    ("stored", "computed"), [("bfloat16", "float32"), ("float32",) * 2, ("float64",) * 2]
)
def test_precision_is_float32_or_better(stored: str, computed: str):
    policy = pair_logps([-3.0], [-4.0], dtype=getattr(torch, stored))
    out = dpo_loss(policy, policy, loss="ipo", beta=0.1, length_normalised=True)
    assert {x.dtype for x in out} == {getattr(torch, computed)}


def test_an_empty_response_has_log_ratio_zero():
    policy = pair_logps([0.0], [-4.0], [[0], [2]])
    out = dpo_loss(policy, None, loss="sigmoid", beta=1.0, length_normalised=True)
    torch.testing.assert_close(out.losses, torch.tensor([softplus(-2.0)], dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "beta", "label_smoothing", "message"),
    [
        ("sigmoid", 0.0, 0.0, "beta is 0.0"),
        ("sigmoid", 0.1, 0.5, "label_smoothing is 0.5"),
        ("sigmoid", 0.1, -0.1, "label_smoothing is -0.1"),
        ("robust", 0.1, 0.0, "robust loss needs"),
        ("hinge", 0.1, 0.1, "hinge loss knows no"),
        ("ipo", 0.1, 0.1, "ipo loss knows no"),
    ],
)
def test_what_a_formula_has_no_meaning_for_is_refused(
    loss: PairLoss, beta: float, label_smoothing: float, message: str
):
    policy = pair_logps([-3.0], [-4.0])
    with pytest.raises(ValueError, match=message):
        dpo_loss(policy, None, loss=loss, beta=beta, label_smoothing=label_smoothing)


def test_pairs_of_policy_and_reference_are_as_many():
    one, two = pair_logps([-3.0], [-4.0]), pair_logps([-3.0, -1.0], [-4.0, -2.0])
    with pytest.raises(jaxtyping.TypeCheckError):
        dpo_loss(two, one, loss="sigmoid", beta=0.1)

"""Losses on pairs of responses, as pure functions of summed log-probabilities."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

PairLoss = Literal["sigmoid", "hinge", "ipo", "robust"]


class PairLogps(NamedTuple):
    """Log-probabilities of both responses given the prompt, summed over `num_*` tokens."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    num_chosen: Int64[Tensor, " pairs"]
    num_rejected: Int64[Tensor, " pairs"]


class PreferenceLoss(NamedTuple):
    """`losses` carry the gradient. Rewards are beta times the log-ratios, detached."""

    losses: Float[Tensor, " pairs"]
    chosen_rewards: Float[Tensor, " pairs"]
    rejected_rewards: Float[Tensor, " pairs"]


def dpo_loss(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    loss: PairLoss,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
) -> PreferenceLoss:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) and its relatives.

    With r = log policy(response) - log reference(response), the log-ratio of a response, with
    m = r(chosen) - r(rejected), and with e the label smoothing, the loss of a pair is

    - sigmoid: -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m); e = 0 is DPO, e > 0 is
      conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences").
    - robust: [-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)] / (1 - 2e), an unbiased
      estimate of DPO's loss when a share e of the labels is flipped (Chowdhury et al. 2024). It
      can be negative.
    - hinge: max(0, 1 - beta m) (SLiC: Zhao et al. 2023; on log-ratios: Liu et al. 2023, RSO).
    - ipo: (m - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17, whose tau is beta).

    `length_normalised` divides each log-ratio, and so the rewards, by the tokens of its response
    (an empty one has log-ratio 0). In TRL 1.16 `loss_type` means:

    - `sigmoid`, without label smoothing whatever is configured, `hinge` and `robust`: the same
      names here, summed.
    - `sigmoid_norm` and `ipo`: `sigmoid` and `ipo` with `length_normalised`. The summed `ipo` is
      the paper's equation; TRL has no such form.
    - TRL's rewards are always of summed log-ratios.

    `reference=None` takes every reference log-probability as 0, as `reference_free` does in the
    code published with DPO; TRL 1.16 has no such mode. With `sigmoid` and `length_normalised` it
    is SimPO without its target margin (Meng et al. 2024).

    Computed in float32 (float64 inputs: float64).

    Raises:
        ValueError: `beta` is not positive; `label_smoothing` is not in [0, 0.5), is 0 for `robust`
            or is not 0 for `hinge` or `ipo`.
    """
    _check(loss, beta=beta, label_smoothing=label_smoothing)
    chosen = _log_ratio(policy.chosen, reference and reference.chosen)
    rejected = _log_ratio(policy.rejected, reference and reference.rejected)
    if length_normalised:
        chosen = chosen / policy.num_chosen.clamp(min=1)
        rejected = rejected / policy.num_rejected.clamp(min=1)
    losses = _losses(chosen - rejected, loss=loss, beta=beta, label_smoothing=label_smoothing)
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def _check(loss: PairLoss, *, beta: float, label_smoothing: float) -> None:
    if beta <= 0:
        raise ValueError(f"beta is {beta}, it must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, it must be in [0, 0.5)")
    if loss == "robust" and not label_smoothing:
        raise ValueError("the robust loss needs label_smoothing > 0; without it, use sigmoid")
    if loss in ("hinge", "ipo") and label_smoothing:
        raise ValueError(f"the {loss} loss knows no label_smoothing, which is {label_smoothing}")


def _log_ratio(
    policy: Float[Tensor, " pairs"], reference: Float[Tensor, " pairs"] | None
) -> Float[Tensor, " pairs"]:
    exact = policy.to(torch.promote_types(policy.dtype, torch.float32))
    return exact if reference is None else exact - reference.detach()


def _losses(
    margin: Float[Tensor, " pairs"], *, loss: PairLoss, beta: float, label_smoothing: float
) -> Float[Tensor, " pairs"]:
    match loss:
        case "hinge":
            return torch.relu(1 - beta * margin)
        case "ipo":
            return (margin - 1 / (2 * beta)) ** 2
    kept, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    if loss == "sigmoid":
        return (1 - label_smoothing) * kept + label_smoothing * flipped
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)

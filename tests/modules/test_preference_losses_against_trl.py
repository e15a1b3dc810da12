"""Preference losses and their gradients are those of TRL's DPOTrainer."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from small_models import ASSETS, small_model
from torch import Tensor

from mediphi.modules.losses import token_logps
from mediphi.modules.preference_losses import PairLogps, PreferenceLoss, dpo_loss

# TRL 1.16 uses names that transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"
)

ROWS = [
    {"prompt": "A dry cough since", "chosen": " Monday, no fever.", "rejected": " then"},
    {"prompt": "Aspirin", "chosen": " 100 mg", "rejected": " is a drug of unknown dose, in short"},
    {"prompt": "The knee is", "chosen": " swollen", "rejected": " a joint of the leg"},
]
VARIANTS = {  # TRL's loss_type: ours
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid_norm": {"loss": "sigmoid", "length_normalised": True},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo", "length_normalised": True},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer on a model that has moved away from its reference."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    policy, reference = (small_model("sdpa", vocab_size=len(tokenizer)) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    args = trl.DPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=len(ROWS),
    )
    return trl.DPOTrainer(
        policy,
        reference,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )


def summed_logps(model: Any, batch: dict[str, Tensor]) -> PairLogps:
    """Our log-probabilities of TRL's padded batch, whose upper half are the chosen responses."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    hidden = model.model(
        input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1]
    (at,) = mask.flatten().nonzero(as_tuple=True)
    targets = ids[:, 1:].flatten()[at]
    own = token_logps(hidden.flatten(0, 1)[at], model.lm_head.weight, targets, chunk_tokens=5)
    flat = own.new_zeros(mask.numel()).index_copy(0, at, own)
    return PairLogps(*flat.view(mask.shape).sum(1).chunk(2), *mask.sum(1).chunk(2))


def theirs(trainer: Any, loss_type: str, *, beta: float, label_smoothing: float) -> Tensor:
    trainer.loss_types, trainer.beta = [loss_type], beta
    trainer.label_smoothing = label_smoothing
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, batch)


def pair_losses(trainer: Any, **numbers: Any) -> PreferenceLoss:
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        reference = summed_logps(trainer.ref_model, batch)
    return dpo_loss(summed_logps(trainer.model, batch), reference, **numbers)


def ours(trainer: Any, **numbers: Any) -> Tensor:
    return pair_losses(trainer, **numbers).losses.mean()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", VARIANTS)
def test_loss_and_gradients_of_a_model_are_trls(trainer: Any, loss_type: str, beta: float):
    numbers: dict[str, Any] = VARIANTS[loss_type]
    smoothing = numbers.get("label_smoothing", 0.0)
    want = theirs(trainer, loss_type, beta=beta, label_smoothing=smoothing)
    got = ours(trainer, beta=beta, **numbers)
    # measured: values 3e-6, gradients 2e-6
    torch.testing.assert_close(got, want, atol=0, rtol=1e-5)
    expected = gradients(trainer.model, want)
    assert any(g.abs().max() > 1e-3 for g in expected.values())
    for name, value in gradients(trainer.model, got).items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name


class Case(NamedTuple):
    """Drawn answers: `[2 * pairs, tokens]`, the upper half chosen, float64.

    `logps` is a leaf, and counts where `mask` is 1; `reference` is summed, `[2 * pairs]`.
    """

    logps: Tensor
    mask: Tensor
    reference: Tensor
    beta: float
    label_smoothing: float

    @property
    def log_probs(self) -> Tensor:
        """As the model gives them: 0 where there is no answer."""
        return self.logps * self.mask


def drawn_case(seed: int) -> Case:
    drawn = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=drawn, dtype=torch.float64).item()

    rows, tokens = 2 * int(number(1, 6)), int(number(2, 30))
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=drawn)
    logps = torch.rand(rows, tokens, generator=drawn, dtype=torch.float64) * number(-12, -1)
    mask = (torch.arange(tokens) < lengths).long()
    moved = torch.randn(rows, generator=drawn, dtype=torch.float64) * number(0.1, 20)
    beta = math.exp(number(math.log(0.01), math.log(2)))
    reference = (logps * mask).sum(1) + moved
    return Case(logps.requires_grad_(), mask, reference.detach(), beta, number(0.01, 0.45))


@pytest.fixture
def precomputed(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The trainer, told to take the reference's log-probabilities from the batch."""
    monkeypatch.setattr(trainer, "precompute_ref_logps", True)
    yield trainer


def their_loss(trainer: Any, loss_type: str, case: Case) -> Tensor:
    """TRL's own loss function behind a model that gives the drawn log-probabilities."""
    ids = torch.zeros(len(case.mask), 1 + case.mask.shape[1], dtype=torch.long)
    chosen, rejected = case.reference.chunk(2)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.cat([ids[:, :1], case.mask], dim=1),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    told = case.log_probs.detach()  # what TRL only logs
    out = SimpleNamespace(
        log_probs=case.log_probs, entropy=told, mean_logits=told, is_top1=case.mask.bool()
    )
    trainer.loss_types, trainer.beta = [loss_type], case.beta
    trainer.label_smoothing = case.label_smoothing
    return trainer.compute_loss(lambda **_: out, batch)


def our_loss(case: Case, **numbers: Any) -> Tensor:
    counts = case.mask.sum(1).chunk(2)
    policy, reference = (
        PairLogps(*logps.chunk(2), *counts) for logps in (case.log_probs.sum(1), case.reference)
    )
    return dpo_loss(policy, reference, beta=case.beta, **numbers).losses.mean()


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_loss_and_gradient_of_random_log_probabilities_are_trls(precomputed: Any, loss_type: str):
    sizes = []
    for seed in range(40):
        case = drawn_case(seed)
        numbers: dict[str, Any] = dict(VARIANTS[loss_type])
        if "label_smoothing" in numbers:
            numbers["label_smoothing"] = case.label_smoothing
        want, got = their_loss(precomputed, loss_type, case), our_loss(case, **numbers)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        (wanted,), (found,) = (torch.autograd.grad(loss, case.logps) for loss in (want, got))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        sizes.append(wanted.abs().max().item())
    assert sum(size > 1e-3 for size in sizes) > 20  # hinge is flat where the margin is large


def test_rewards_are_trls(trainer: Any):
    theirs(trainer, "sigmoid", beta=0.3, label_smoothing=0.0)
    want = [trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
    _, *rewards = pair_losses(trainer, loss="sigmoid", beta=0.3)
    torch.testing.assert_close([r.mean().item() for r in rewards], want, atol=0, rtol=1e-4)


def test_label_smoothing_is_what_trl_leaves_out_of_the_sigmoid_loss(trainer: Any):
    plain, smoothed = (
        theirs(trainer, "sigmoid", beta=0.7, label_smoothing=e).detach() for e in (0.0, 0.2)
    )
    assert torch.equal(plain, smoothed)
    moved = ours(trainer, loss="sigmoid", beta=0.7, label_smoothing=0.2).detach()
    assert abs(moved - plain) > 0.01 * plain  # measured: 0.03


def test_the_papers_ipo_is_another_loss_than_trls(trainer: Any):
    want = theirs(trainer, "ipo", beta=0.1, label_smoothing=0.0)
    summed = ours(trainer, loss="ipo", beta=0.1)
    assert abs(summed - want) > 0.01 * want

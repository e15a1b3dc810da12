"""Means are a sum over a count, never a mean of means."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import packed, random_documents
from torch import Tensor

from mediphi.batches import PreferenceBatch, TokenBatch
from mediphi.modules.losses import CrossEntropy
from mediphi.modules.meters import PairMeter, TokenMeter, preferred
from mediphi.modules.preference_losses import PairLogps, PreferenceLoss
from mediphi.tracking.names import header

NAMES = {"kind": ("document", "summary"), "source": ("a", "b", "c"), "task": ("",)}


class Ranks:
    """A strategy of ranks that have all summed the same."""

    def __init__(self, size: int) -> None:
        self.size = size

    def reduce(self, tensor: Tensor, *, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return tensor * self.size


# --- tokens


def labelled(
    kinds: list[int], sources: list[int], trained: list[bool], tasks: list[int] | None = None
) -> TokenBatch:
    batch = packed(random_documents([len(kinds)]))
    (at,) = torch.tensor(trained).nonzero(as_tuple=True)
    ids = {"kind_ids": kinds, "source_ids": sources, "task_ids": tasks or [0] * len(kinds)}
    columns = {name: torch.tensor([own], dtype=torch.uint8) for name, own in ids.items()}
    return replace(batch, target_index=at, **columns)


def entropy(losses: list[float], correct: list[bool] | None = None) -> CrossEntropy:
    each = torch.tensor(losses)
    return CrossEntropy(each.sum(), each, torch.tensor(correct or [False] * len(losses)).bool())


def worked_example() -> TokenMeter:
    meter = TokenMeter(NAMES)
    meter.update(
        entropy([1.0, 2.0, 3.0], [True, False, True]),
        labelled([0, 1, 1, 1], [0, 0, 2, 2], [True, True, True, False]),
    )
    meter.update(entropy([6.0], [True]), labelled([0], [2], [True]))
    return meter


def losses_of(means: dict[str, float], name: str = "loss") -> dict[str, float]:
    start = f"train/{name}"
    return {k.removeprefix(start): v for k, v in means.items() if k.startswith(start)}


def test_means_worked_by_hand():
    means = worked_example().means("train")
    losses = losses_of(means)
    assert losses == {
        "": 12 / 4,
        "/kind/document": 7 / 2,
        "/kind/summary": 5 / 2,
        "/source/a": 3 / 2,
        "/source/c": 9 / 2,
    }
    for key, loss in losses.items():
        assert means[f"train/perplexity{key}"] == math.exp(loss)
    assert losses_of(means, "accuracy") == {
        "": 3 / 4,
        "/kind/document": 1.0,
        "/kind/summary": 1 / 2,
        "/source/a": 1 / 2,
        "/source/c": 1.0,
    }


TOKENS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.booleans(), st.floats(0, 9, width=32)),
    min_size=1,
    max_size=30,
)


def meter_of(batches: list[list[tuple[int, int, bool, float]]]) -> TokenMeter:
    meter = TokenMeter(NAMES)
    for tokens in batches:
        kinds, sources, trained, losses = (list(column) for column in zip(*tokens, strict=True))
        own = [loss for loss, one in zip(losses, trained, strict=True) if one]
        meter.update(entropy(own), labelled(kinds, sources, trained))
    return meter


@settings(deadline=None, max_examples=40)
@given(first=TOKENS, second=TOKENS)
def test_cutting_the_tokens_into_batches_changes_no_mean(first: Any, second: Any):
    apart, together = meter_of([first, second]).means("x"), meter_of([[*first, *second]]).means("x")
    assert apart.keys() == together.keys()
    for key, value in apart.items():
        assert value == pytest.approx(together[key], rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(tokens=TOKENS)
def test_every_grouping_adds_up_to_the_whole(tokens: Any):
    groups = meter_of([tokens]).reduced(None)
    losses = [sum(own["loss"] for own in members.values()) for members in groups.values()]
    counts = [sum(own["tokens"] for own in members.values()) for members in groups.values()]
    assert counts == [sum(t[2] for t in tokens)] * len(NAMES)
    assert losses == pytest.approx([losses[0]] * len(NAMES))


def test_ranks_are_summed_before_they_are_divided():
    meter = worked_example()
    assert meter.means("train", Ranks(3)) == meter.means("train")
    alone, all_ranks = meter.reduced(None), meter.reduced(Ranks(3))
    assert all_ranks["source"]["a"]["tokens"] == 3 * alone["source"]["a"]["tokens"] == 6
    assert meter.reduced(None) == alone  # reading changes nothing


def test_nothing_seen_gives_no_metric_and_reset_forgets():
    meter = TokenMeter(NAMES)
    assert meter.means("train") == {}
    meter.update(entropy([1.0]), labelled([0], [0], [True]))
    assert meter.means("train")
    meter.reset()
    assert meter.means("train") == {}


def test_a_group_without_tokens_has_no_metric():
    meter = TokenMeter(NAMES)
    meter.update(entropy([1.0]), labelled([0], [1], [True]))
    assert losses_of(meter.means("train")).keys() == {"", "/kind/document", "/source/b"}


def test_rows_without_a_task_are_other_where_some_have_one_and_nothing_where_none_has():
    tasks = {**NAMES, "task": ("", "summarization")}
    batch = labelled([0, 0], [0, 0], [True, True], tasks=[0, 1])
    some, none = TokenMeter(tasks), TokenMeter(NAMES)
    some.update(entropy([1.0, 3.0]), batch)
    none.update(entropy([1.0]), labelled([0], [0], [True]))
    of_tasks = {k: v for k, v in losses_of(some.means("train")).items() if "task" in k}
    assert of_tasks == {"/task/other": 1.0, "/task/summarization": 3.0}
    assert not any("task" in key for key in none.means("train"))


def test_ten_million_tokens_lose_no_digit():
    """float32 sums would stop growing at 2**24 losses of 1."""
    meter = TokenMeter(NAMES)
    meter.sums += 2.0**25
    meter.update(entropy([1.0]), labelled([0], [0], [True]))
    assert meter.sums[0, 0] == meter.sums[1, 0] == 2.0**25 + 1


def test_a_hopeless_loss_has_a_finite_perplexity():
    meter = TokenMeter(NAMES)
    meter.update(entropy([1e4]), labelled([0], [0], [True]))
    assert math.isfinite(meter.means("train")["train/perplexity"])


def test_a_saved_meter_goes_on_where_it_stopped():
    meter, other = worked_example(), TokenMeter(NAMES)
    other.load_state_dict({name: value.clone() for name, value in meter.state_dict().items()})
    for one in (meter, other):
        one.update(entropy([0.5]), labelled([1], [1], [True]))
    assert other.means("train") == meter.means("train") != worked_example().means("train")
    assert list(meter.state_dict()) == ["sums"] and not list(meter.parameters())


# --- pairs

PAIR_NAMES = {"source": ("a",), "error": ("", "brevity"), "task": ("",)}


def pairs(errors: list[int]) -> PreferenceBatch:
    """Only what the meter looks at is real."""
    count, zero = len(errors), torch.zeros(1, dtype=torch.int64)
    names = torch.zeros(count, dtype=torch.uint8)
    return PreferenceBatch(
        input_ids=zero[None],
        position_ids=zero[None],
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        lengths=(1,),
        max_seqlen=1,
        shares_prompt=False,
        logit_index=zero[:0],
        label_ids=zero[:0],
        answer_ids=zero[:0],
        reference_logps=torch.zeros(count, 2),
        num_global_targets=max(1, count),
        document_index=torch.arange(count),
        source_ids=names,
        task_ids=names,
        error_ids=torch.tensor(errors, dtype=torch.uint8),
    )


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    counts = torch.tensor([4, 5, 1][: len(chosen)]), torch.tensor([2, 10, 3][: len(chosen)])
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), *counts)


LOSS = PreferenceLoss(
    torch.tensor([1.0, 2.0, 6.0]), torch.tensor([3.0, 1.0, -2.0]), torch.tensor([1.0, 1.0, 4.0])
)
POLICY = logps([-8.0, -5.0, -7.0], [-2.0, -30.0, -3.0])
REFERENCE = logps([-9.0, -4.0, -7.5], [-3.0, -33.0, -1.0])
BY_HAND = {
    "loss": 9 / 3,
    "reward/chosen": 2 / 3,
    "reward/rejected": 6 / 3,
    "margin": -4 / 3,
    "accuracy": 1.5 / 3,  # right, a tie, wrong
    "logps/chosen": -20 / 3,
    "logps/rejected": -35 / 3,
    "logps_per_token/chosen": -20 / 10,
    "logps_per_token/rejected": -35 / 15,
    "kl": (1 - 1 + 0.5 + 1 + 3 - 2) / 25,
    "sft_loss": (8 / 4 + 5 / 5 + 7 / 1) / 3,
    "loss/error/other": 6.0,
    "loss/error/brevity": 3 / 2,
    "sft_loss/error/other": 7.0,
    "sft_loss/error/brevity": 3 / 2,
    "reward/chosen/error/other": -2.0,
    "reward/chosen/error/brevity": 4 / 2,
    "reward/rejected/error/other": 4.0,
    "reward/rejected/error/brevity": 2 / 2,
    "margin/error/other": -6 / 1,
    "margin/error/brevity": 2 / 2,
    "accuracy/error/other": 0.0,
    "accuracy/error/brevity": 1.5 / 2,
    "logps/chosen/error/other": -7.0,
    "logps/chosen/error/brevity": -13 / 2,
    "logps/rejected/error/other": -3.0,
    "logps/rejected/error/brevity": -32 / 2,
    "logps_per_token/chosen/error/other": -7 / 1,
    "logps_per_token/chosen/error/brevity": -13 / 9,
    "logps_per_token/rejected/error/other": -3 / 3,
    "logps_per_token/rejected/error/brevity": -32 / 12,
    "kl/error/other": (0.5 - 2) / 4,
    "kl/error/brevity": (1 - 1 + 1 + 3) / 21,
}


def test_means_of_pairs_worked_by_hand():
    meter = PairMeter(PAIR_NAMES)
    meter.update(LOSS, POLICY, REFERENCE, pairs([1, 1, 0]))
    assert meter.means("heldout") == pytest.approx({f"heldout/{k}": v for k, v in BY_HAND.items()})
    assert meter.means("heldout", Ranks(2)) == meter.means("heldout")


def test_pairs_in_several_batches_have_the_same_means():
    meter = PairMeter(PAIR_NAMES)
    for rows in (slice(0, 1), slice(1, 3)):
        parts = (PreferenceLoss(*(x[rows] for x in LOSS)),)
        parts += tuple(PairLogps(*(x[rows] for x in own)) for own in (POLICY, REFERENCE))
        meter.update(*parts, pairs([1, 1, 0][rows]))
    meter.update(
        PreferenceLoss(*(x[:0] for x in LOSS)), PairLogps(*(x[:0] for x in POLICY)), None, pairs([])
    )
    assert meter.means("train") == pytest.approx({f"train/{k}": v for k, v in BY_HAND.items()})


def test_without_pairs_there_is_no_metric():
    assert PairMeter(PAIR_NAMES).means("train") == {}


def test_every_name_stands_in_the_header():
    meter = PairMeter(PAIR_NAMES)
    meter.update(LOSS, POLICY, REFERENCE, pairs([1, 1, 0]))
    columns = header("pairs", {"error": ["other", "brevity"]})
    assert set(meter.means("train")) | set(meter.means("heldout")) <= set(columns)
    columns = header("tokens", {"kind": NAMES["kind"], "source": NAMES["source"]})
    assert set(worked_example().means("train")) <= set(columns)


def test_a_tie_is_half_right():
    assert preferred(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]

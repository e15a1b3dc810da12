"""FSDP2 in one process or two (gloo) trains, saves, scores and fails as one device does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_training import differs
from strategies.sharded_fit import run_case, run_predicted, start, write_place

CASES = ("saved", "sgd", "tied", "lora", "dpo", "bf16")
"""`saved`: AdamW with clipping, from files; `sgd`: random weights, recomputed activations."""
FAULTS = {"poisoned": "loss", "poisoned_gradient": "gradient norm"}
Results = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def plain(place: Path) -> Callable[[str], Results]:
    """Fits of one process with the whole model."""
    return cache(lambda case: run_case(place, case, strategy="one"))


@pytest.fixture(scope="module")
def alone(place: Path, plain: Callable[[str], Results]) -> Results:
    """FSDP2 in one process."""
    plain("saved")
    cases = (*CASES, "resumed:one-1", "resumed:fsdp2-1", *FAULTS, "memory", "predicted")
    return start("fsdp2", place, cases, processes=1)


@pytest.fixture(scope="module")
def two(place: Path, plain: Callable[[str], Results]) -> Results:
    """FSDP2 in two processes."""
    plain("saved")
    resumed = ("resumed:one-1", "resumed:fsdp2-2")
    cases = (*CASES, *resumed, *FAULTS, "memory", "predicted", "damaged")
    return start("fsdp2", place, cases, processes=2)


# --- the same numbers


@pytest.mark.parametrize("case", CASES)
def test_one_process_gives_plain_trainings_numbers_bitwise(
    case: str, alone: Results, plain: Callable[[str], Results]
):
    """bf16 too: only what autocast would round before its product is gathered as bfloat16."""
    (ours,), theirs = alone[case], plain(case)
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert differs(ours["weights"], theirs["weights"]) == 0.0
    assert all(tensor.dtype == torch.float32 for tensor in ours["weights"].values())
    assert ours["norms"] == theirs["norms"] and len(set(ours["norms"])) >= 3
    assert ours["train"] == theirs["train"] and ours["heldout"] == theirs["heldout"]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_plain_trainings_numbers(
    case: str, two: Results, plain: Callable[[str], Results]
):
    """A gradient divided once too often would show in its norm, and with SGD in the weights.

    Measured: weights 2e-6 (bf16 3e-4) after moves of 0.03, norms 2e-5 (bf16 9e-5).
    """
    (ours, others), theirs = two[case], plain(case)
    rounding = 30 if case == "bf16" else 1
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert differs(ours["weights"], theirs["weights"]) < 3e-5 * rounding
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4 * rounding)
    assert ours["norms"] == others["norms"]
    assert others["weights"].keys() == theirs["weights"].keys()
    assert not any(tensor.numel() for tensor in others["weights"].values())
    for split in ("train", "heldout"):
        assert ours[split] == others[split] and ours[split].keys() == theirs[split].keys()
        for name, value in theirs[split].items():
            assert ours[split][name] == pytest.approx(value, rel=1e-4 * rounding, abs=1e-5), name


def test_only_what_autocast_rounds_is_gathered_as_bfloat16(two: Results):
    kept = {"input_layernorm": "torch.float32", "embed_tokens": "torch.float32"}
    assert two["bf16"][0]["dtypes"] == {"down_proj": "torch.bfloat16", **kept}
    assert two["saved"][0]["dtypes"] == {"down_proj": "torch.float32", **kept}


def test_clipping_bites_and_weights_move(plain: Callable[[str], Results]):
    assert min(plain("saved")["norms"]) > 0.5
    moved = plain("saved")["weights"]["lm_head.weight"] - plain("sgd")["weights"]["lm_head.weight"]
    assert moved.abs().max() > 0.01


def test_scores_of_pairs_are_those_of_the_whole_model(place: Path, alone: Results, two: Results):
    expected = run_predicted(place, strategy=None, processes=1)
    assert not expected.isnan().any()
    assert torch.equal(alone["predicted"][0], expected)
    first, second = two["predicted"]
    assert torch.equal(first.isnan(), ~second.isnan())
    assert torch.equal(torch.where(first.isnan(), second, first), expected)


# --- checkpoints


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_fit_ends_bitwise_like_the_undisturbed_one(
    processes: int, alone: Results, two: Results
):
    found = alone if processes == 1 else two
    resumed = found[f"resumed:fsdp2-{processes}"]
    for ours, theirs in zip(resumed, found["saved"], strict=True):
        assert ours["norms"] == theirs["norms"][2:] and ours["heldout"] == theirs["heldout"]
    assert differs(resumed[0]["weights"], found["saved"][0]["weights"]) == 0.0


def test_a_checkpoint_of_a_whole_model_goes_on_split(
    alone: Results, two: Results, plain: Callable[[str], Results]
):
    expected = plain("saved")["weights"]
    assert differs(alone["resumed:one-1"][0]["weights"], expected) == 0.0
    assert differs(two["resumed:one-1"][0]["weights"], expected) < 3e-5  # measured: 3e-7


def test_a_checkpoint_of_two_processes_goes_on_in_one(place: Path, two: Results):
    again = run_case(place, "resumed:fsdp2-2", strategy="one")
    # measured: 2e-7
    assert differs(again["weights"], two["saved"][0]["weights"]) < 3e-5


# --- faults


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("case", "what"), FAULTS.items())
def test_numbers_that_are_not_finite_leave_every_ranks_weights_alone(
    case: str, what: str, processes: int, alone: Results, two: Results
):
    for found in (alone if processes == 1 else two)[case]:
        assert found["message"].startswith(f"step 2: {what}") and "unchanged" in found["message"]
        assert found["unchanged"] and found["tensors"] == 15


def test_damage_that_one_rank_reads_stops_all(two: Results):
    first, second = two["damaged"]
    assert first == second and "1 tensors are not finite, the first is lm_head.weight" in first


# --- memory


def test_no_process_ever_holds_the_whole_model_when_it_comes_from_files(
    place: Path, alone: Results, two: Results
):
    """Of two processes each keeps half, and reads a slice of one tensor at a time."""
    whole, largest = sizes(place / "deep")
    assert alone["memory"][0]["peak"] >= whole  # what is counted is there
    for rank in two["memory"]:
        assert rank["peak"] < whole / 2 + 2 * largest < 0.8 * whole


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all tensors in the folder, and of the largest one."""
    found = [t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    return sum(found), max(found)

"""ZeRO-3 in one process or two (gloo) trains, saves, scores and fails as one device does."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from small_models import packed, random_documents
from small_training import differs
from strategies.sharded_fit import run_case, run_predicted, start, write_place
from torch import Tensor

from mediphi.errors import UserError
from mediphi.strategies import zero3
from mediphi.strategies.sharding import Sharded
from mediphi.strategies.zero3 import Zero3Precision, Zero3Strategy

CASES = ("saved", "sgd", "tied", "lora", "dpo", "bf16")
"""`saved`: AdamW with clipping, from files; `sgd`: random weights, recomputed activations."""
TESTS = Path(__file__).parents[1]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def plain(place: Path) -> Callable[[str], Results]:
    """Fits of one process with the whole model."""
    return cache(lambda case: run_case(place, case, strategy="one"))


@pytest.fixture(scope="module")
def alone(place: Path) -> Results:
    """Several runs after one another in one process that torchrun has not started."""
    paths = [str(TESTS), str(TESTS / "data"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "strategies.zero3_alone", str(place)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {**torch.load(place / "alone.pt", weights_only=True), "said": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def two(place: Path, plain: Callable[[str], Results]) -> Results:
    """Two processes."""
    plain("saved")
    cases = (
        *CASES,
        "lora_bf16",
        "resumed:one-1",
        "resumed:zero3-2",
        "poisoned",
        "poisoned_gradient",
        "memory",
        "predicted",
        "damaged",
    )
    return start("zero3", place, cases, processes=2)


# --- the same numbers


def assert_same_training(ours: Results, theirs: Results, *, rounding: float = 1.0) -> None:
    """Measured: weights 1e-5 after moves of 0.03, norms 5e-5, of which the plain one's own 2e-5."""
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert differs(ours["weights"], theirs["weights"]) < 3e-5 * rounding
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4 * rounding)
    for split in ("train", "heldout"):
        assert ours[split].keys() == theirs[split].keys()
        for name, value in theirs[split].items():
            assert ours[split][name] == pytest.approx(value, rel=1e-4 * rounding, abs=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_plain_trainings_numbers(
    case: str, two: Results, plain: Callable[[str], Results]
):
    """Lightning's own strategy would divide gradients twice: by four here, seen in every norm.

    bf16, measured: weights 2e-4, norms 9e-5. Two chips round so differently, too; float32 is 0.03
    away.
    """
    ours, others = two[case]
    assert_same_training(ours, plain(case), rounding=30 if case == "bf16" else 1)
    assert all(tensor.dtype == torch.float32 for tensor in ours["weights"].values())
    assert not any(tensor.numel() for tensor in others["weights"].values())
    assert ours["norms"] == others["norms"] and ours["train"] == others["train"]


def test_adapters_in_bf16_are_as_near_to_float32_as_those_of_plain_training(
    two: Results, plain: Callable[[str], Results]
):
    """The difference is of rounding's size, alike in one process and two; its place is not known.

    Measured: weights 6e-3 off, the norm of step five 1.4 %, the first two 2e-5; from float32 both
    are 0.026 away. Weights kept or updated in bfloat16 would be further away than plain ones.
    """
    ours, exact = two["lora_bf16"][0], plain("lora")
    theirs = plain("lora_bf16")
    assert_same_training(ours, theirs, rounding=300)
    assert ours["norms"][:2] == pytest.approx(theirs["norms"][:2], rel=1e-4)
    off, plainly_off = (differs(run["weights"], exact["weights"]) for run in (ours, theirs))
    assert off < 1.1 * plainly_off
    assert all(tensor.dtype == torch.float32 for tensor in ours["weights"].values())


@pytest.mark.parametrize("case", ["saved", "offloaded"])
def test_one_process_gives_plain_trainings_numbers(
    case: str, alone: Results, plain: Callable[[str], Results]
):
    """Offloaded, gradients reach AdamW on another way, and are clipped on it."""
    assert_same_training(alone[case], plain("saved"))
    assert min(alone[case]["norms"]) > 0.5  # clipping bites


def test_one_process_and_two_round_alike_with_bf16(alone: Results, two: Results):
    """Measured: 1e-5. Where DeepSpeed adds gradients up in bfloat16, its own choice, it is 0.01."""
    assert differs(alone["bf16"]["weights"], two["bf16"][0]["weights"]) < 1e-4


def test_scores_of_pairs_are_those_of_the_whole_model(place: Path, alone: Results, two: Results):
    expected = run_predicted(place, strategy=None, processes=1)
    torch.testing.assert_close(alone["predicted"], expected, rtol=1e-5, atol=0)
    first, second = two["predicted"]
    assert torch.equal(first.isnan(), ~second.isnan())
    both = torch.where(first.isnan(), second, first)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=0)


# --- what DeepSpeed has been told, and what it has made of it


def test_deepspeed_has_understood_its_config(alone: Results):
    assert alone["inside"]["config"] == {
        "accumulation": 1,
        "managed": False,
        "clipping": 0.0,
        "stage": 3,
        "whole_numel": 1500,
        "autocast": True,
        "timer": False,
        "half": False,
    }


def test_matrices_decay_and_norms_do_not_although_split_ones_are_empty(alone: Results):
    """`ndim` of a split parameter is 1: all would pass for norms."""
    decay = alone["inside"]["decay"]
    assert len(decay) == 14
    assert {n for n, d in decay.items() if d == 0.0} == {n for n in decay if "norm" in n}


def test_large_parameters_are_split_between_steps(alone: Results):
    inside = alone["inside"]
    expected = {n: size if size <= 1500 else 0 for n, size in inside["numel"].items()}
    assert inside["held"] == expected and 0 in expected.values() and 1024 in expected.values()


def test_what_autocast_rounds_travels_rounded_and_nothing_else(alone: Results):
    """The tied head is an embedding too, whose rows autocast leaves alone."""
    inside = alone["inside"]
    assert set(inside["sent rounded"]) == {n for n in inside["numel"] if "_proj" in n}
    assert inside["reduced as"] == ["torch.float32"]
    assert set(inside["buffers"].values()) == {"torch.float32"}


def test_the_process_is_left_as_it_was(alone: Results):
    assert alone["inside"]["linear is patched"] and alone["linear"]
    assert alone["environment"]


def test_deepspeed_is_imported_by_who_uses_it_and_says_nothing(alone: Results):
    assert not alone["imported early"]
    assert "deepspeed" not in alone["said"].lower()


def test_batches_are_neither_taken_apart_nor_rounded():
    batch = packed(random_documents([5, 7]))
    assert Zero3Precision("bf16-mixed").convert_input(batch) is batch
    logps = torch.tensor([-60.123])
    assert Zero3Precision("bf16-mixed").convert_input(logps) is logps
    assert DeepSpeedPrecision("bf16-mixed").convert_input(logps).dtype == torch.bfloat16


def test_it_is_what_the_modules_ask_for():
    assert issubclass(Zero3Strategy, Sharded)


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero3, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'mediphi\[deepspeed\]'"):
        Zero3Strategy(device_type="cpu")


# --- checkpoints


def test_a_resumed_fit_ends_bitwise_like_the_undisturbed_one(alone: Results, two: Results):
    assert differs(alone["resumed"]["weights"], alone["saved"]["weights"]) == 0.0
    for ours, theirs in zip(two["resumed:zero3-2"], two["saved"], strict=True):
        assert ours["norms"] == theirs["norms"][2:] and ours["heldout"] == theirs["heldout"]
    assert differs(two["resumed:zero3-2"][0]["weights"], two["saved"][0]["weights"]) == 0.0


def test_a_checkpoint_of_a_whole_model_goes_on_split(two: Results, plain: Callable[[str], Results]):
    # measured: 1e-5
    assert differs(two["resumed:one-1"][0]["weights"], plain("saved")["weights"]) < 3e-5


def test_a_checkpoint_of_two_processes_goes_on_in_one(place: Path, two: Results):
    again = run_case(place, "resumed:zero3-2", strategy="one")
    # measured: 2e-6
    assert differs(again["weights"], two["saved"][0]["weights"]) < 3e-5


# --- faults


@pytest.mark.parametrize(
    ("case", "what"), [("poisoned", "loss"), ("poisoned_gradient", "gradient norm")]
)
def test_numbers_that_are_not_finite_leave_every_ranks_weights_alone(
    case: str, what: str, two: Results
):
    for found in two[case]:
        assert found["message"].startswith(f"step 2: {what}") and "unchanged" in found["message"]
        assert found["unchanged"] and found["tensors"] == 15


def test_damage_that_one_rank_reads_stops_all(two: Results):
    first, second = two["damaged"]
    assert first == second and "1 tensors are not finite, the first is lm_head.weight" in first


# --- memory


def test_no_process_ever_holds_the_whole_model_when_it_comes_from_files(place: Path, two: Results):
    """Of two processes each keeps half; rank 0 reads one tensor at a time, whole, and checks it."""
    whole, largest = sizes(place / "deep")
    for rank in two["memory"]:
        assert whole / 2 <= rank["peak"] < whole / 2 + 3 * largest < 0.9 * whole


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all tensors in the folder, and of the largest one."""
    from safetensors.torch import load_file

    found: list[Tensor] = []
    for path in folder.glob("*.safetensors"):
        found += load_file(path).values()
    return sum(t.nbytes for t in found), max(t.nbytes for t in found)

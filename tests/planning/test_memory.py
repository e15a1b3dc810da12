"""What a plan says of memory: parts of strategies, recomputation, and a real model's numbers."""

from functools import cache
from typing import Any

import pytest
from composing import composed
from small_models import ASSETS, packed, random_documents

from mediphi.backbone import BackboneSpec
from mediphi.budget import estimate
from mediphi.config import Config, load
from mediphi.config.stages import Lora, Optimizer, Phase
from mediphi.engine import Device
from mediphi.modules.language_model import LanguageModelModule
from mediphi.planning.dry_run import Footprint, dry_run
from mediphi.planning.memory import Memory, least_state, memory_of
from mediphi.records import PIECE_KINDS

STATE = ("weights", "gradients", "moments")


def module(folder: str, **changes: Any) -> LanguageModelModule:
    spec = BackboneSpec(folder, init="random", revision="main", kernel="sdpa", **changes)
    return LanguageModelModule(
        group_names={"kind": PIECE_KINDS, "source": ("a",), "task": ("",)},
        backbone=spec,
        phase=Phase(lr=1e-3),
        optimizer=Optimizer(),
        num_steps=1,
        splits=1,
    )


@cache
def footprint(
    name: str = "tiny", *, mixed: bool = True, rows: int = 1, recompute: bool = False, rank: int = 0
) -> Footprint:
    batch = packed(random_documents([200, 100, 150, 62] * rows))
    return dry_run(
        lambda: module(
            str(ASSETS / name),
            recomputed_layers=99 if recompute else 0,
            lora=Lora(rank=rank) if rank else None,
        ),
        batch,
        mixed=mixed,
        accumulates=True,
    )


CPU = Device("cpu", "CPU", "bf16-mixed", "sdpa")


def config(*overrides: str) -> Config:
    return load(composed("stage=pit", "corpus=medcode", "stage.global_batch=64", *overrides))


def memory(found: Footprint, *overrides: str, gpu: bool = True) -> Memory:
    device = Device("cuda" if gpu else "cpu", "H100" if gpu else "CPU", "bf16-mixed", "varlen")
    return memory_of(found, config=config("hardware.micro_batch=1", *overrides), device=device)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_split_model_leaves_an_eighth_of_the_state_on_each_of_eight(strategy: str):
    eight = ("hardware.accelerator=gpu", "hardware.devices=8")
    whole = memory(footprint(), *eight, "hardware.strategy=ddp")
    split = memory(footprint(), *eight, f"hardware.strategy={strategy}")
    for item in STATE:
        assert split.items[item] == whole.items[item] / 8


def test_offload_moves_the_state_to_the_host():
    where = ("hardware.accelerator=gpu", "hardware.devices=8", "hardware.strategy=zero3")
    here, there = (memory(footprint(), *where, f"hardware.offload={o}") for o in ("false", "true"))
    assert not set(STATE) & set(there.items)
    assert there.host == {item: here.items[item] for item in STATE}


def test_the_state_is_the_models_16_bytes_a_parameter():
    budget = estimate(str(ASSETS / "tiny"), config=config(), device=CPU)
    state = sum(memory(footprint()).items[item] for item in STATE)
    assert state == 16 * budget.num_parameters


def test_recomputation_lowers_activations():
    plain, recomputed = (memory(footprint(recompute=r)).items for r in (False, True))
    assert recomputed["activations"] + recomputed.get("backward", 0) < 0.7 * plain["activations"]
    assert all(recomputed[item] == plain[item] for item in STATE)


def test_activations_grow_with_the_rows_of_a_micro_batch():
    one, four = (memory(footprint(rows=r)).items["activations"] for r in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.02)


def test_adapters_have_small_gradients_and_moments():
    full, adapted = memory(footprint()).items, memory(footprint(rank=4)).items
    assert adapted["moments"] == 2 * adapted["gradients"] < 0.1 * full["moments"]


def test_autocast_keeps_fewer_bytes_than_float32():
    mixed, exact = (footprint(mixed=m).passing_peak["activations"] for m in (True, False))
    assert mixed < 0.8 * exact


def test_phi35_minis_state_fills_61_gigabytes_and_an_eighth_of_it_under_zero3():
    budget = estimate(str(ASSETS / "phi35_mini"), config=config(), device=CPU)
    one = least_state(budget, config=config("hardware.micro_batch=1"))
    assert one == 16 * 3_821_079_552 == pytest.approx(61.14e9, rel=1e-3)
    eight = config(
        *("hardware.micro_batch=1", "hardware.accelerator=gpu"),
        *("hardware.devices=8", "hardware.strategy=zero3"),
    )
    assert least_state(budget, config=eight) == one / 8


def test_phi35_mini_is_planned_without_its_61_gigabytes():
    found = footprint("phi35_mini", recompute=True)
    items = memory(found).items
    assert sum(items[item] for item in STATE) == pytest.approx(61.14e9, rel=1e-3)
    assert found.parameters == 3_821_079_552

"""What a plan says of memory: parts of strategies, recomputation, and a real model's numbers."""

from functools import cache
from typing import Any

import pytest
import torch
from composing import composed
from small_models import ASSETS, packed, random_documents

from mediphi import engine
from mediphi.backbone import BackboneSpec
from mediphi.budget import estimate
from mediphi.config import Config, load
from mediphi.config.stages import Lora, Optimizer, Phase
from mediphi.engine import Device
from mediphi.modules.language_model import LanguageModelModule
from mediphi.planning.dry_run import Footprint, dry_run
from mediphi.planning.memory import Memory, least_state, memory_of
from mediphi.records import PIECE_KINDS
from mediphi.strategies.memory import Sizes, added
from mediphi.strategies.zero3 import Zero3Strategy

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
    assert {item: there.host[item] for item in STATE} == {item: here.items[item] for item in STATE}


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
    one = least_state(budget, config=config("hardware.micro_batch=1"), device=CPU)
    assert one == 16 * 3_821_079_552 == pytest.approx(61.14e9, rel=1e-3)
    eight = config(
        *("hardware.micro_batch=1", "hardware.accelerator=gpu"),
        *("hardware.devices=8", "hardware.strategy=zero3"),
    )
    assert least_state(budget, config=eight, device=CPU) == one / 8
    offloaded = config(
        *("hardware.micro_batch=1", "hardware.devices=8"),
        *("hardware.strategy=zero3", "hardware.offload=true"),
    )
    assert least_state(budget, config=offloaded, device=CPU) == one / 8  # where it is all the same
    h100 = Device("cuda", "H100", "bf16-mixed", "varlen", 2048)
    assert least_state(budget, config=offloaded, device=h100) == 0


def test_phi35_mini_is_planned_without_its_61_gigabytes():
    found = footprint("phi35_mini", recompute=True)
    items = memory(found).items
    assert sum(items[item] for item in STATE) == pytest.approx(61.14e9, rel=1e-3)
    assert found.parameters == 3_821_079_552


EIGHT = ("hardware.accelerator=gpu", "hardware.devices=8")
STRATEGIES = [
    ("hardware.strategy=ddp",),
    ("hardware.strategy=fsdp2",),
    ("hardware.strategy=zero3",),
    ("hardware.strategy=zero3", "hardware.offload=true"),
]


@pytest.mark.parametrize("name", ["H100", "H200"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda words: words[-1])
def test_the_estimate_that_steers_recomputation_agrees_with_the_dry_run(
    strategy: tuple[str, ...], name: Any
):
    """Phi-3.5-mini, a full row of 4,096 tokens: as many layers as the run itself recomputes."""
    device = Device("cuda", name, "bf16-mixed", "varlen", 2048, engine.GPUS[name].memory)
    chosen = config("hardware.micro_batch=1", "stage.max_length=4096", *EIGHT, *strategy)
    budget = estimate(str(ASSETS / "phi35_mini"), config=chosen, device=device)
    planned = memory_of(phi_footprint(budget.recomputed_layers), config=chosen, device=device)
    assert budget.memory_bytes == pytest.approx(planned.total, rel=0.1)
    assert planned.total <= 0.95 * engine.GPUS[name].memory


def test_phi35_mini_fits_on_eight_gpus_with_80_gigabytes_under_ddp():
    chosen = config("hardware=gpu8_ddp", "stage.max_length=4096")
    device = Device("cuda", "H100", "bf16-mixed", "varlen", 2048, engine.GPUS["H100"].memory)
    budget = estimate(str(ASSETS / "phi35_mini"), config=chosen, device=device)
    planned = memory_of(phi_footprint(budget.recomputed_layers), config=chosen, device=device)
    assert planned.total <= engine.GPUS["H100"].memory


@cache
def phi_footprint(recomputed: int) -> Footprint:
    folder = str(ASSETS / "phi35_mini")
    return dry_run(
        lambda: module(folder, recomputed_layers=recomputed, loss_chunk_tokens=2048),
        packed(random_documents([4096])),
        mixed=True,
        accumulates=True,
    )


def test_the_planned_bucket_is_the_one_that_deepspeed_is_told():
    strategy = Zero3Strategy(device_type="cpu")
    strategy.parallel_devices = [torch.device("cpu")]
    strategy._format_config()
    assert isinstance(strategy.config, dict)
    told = strategy.config["zero_optimization"]["reduce_bucket_size"]
    large = Sizes(parameters=10**9, trained=10**9, largest_layer=1, root=1)
    buckets = added(large, strategy="zero3", precision="32-true")["buckets"]
    assert buckets == 2 * 4 * told


def test_ddp_keeps_gradients_once():
    alone, eight = (memory(footprint(), *words).items for words in ((), EIGHT))
    assert alone == eight

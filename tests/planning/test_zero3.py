"""What a plan says of ZeRO-3 is what DeepSpeed keeps, gathers and sends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from planning.test_memory import footprint

from mediphi.config import load
from mediphi.engine import Device
from mediphi.planning.memory import Memory, memory_of
from mediphi.strategies.memory import Sizes, added, master_copy

TESTS = Path(__file__).parents[1]
OFFLOAD = "hardware.offload=true"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("place")
    paths = [str(TESTS), str(TESTS / "data"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "planning.zero3_kept", str(place)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((place / "kept.json").read_text())


def planned(*overrides: str, gpu: bool, devices: int = 8) -> Memory:
    """Of Phi-3's small sister in bf16."""
    device = Device("cuda" if gpu else "cpu", "H100" if gpu else "CPU", "bf16-mixed", "varlen")
    words = [f"hardware.accelerator={'gpu' if gpu else 'cpu'}", f"hardware.devices={devices}"]
    words += ["hardware.micro_batch=1", "stage.global_batch=64", "hardware.strategy=zero3"]
    config = load(composed("stage=pit", "corpus=medcode", *words, *overrides))
    return memory_of(footprint(), config=config, device=device)


STATE = ("weights", "master copy", "gradients", "gradient copy", "moments")
STEPPED = ("weights", "master copy", "gradients", "moments")


@pytest.mark.parametrize("name", ["zero3", "zero3 offload"])
def test_deepspeed_keeps_what_is_planned_for_each_parameter(kept: dict[str, Any], name: str):
    """4 bytes a parameter and item, the moments 8: AdamW steps a copy of float32 weights."""
    found = kept[name]
    memory = planned(*([OFFLOAD] if "offload" in name else []), gpu=True)
    items = memory.host if "offload" in name else memory.items
    share = footprint().parameters / 8
    state = {item: size / share for item, size in items.items() if item in STATE}
    assert found["kept"] == {item: size * found["parameters"] for item, size in state.items()}


def test_weights_that_travel_in_bfloat16_are_gathered_in_float32(kept: dict[str, Any]):
    held, sent, size = kept["zero3"]["gathered"]
    assert (held, sent) == ("torch.float32", "torch.bfloat16") and size > 0
    sizes = Sizes(parameters=1_100, trained=1_100, largest_layer=100, root=100)
    half, exact = (
        added(sizes, strategy="zero3", precision=precision)["gathered layers"]
        for precision in ("bf16-mixed", "32-true")
    )
    assert (half, exact) == (4 * 1_100 + 2 * 1_000, 4 * 1_100 + 4 * 1_000)  # and what arrives


def test_the_items_of_a_rank_add_up_to_its_total():
    memory = planned(gpu=True)
    copies = master_copy(footprint(), strategy="zero3") / 8
    assert memory.items["master copy"] == copies == memory.items["weights"]
    assert memory.total == sum(memory.items.values()) and not memory.host
    stepped = sum(memory.items[item] for item in STEPPED)
    assert stepped == pytest.approx(20 * footprint().parameters / 8)


def test_the_host_holds_24_bytes_a_parameter_of_what_is_offloaded():
    there = planned(OFFLOAD, gpu=True)
    assert not set(STATE) & set(there.items)
    assert sum(there.host.values()) == pytest.approx(24 * footprint().parameters / 8)


def test_on_a_cpu_offload_moves_nothing_out_of_the_total():
    plain, offloaded = planned(gpu=False, devices=2), planned(OFFLOAD, gpu=False, devices=2)
    assert not offloaded.host
    more = {item: n for item, n in offloaded.items.items() if item not in plain.items}
    assert more == {"gradient copy": plain.items["gradients"]}
    assert offloaded.total == pytest.approx(plain.total + sum(more.values()))


def test_gloo_copies_the_bucket_that_it_reduces():
    cpu, gpu = planned(gpu=False, devices=2).items, planned(gpu=True).items
    assert cpu["gloo"] == cpu["buckets"] / 2 and "gloo" not in gpu

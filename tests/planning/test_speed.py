"""What a plan says of time: factors of a table, measured on a CPU, assumed of a GPU."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from composing import composed
from hypothesis import given
from hypothesis import strategies as st
from small_models import write_small_folder
from small_runs import set_up

from mediphi.config import load
from mediphi.engine import Device
from mediphi.phases import Training
from mediphi.planning.page import show_time
from mediphi.planning.plan import Planner
from mediphi.planning.speed import (
    FACTORS,
    GLOO,
    NETWORK,
    Factors,
    Link,
    Rates,
    Work,
    link_of,
    rates_of,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
H100 = Device("cuda", "H100", "bf16-mixed", "varlen", 2048, 80e9, is_here=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("speed")
    return set_up(folder, "dpo", model=write_small_folder(folder / "model"))


@pytest.fixture(scope="module")
def fit() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    import planner_fit

    yield planner_fit
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def lines(fit: ModuleType) -> list[dict[str, Any]]:
    return fit.read()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_plans_seconds_are_made_with_the_tables_factors(run: Training, precision: str):
    plan = Planner(replace(run, device=replace(run.device, precision=precision))).plan()
    assert plan.factors is FACTORS["cpu", precision]
    seconds = [
        work.seconds(plan.rates, FACTORS["cpu", precision], link=plan.link) for work in plan.works
    ]
    assert plan.seconds == sum(seconds) and len(seconds) == len(run.phases)


def test_the_page_says_of_which_device_factors_were_measured(
    run: Training, capsys: pytest.CaptureFixture[str]
):
    pages = {}
    for name, device in (("cpu", run.device), ("gpu", H100)):
        plan = Planner(replace(run, device=device)).plan()
        show_time(plan, device=device, config=run.config)
        pages[name] = capsys.readouterr().out
    assert "were reached by steps measured on a CPU" in pages["cpu"]
    assert "assumed" not in pages["cpu"]
    assert "are assumed to be reached, not yet measured on a GPU" in pages["gpu"]
    factors = FACTORS["cuda", "bf16-mixed"]
    assert f"{factors.products:.0%} and {factors.traffic:.0%}" in pages["gpu"]


def test_factors_of_a_gpu_do_not_claim_to_be_measured():
    assert {(device, factors.measured) for (device, _), factors in FACTORS.items()} == {
        ("cpu", True),
        ("cuda", False),
    }


def test_of_several_processes_on_a_cpu_nothing_is_said_to_be_measured(
    run: Training, capsys: pytest.CaptureFixture[str]
):
    several = Planner(run).changed({"hardware.devices": 2, "hardware.micro_batch": 1})
    assert several is not None
    show_time(Planner(several).plan(), device=several.device, config=several.config)
    page = capsys.readouterr().out
    assert "were reached by steps of one process measured on a CPU" in page
    assert "2 processes send one another 1 GB/s each over gloo: assumed, and that they do" in page


@pytest.mark.parametrize(
    ("name", "nodes", "link", "rate"),
    [
        ("H100", 1, "NVLink", 300e9),
        ("A100", 1, "NVLink", 200e9),
        ("RTX 4090", 1, "PCIe", 64e9 / 3),
        ("H100", 2, "the network between machines", NETWORK),
        ("RTX 4090", 2, "PCIe", 64e9 / 3),  # slower than the network
        ("CPU", 1, "gloo", GLOO),
        ("CPU", 2, "gloo", GLOO),
    ],
)
def test_devices_send_over_what_they_have(name: str, nodes: int, link: str, rate: float):
    kind = "cpu" if name == "CPU" else "cuda"
    device = replace(H100, type=kind, name=name, kernel="sdpa")
    words = ("hardware=gpu8_ddp", f"hardware.num_nodes={nodes}", "stage.global_batch=64")
    found = link_of(rates_of(device), config=load(composed(*words)))
    assert found.name == link and found.rate == pytest.approx(rate)


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, positive)
def test_products_and_traffic_take_turns_and_hide_what_is_sent(
    flops: float, traffic: float, sent: float, offloaded: float
):
    link = Link("", 8.0)
    work = Work(flops=flops, traffic=traffic, sent=sent, offloaded=offloaded)
    rates, factors = Rates(2.0, 4.0, "", link, host=2.0), Factors(0.5, 0.25, measured=True)
    seconds = work.seconds(rates, factors, link=link)
    assert seconds == pytest.approx(max(flops + traffic, sent / 8) + offloaded / 2)
    assert work.times(7).seconds(rates, factors, link=link) == pytest.approx(7 * seconds)


# --- what benchmarks/planner_memory.py has measured


def test_the_constants_held_are_those_that_the_recorded_lines_give(
    fit: ModuleType, lines: list[dict[str, Any]]
):
    held, fitted = fit.held_constants(), fit.fitted_constants(lines)
    for name, value in fitted.items():
        assert held[name] == pytest.approx(value, rel=0.02, abs=0.05), name


def test_the_least_squares_find_constants_that_were_put_in(
    fit: ModuleType, lines: list[dict[str, Any]]
):
    """Measurements made up from the plan's own constants give them back."""
    made = fit.predicted(lines)
    for line in made:
        for key in ("mib", "tokens_per_s"):
            if f"predicted_{key}" in line:
                line[f"measured_{key}"] = line[f"predicted_{key}"]
    held, found = fit.held_constants(), fit.fitted_constants(made)
    for name, value in found.items():
        assert value == pytest.approx(held[name], rel=0.03, abs=0.5), name


def test_recorded_predictions_are_those_of_the_constants(
    fit: ModuleType, lines: list[dict[str, Any]]
):
    assert fit.predicted(lines) == lines


def test_the_ratio_of_speed_is_that_of_the_columns_beside_it(lines: list[dict[str, Any]]):
    timed = [line for line in lines if line["figure"] == "planner speed"]
    assert timed
    for line in timed:
        ratio = line["measured_tokens_per_s"] / line["predicted_tokens_per_s"]
        assert line["measured_over_predicted"] == pytest.approx(ratio, rel=0.01)


def test_at_least_six_configurations_had_no_part_in_the_constants(lines: list[dict[str, Any]]):
    for figure in ("planner memory", "planner speed"):
        group = {
            fitted: {
                x["configuration"] for x in lines if (x["figure"], x["fitted"]) == (figure, fitted)
            }
            for fitted in (True, False)
        }
        assert len(group[False]) >= 6 and group[True] and not group[True] & group[False]

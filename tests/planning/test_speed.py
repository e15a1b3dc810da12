"""What a plan says of time: factors of a table, measured on a CPU, assumed of a GPU."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import write_small_folder
from small_runs import set_up

from mediphi.engine import Device
from mediphi.phases import Training
from mediphi.planning.page import show_time
from mediphi.planning.plan import Planner
from mediphi.planning.speed import FACTORS, Factors, Rates, Work

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
    seconds = [work.seconds(plan.rates, FACTORS["cpu", precision]) for work in plan.works]
    assert plan.seconds == sum(seconds) and len(seconds) == len(run.phases)
    assert all(work.operations > 0 for work in plan.works)


def test_the_page_says_of_which_device_factors_were_measured(
    run: Training, capsys: pytest.CaptureFixture[str]
):
    pages = {}
    for name, device in (("cpu", run.device), ("gpu", H100)):
        show_time(Planner(replace(run, device=device)).plan(), device=device, num_devices=1)
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


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive)
def test_products_traffic_and_operations_take_turns(
    flops: float, traffic: float, operations: float
):
    work = Work(flops=flops, traffic=traffic, sent=0, offloaded=0, operations=operations)
    seconds = work.seconds(Rates(2.0, 4.0, ""), Factors(0.5, 0.25, 3.0, measured=True))
    assert seconds == pytest.approx(flops + traffic + 3 * operations)
    many = work.times(7).seconds(Rates(2.0, 4.0, ""), Factors(0.5, 0.25, 3.0, measured=True))
    assert many == pytest.approx(7 * seconds)


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


def test_at_least_six_configurations_had_no_part_in_the_constants(lines: list[dict[str, Any]]):
    for figure in ("planner memory", "planner speed"):
        group = {
            fitted: {
                x["configuration"] for x in lines if (x["figure"], x["fitted"]) == (figure, fitted)
            }
            for fitted in (True, False)
        }
        assert len(group[False]) >= 6 and group[True] and not group[True] & group[False]

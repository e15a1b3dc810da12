"""Which changes a plan proposes where a run does not fit, and in which order."""

from dataclasses import replace

import pytest
from composing import composed
from small_models import write_small_folder
from small_runs import set_up

from mediphi.config import load
from mediphi.engine import Device
from mediphi.phases import Training
from mediphi.planning import plan
from mediphi.planning.fitting import Fit, adapters_of, cheapest_fit, layouts_of, savings_of
from mediphi.planning.page import advice, words
from mediphi.planning.plan import Planner, with_change

H100 = Device("cuda", "H100", "bf16-mixed", "varlen", 2048, 80e9, is_here=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("plan")
    model = write_small_folder(folder / "model")
    return set_up(folder, "dpo", "hardware.micro_batch=4", "stage.global_batch=4", model=model)


def with_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda *_, **__: size)


def test_a_change_that_is_named_fits_when_planned_again(
    run: Training, monkeypatch: pytest.MonkeyPatch
):
    needed = Planner(run).plan().memory.total
    with_memory(monkeypatch, needed - 1)
    planner = Planner(run)
    assert not planner.plan().fits
    fit = cheapest_fit(planner)
    assert fit is not None and fit.change == {"hardware.micro_batch": 2}
    changed = planner.changed(fit.change)
    assert changed is not None and planner.plan(changed).fits
    assert planner.plan(changed).memory == fit.plan.memory


def test_where_no_change_is_enough_none_is_named(run: Training, monkeypatch: pytest.MonkeyPatch):
    with_memory(monkeypatch, 1.0)
    assert cheapest_fit(Planner(run)) is None
    assert "no change" in advice(None)


def changed_words(*overrides: str) -> dict[str, list[str]]:
    """What is proposed for this run on GPUs, as it would be typed."""
    config = load(composed(*overrides))
    found = {
        "savings": savings_of(config),
        "layouts": layouts_of(config, on_gpu=True),
        "adapters": adapters_of(config),
    }
    return {name: [words(change) for change in changes] for name, changes in found.items()}


SFT = ("stage=sft", "corpus=mediflow", "stage.global_batch=64")


def test_combinations_are_tried_in_order_of_their_cost():
    found = changed_words(*SFT, "hardware=gpu", "hardware.micro_batch=2")
    assert found["savings"] == [
        "",
        "hardware.micro_batch=1",
        "hardware.activation_checkpointing=true",
        "hardware.micro_batch=1 hardware.activation_checkpointing=true",
    ]
    assert found["layouts"][:5] == [
        "",
        "hardware.strategy=zero3 hardware.offload=true",
        "hardware.devices=2 hardware.strategy=fsdp2",
        "hardware.devices=2 hardware.strategy=zero3",
        "hardware.devices=2 hardware.strategy=zero3 hardware.offload=true",
    ]
    assert [line.split()[0] for line in found["layouts"][5:]] == [
        *["hardware.devices=4"] * 3,
        *["hardware.devices=8"] * 3,
    ]
    assert found["adapters"] == ["", "stage.lora.rank=16"]


def test_devices_that_are_asked_for_share_the_model_before_more_are_proposed():
    found = changed_words(*SFT, "hardware=gpu8_ddp")["layouts"]
    assert found == [
        "",
        "hardware.strategy=fsdp2",
        "hardware.strategy=zero3",
        "hardware.strategy=zero3 hardware.offload=true",
    ]


def test_processes_of_a_cpu_share_one_memory():
    config = load(composed(*SFT, "hardware=cpu"))
    assert list(layouts_of(config, on_gpu=False)) == [{}]


SPLITTABLE = ("hardware=gpu8_ddp", "stage.global_batch=64")
LAID_OUT = [
    ("stage=sft", "corpus=mediflow", "hardware.compile=true", *SPLITTABLE),
    ("stage=dpo", "corpus=mediflow_dpo", "stage.reference=live", *SPLITTABLE),
    ("stage=sft", "corpus=mediflow", "hardware=gpu", "stage.global_batch=64"),
    (
        "stage=pit",
        "corpus=medcode",
        "hardware=h100x8_zero3_offload",
        "hardware.devices=2",
        "stage.global_batch=64",
    ),
]


@pytest.mark.parametrize("choice", LAID_OUT, ids=lambda choice: choice[2])
def test_every_change_is_one_that_the_schema_takes(choice: tuple[str, ...]):
    config = load(composed(*choice))
    frugal = [*savings_of(config)][-1]
    layouts = list(layouts_of(config, on_gpu=True))
    for layout in layouts:
        change = {**frugal, **layout, **[*adapters_of(config)][-1]}
        assert with_change(config, change) == load(composed(*choice, *words(change).split()))
    assert any(change.get("hardware.strategy") == "fsdp2" for change in layouts)
    assert len({words(change) for change in layouts}) == len(layouts)


def on_gpu(run: Training, size: float, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """The run planned for an absent GPU with this much memory, its context aside."""
    monkeypatch.setattr("mediphi.strategies.memory.CUDA_CONTEXT", 0.0)
    with_memory(monkeypatch, size)
    return Planner(replace(run, device=replace(H100, memory_bytes=size)))


def test_one_gpu_is_told_of_offload_where_nothing_cheaper_fits(
    run: Training, monkeypatch: pytest.MonkeyPatch
):
    offload = {"hardware.strategy": "zero3", "hardware.offload": True}
    frugal = [*savings_of(run.config)][-1]
    planner = on_gpu(run, 1e12, monkeypatch)
    without, offloaded = (
        planner.plan(changed).memory.total
        for change in (frugal, {**frugal, **offload})
        if (changed := planner.changed(change)) is not None
    )
    assert offloaded < without
    fit = cheapest_fit(on_gpu(run, (without + offloaded) / 2, monkeypatch))
    assert fit is not None and fit.change.items() >= offload.items()
    assert "hardware.devices" not in fit.change and "stage.lora.rank" not in fit.change
    assert "GB in the machine's memory" in advice(fit)


def test_adapters_come_last_and_are_called_another_training(
    run: Training, monkeypatch: pytest.MonkeyPatch
):
    planner = on_gpu(run, 1e12, monkeypatch)
    smallest = [
        min(
            planner.plan(changed).memory.total
            for layout in layouts_of(run.config, on_gpu=True)
            for change in ({**[*savings_of(run.config)][-1], **layout, **adapters},)
            if (changed := planner.changed(change)) is not None
        )
        for adapters in adapters_of(run.config)
    ]
    assert smallest[1] < smallest[0]
    fit = cheapest_fit(on_gpu(run, sum(smallest) / 2, monkeypatch))
    assert fit is not None and fit.change["stage.lora.rank"] == 16
    assert "another training, with another result and a run of its own" in advice(fit)
    assert "another training" not in advice(Fit({"hardware.micro_batch": 1}, fit.plan))

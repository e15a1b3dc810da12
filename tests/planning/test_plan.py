"""The plan of a run: the page, changes that would make it fit, and what is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from composing import composed
from small_models import ASSETS, write_small_folder
from small_runs import set_up
from torch._dynamo.utils import counters

from mediphi import engine, training
from mediphi.config import load
from mediphi.config.schema import GpuName
from mediphi.engine import Device
from mediphi.errors import ConfigError, UserError
from mediphi.phases import Training
from mediphi.planning import plan
from mediphi.planning.page import show_plan
from mediphi.planning.plan import Planner

ROOT = Path(__file__).parents[2]
H100 = Device("cuda", "H100", "bf16-mixed", "varlen", 2048, 80e9, is_here=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("plan")
    model = write_small_folder(folder / "model")
    return set_up(folder, "dpo", "hardware.micro_batch=4", "stage.global_batch=4", model=model)


def with_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda *_, **__: size)


@pytest.mark.parametrize(("spare", "verdict"), [(1.04, "fits, but closely"), (1.06, "fits")])
def test_a_plan_that_leaves_little_free_says_so(
    run: Training,
    spare: float,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with_memory(monkeypatch, spare * Planner(run).plan().memory.total)
    show_plan(Planner(run))
    assert f": {verdict}\n" in capsys.readouterr().out


@pytest.mark.parametrize("is_here", [True, False])
def test_offloaded_memory_is_compared_with_the_machine_that_is_planned_for(
    run: Training,
    is_here: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    offload = {"hardware.strategy": "zero3", "hardware.offload": True}
    changed = Planner(replace(run, device=H100)).changed(offload)
    assert changed is not None
    monkeypatch.setattr(plan, "free_memory", lambda: 1000)
    changed = replace(changed, device=replace(H100, is_here=is_here))
    assert Planner(changed).plan().fits != is_here
    show_plan(Planner(changed))
    page = capsys.readouterr().out
    assert ("0.0 are free: DOES NOT FIT" in page) == is_here
    assert ("so much must be free there" in page) != is_here
    monkeypatch.setattr(plan, "free_memory", lambda: 10**12)
    assert Planner(changed).plan().fits


def test_a_full_disk_is_told_with_what_to_do(
    run: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    needed, state = run.budget.disk_bytes, run.budget.state_bytes
    assert run.config.hardware.checkpoints.keep == 2  # so that one fewer is a remedy
    for free, said in (
        (1.2 * needed, ""),
        (1.2 * needed - state, "hardware.checkpoints.keep=1, or another paths.runs"),
        (0, "or set another paths.runs"),
    ):
        monkeypatch.setattr(
            "shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=int(free) + 1)
        )
        show_plan(Planner(run))
        page = capsys.readouterr().out
        assert ("a run would end with: " in page) == bool(said) and said in page


def test_without_the_live_reference_its_bytes_are_gone(tmp_path: Path):
    model = write_small_folder(tmp_path / "model")
    planner = Planner(set_up(tmp_path, "dpo", "stage.reference=live", model=model))
    cached = planner.changed({"stage.reference": "cached"})
    assert cached is not None
    live, without = planner.plan().memory.items, planner.plan(cached).memory.items
    assert live["reference"] == pytest.approx(live["weights"], rel=1e-3)
    assert "reference" not in without


def test_rows_of_compiled_layers_are_planned_with_their_padding(run: Training):
    """Seen on plain layers: nothing is compiled for a plan."""
    planner = Planner(run)
    compiled = planner.changed({"hardware.compile": True})
    assert compiled is not None and run.compiled_tokens is None
    _, batch = plan._largest(run.phases[0])
    padding = (compiled.compiled_tokens or 0) / batch.num_tokens
    assert compiled.compiled_tokens == 4 * 600 and padding > 1.02
    counters.clear()
    plain, padded = planner.plan(), planner.plan(compiled)
    assert not counters["stats"]
    ratio = padded.memory.items["activations"] / plain.memory.items["activations"]
    # attention's own are of real tokens
    assert 1 + 0.6 * (padding - 1) < ratio < padding
    assert padded.works[0].flops > plain.works[0].flops
    assert padded.works[0].traffic > plain.works[0].traffic


def test_where_all_layers_are_recomputed_none_is_compiled_and_no_row_padded(run: Training):
    changed = Planner(run).changed(
        {"hardware.compile": True, "hardware.activation_checkpointing": True}
    )
    assert changed is not None and changed.compiled_tokens is None


def test_the_page_holds_every_item_and_its_sum(run: Training, capsys: pytest.CaptureFixture[str]):
    planner = Planner(run)
    show_plan(planner)
    page = capsys.readouterr().out
    for word in ("parameters", "dpo ", "weights", "moments", "activations", "total", "tokens/s"):
        assert word in page
    assert "measured on a CPU" in page and "device-hours" in page and "does not fit" not in page
    items = planner.plan().memory.items
    assert f"{sum(items.values()) / 1e9:9.3f}" in page


def test_a_page_that_does_not_fit_names_the_override(
    run: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with_memory(monkeypatch, Planner(run).plan().memory.total - 1)
    show_plan(Planner(run))
    page = capsys.readouterr().out
    assert "DOES NOT FIT" in page and "it would with hardware.micro_batch=2" in page


def test_a_state_larger_than_the_gpu_is_refused_in_one_line(
    run: Training, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "available_memory", lambda *_, **__: 1e6)
    with pytest.raises(
        UserError, match=r"weights, gradients and moments take .* H100 has"
    ) as error:
        training._refuse_hopeless(replace(run, device=H100))
    assert "\n" not in str(error.value)


def test_on_a_cpu_the_same_is_a_warning(
    run: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(training, "available_memory", lambda *_, **__: 1e6)
    training._refuse_hopeless(run)
    assert "weights, gradients and moments take" in capsys.readouterr().out


@pytest.mark.parametrize("name", engine.GPUS)
def test_every_gpu_of_the_table_is_told_by_its_name(name: GpuName):
    assert engine.data_sheet(f"NVIDIA {name}") == engine.GPUS[name]


def test_a_gpu_with_80_gigabytes_is_told_from_its_smaller_sibling():
    large, small = (engine.data_sheet(f"NVIDIA A100-SXM4-{n}GB") for n in (80, 40))
    assert large == engine.GPUS["A100 80GB"] and small == engine.GPUS["A100"]


@pytest.mark.parametrize(
    "name", ["Something", "RTX A1000", "A10G", "H100 PCIe", "H100 NVL", "A100-PCIE-40GB"]
)
def test_another_board_is_no_gpu_of_the_table(name: str):
    assert engine.data_sheet(f"NVIDIA {name}") is None


def test_an_absent_gpu_is_planned_for_by_name_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    hardware = load(composed("hardware=gpu")).hardware
    with pytest.raises(UserError, match=r"hardware\.planned_gpu"):
        engine.resolve(hardware, planning=True)
    with pytest.raises(UserError, match="no CUDA device"):
        engine.resolve(hardware.model_copy(update={"planned_gpu": "H100"}))
    device = engine.resolve(hardware.model_copy(update={"planned_gpu": "H100"}), planning=True)
    assert (device.name, device.type, device.is_here) == ("H100", "cuda", False)


def test_phi35_mini_on_eight_h100_is_planned_without_weights_network_or_gpu(tmp_path: Path):
    """A folder with config and tokenizer is enough."""
    words = ["hardware=h100x8_zero3", "hardware.accelerator=gpu", "check_only=true"]
    model = ["model=phi35_mini", f"model.path={ASSETS / 'phi35_mini'}"]
    places = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    ended = subprocess.run(
        [sys.executable, "train.py", "corpus=medcode", *model, *words, *places],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "3,821,079,552" in ended.stdout and "8 x H100" in ended.stdout
    assert "a run would end with: model.path=" in ended.stdout  # no weights there
    assert not (tmp_path / "runs").exists()


def pretend_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    properties = SimpleNamespace(total_memory=150_000_000_000, major=9, minor=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: properties)


def planned(*overrides: str) -> Device:
    return engine.resolve(load(composed(*overrides)).hardware, planning=True)


@pytest.mark.parametrize("hardware", ["hardware=auto", "hardware=gpu"])
def test_the_gpu_that_is_named_is_planned_for_wherever_that_is(
    hardware: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert planned(hardware, "hardware.planned_gpu=H100").name == "H100"
    pretend_h200(monkeypatch)
    other = planned(hardware, "hardware.planned_gpu=H100")
    assert (other.name, other.memory_bytes, other.is_here) == ("H100", 80e9, False)
    for named in ((), ("hardware.planned_gpu=H200",)):
        assert planned(hardware, *named).is_here


def test_a_gpu_elsewhere_is_not_judged_by_the_packages_here(
    monkeypatch: pytest.MonkeyPatch, run: Training, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("mediphi.attention.available_kernels", lambda _: ["sdpa"])
    asked = ("hardware=gpu", "hardware.planned_gpu=H100")
    flash = planned(*asked, "hardware.attention=flash")
    assert flash.kernel == "flash" and planned(*asked).kernel == "varlen"
    assert planned(*asked, "hardware.precision=32-true").kernel == "sdpa"
    show_plan(Planner(replace(run, device=flash)))
    assert "flash-attn must be installed" in capsys.readouterr().out
    with pytest.raises(UserError, match="share_prompt"):
        engine.resolve(
            load(composed(*asked, "hardware.attention=flash")).hardware,
            shares_prompts=True,
            planning=True,
        )


def test_a_gpu_cannot_be_planned_for_on_the_cpu():
    with pytest.raises(ConfigError, match=r"hardware\.planned_gpu.*accelerator=cpu"):
        load(composed("hardware=cpu", "hardware.planned_gpu=H100"))


def test_a_containers_limit_counts_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mediphi.resources.CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    config = load(composed("hardware=cpu", "hardware.devices=2", "hardware.micro_batch=1"))
    cpu = Device("cpu", "CPU", "32-true", "sdpa")
    assert plan.available_memory(cpu, config=config) == 1_000_000


PAGES = re.findall(
    r"```bash\n(python train\.py [^\n]*check_only=true)\n```\n\n```\n(.*?)```",
    (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


def test_the_docs_show_a_plan_that_fits_and_one_that_does_not():
    assert ["DOES NOT FIT" in page for _, page in PAGES] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "page"), PAGES)
def test_a_plan_in_the_docs_is_what_its_command_prints(command: str, page: str, tmp_path: Path):
    places = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    ended = subprocess.run(
        [sys.executable, *command.split()[1:], *places],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = ended.stdout.splitlines()
    shown = [line for line in page.splitlines() if not line.startswith("disk")]
    assert [line for line in shown if line not in printed] == []


def test_most_recorded_predictions_are_near_what_was_measured():
    """Of configurations that the constants were not fitted to."""
    path = ROOT / "benchmarks" / "results" / "planner_memory.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    memory = [line for line in lines if line["figure"] == "planner memory"]
    near = [x for x in memory if 0.9 <= x["ratio"] <= 1.1 and not x["fitted"]]
    assert len({line["configuration"] for line in near}) >= 6
    for line in memory:
        ratio = line["predicted_mib"] / line["measured_mib"]
        assert line["ratio"] == pytest.approx(ratio, abs=0.001)
        assert sum(line["items_mib"].values()) == pytest.approx(line["predicted_mib"], rel=0.002)

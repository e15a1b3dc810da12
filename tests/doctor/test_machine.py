"""Devices, cores and memory; kernels and process groups, by running them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doctor_cases import ignore_boundaries, only
from transformers import AttentionInterface

from mediphi import resources
from mediphi.doctor import kernels, machine, ranks
from mediphi.engine import Device

MakeCase = Callable


def test_devices_that_are_not_here_fail_and_the_rest_goes_on(make_case: MakeCase) -> None:
    case = make_case("hardware.accelerator=gpu")
    assert "no CUDA device" in only(machine.device, case, "FAIL").found
    assert case.device().type == "cpu"
    assert only(machine.device, make_case(), "ok").found.startswith(f"{os.cpu_count()}-core CPU")


def test_more_threads_than_cores_are_told(make_case: MakeCase) -> None:
    case = make_case("hardware.num_threads=999")
    assert "wait for one another" in only(machine.cores, case, "warning").found


def test_a_container_s_limits_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_case: MakeCase
) -> None:
    free = resources.free_memory()
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    assert resources.num_cores() == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert (resources.num_cores(), resources.free_memory()) == (1, 2_000_000)
    assert free > 2_000_000
    assert "takes about" in only(machine.memory, make_case(), "warning").found


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_model_that_is_split_still_takes_memory(strategy: str, make_case: MakeCase) -> None:
    """As budget.py tells: an eighth of the state in each of eight processes of this machine."""
    split = make_case("hardware.devices=8", f"hardware.strategy={strategy}")
    found = only(machine.memory, split, "ok").found
    told = float(found.rpartition("takes about ")[2].split()[0])
    assert told == round(8 * split.budget().memory_bytes / 1e9, 1) > 0


def test_offloading_on_a_cpu_moves_nothing_out_of_its_memory(make_case: MakeCase) -> None:
    split = ("hardware.devices=2", "hardware.strategy=zero3")
    plain, offloaded = (
        make_case(*split, f"hardware.offload={own}").budget().memory_bytes
        for own in ("false", "true")
    )
    assert offloaded >= plain


def test_what_a_gpu_offloads_is_compared_with_the_machines_memory(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = ("hardware.devices=8", "hardware.strategy=zero3", "hardware.offload=true")
    case = make_case(*eight)
    h100 = Device("cuda", "H100", "bf16-mixed", "varlen", 2048)
    monkeypatch.setattr(case, "device", lambda: h100)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (80e9, 80e9))
    budget = case.budget()
    needed = 4 * budget.num_parameters + 20 * budget.num_trained
    for free, status in ((needed + 1, "ok"), (needed - 1, "warning")):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        _, host = machine.memory(case)
        assert host.status == status and "what is offloaded takes" in host.found


def test_a_jobs_own_group_counts_and_files_kept_in_memory_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/slurm/job_7/step_0\n")
    job = tmp_path / "cgroup" / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "step_0" / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("5000000\n")
    (job / "memory.current").write_text("4000000\n")
    (job / "memory.stat").write_text("anon 1000000\ninactive_file 2000000\n")
    (job / "cpu.max").write_text("100000 100000\n")
    assert (resources.num_cores(), resources.free_memory()) == (1, 3_000_000)


def test_memory_is_enough_for_the_small_model(make_case: MakeCase) -> None:
    assert only(machine.memory, make_case(), "ok")


def test_the_kernel_of_this_machine_is_right(make_case: MakeCase) -> None:
    assert only(kernels.attention_kernels, make_case(), "ok").found.startswith("sdpa (chosen)")


def test_a_kernel_that_ignores_boundaries_is_wrong(make_case: MakeCase) -> None:
    ignore_boundaries()
    assert "sdpa (chosen): wrong" in only(kernels.attention_kernels, make_case(), "FAIL").found


def test_a_kernel_that_does_not_run_is_told_with_its_reason(make_case: MakeCase) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    AttentionInterface.register("mediphi_sdpa", broken)
    text = only(kernels.attention_kernels, make_case(), "FAIL").found
    assert text == "sdpa (chosen): does not run here (RuntimeError: no kernel image)"


def test_two_processes_meet(make_case: MakeCase) -> None:
    assert only(ranks.processes, make_case(), "ok").found.startswith("gloo: 2 processes sum")


def test_an_interface_that_is_not_there_fails_where_processes_are_wanted(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    case = make_case("hardware.devices=2", "hardware.micro_batch=2")
    finding = only(ranks.processes, case, "FAIL")
    assert "gloo: process" in finding.found and "nowhere0" in finding.found
    assert "hostname" in finding.remedy


def test_processes_that_do_not_meet_in_time_are_ended(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, real = [], ranks.start_rank

    def start(*arguments: Any, **pipes: Any) -> Any:
        started.append(real(*arguments, **pipes))
        return started[-1]

    monkeypatch.setattr(ranks, "start_rank", start)
    finding = only(ranks.processes, make_case("stage.wait_seconds=0.2"), "warning")
    assert "did not find one another within 0.2 s" in finding.found
    assert len(started) == 2 and all(process.returncode is not None for process in started)

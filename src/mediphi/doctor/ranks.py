"""Process groups: two processes of this machine meet and sum, as the ranks of a run do."""

import subprocess
import sys
import time
from collections.abc import Iterator

from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.launch import rank_environments, start_rank

COMMAND = [sys.executable, "-m", "mediphi.doctor.all_reduce"]
INTERFACE = {"gloo": "GLOO_SOCKET_IFNAME=lo", "nccl": "NCCL_DEBUG=INFO"}
REMEDIES = {
    "gloo": "does `hostname` resolve (/etc/hosts), may processes connect to 127.0.0.1 (firewall)? "
    "Try again with GLOO_SOCKET_IFNAME=lo",
    "nccl": "NCCL_DEBUG=INFO says where it stops; try NCCL_P2P_DISABLE=1, and in a container "
    "--shm-size=8g or --ipc=host",
}


def processes(case: Case) -> Iterator[Finding]:
    """gloo with two processes; NCCL with a process for each GPU where there are any."""
    import torch

    seconds = case.stage.wait_seconds
    matters = case.config.world_size > 1
    on_gpu = case.device().type == "cuda"
    yield _met("gloo", "cpu", count=2, seconds=seconds, matters=matters and not on_gpu)
    if on_gpu:
        count = min(torch.cuda.device_count(), max(2, case.config.hardware.devices))
        yield _met("nccl", "gpu", count=count, seconds=seconds, matters=matters)


def _met(backend: str, accelerator: str, *, count: int, seconds: float, matters: bool) -> Finding:
    """A failure where this config needs several processes, else a warning."""
    start = time.monotonic()
    fault = _fault([*COMMAND, accelerator], count, seconds)
    took = time.monotonic() - start
    if not fault:
        noun = "process sums" if count == 1 else "processes sum"
        return ok("processes", f"{backend}: {count} {noun} alike ({took:.1f} s)")
    judge = failure if matters else warning
    return judge("processes", f"{backend}: {fault}", remedy=REMEDIES[backend])


def _fault(command: list[str], count: int, seconds: float) -> str:
    """What went wrong between so many processes; none of them is left behind."""
    pipe = subprocess.PIPE
    workers = [start_rank(command, env, output=pipe) for env in rank_environments(count)]
    end = time.monotonic() + seconds
    try:
        for number, worker in enumerate(workers):
            _, errors = worker.communicate(timeout=max(0.1, end - time.monotonic()))
            if worker.returncode:
                last = (errors.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
                return f"process {number} ended with {worker.returncode}: {last[:200]}"
    except subprocess.TimeoutExpired:
        return f"{count} processes did not find one another within {seconds:g} s"
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return ""

"""One process per device: this program starts itself once more for each of them.

Lightning's own launcher re-executes `sys.argv`, which would start a whole sweep once more on every
rank (Lightning issue 11300), and it cannot run two trainings after one another. torchrun ends every
mendable error in a report of its own and exit code 1. So a small parent starts the processes of one
machine, passes signals on, and ends with their exit code; several machines need torchrun.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from mediphi.config.schema import Config, Hardware
from mediphi.errors import MachineError, UserError

SPEAK_AFTER = 6.0
"""Seconds that a rank keeps its error to itself: rank 0 may tell the same and end everything."""
GRACE = 2.0
"""Seconds that rank 0 gets to say its last words when another rank has failed."""
FAREWELL = 60.0
"""Seconds to end by themselves, after a signal or when rank 0 is done."""
DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""


class RunResult(NamedTuple):
    """`metric`: the objective that a sweep shows and optimises, None where there is none."""

    metric: float | None
    run_dir: Path


def rank() -> int:
    """Global rank of this process as torchrun or `Workers` tell it, 0 alone.

    Slurm's own number does not count: its tasks are no process group, each would train by itself.
    """
    return int(os.environ.get("RANK", "0"))


def refuse_several_tasks() -> None:
    """`srun -n 2 python train.py` would be two runs in one run directory.

    The step's tasks are counted: `SLURM_NTASKS` also stands in the one shell of `salloc -n 2`.

    Raises:
        UserError: srun started this as one of several, and no torchrun stands between.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={tasks}: this program is started once; take hardware=slurm_..., "
            "or one task a node that runs python -m mediphi.torchrun ... train.py ..."
        )


def refuse_sweep_in_ranks() -> None:
    """Every rank would run the whole sweep.

    Raises:
        UserError: this is one of several processes, or started by torchrun.
    """
    refuse_several_tasks()
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: a sweep starts the processes of its points by "
            "itself; run it without torchrun, with hardware.devices=..."
        )


def needs_processes(config: Config) -> bool:
    """Whether this process should start others: several devices, one process so far.

    Raises:
        UserError: started by torchrun with another number of processes than the config says, or
            a training on several nodes without torchrun.
    """
    if "WORLD_SIZE" in os.environ:
        if int(os.environ["WORLD_SIZE"]) != config.world_size:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were started, the config has "
                f"hardware.devices x hardware.num_nodes = {config.world_size}: make them equal"
            )
        return False
    if config.check_only:
        return False
    if config.hardware.num_nodes > 1:
        raise UserError(
            f"hardware.num_nodes={config.hardware.num_nodes}: take hardware=slurm_..., or start it "
            f"on every node by torchrun --nnodes {config.hardware.num_nodes} "
            f"--nproc-per-node {config.hardware.devices} train.py ..."
        )
    return config.world_size > 1


def run_in_processes(config: Config) -> NoReturn:
    """Run the same command line once per device, and leave with the exit code of the first failure.

    Raises:
        UserError: fewer GPUs than asked for.
        SystemExit: always else.
    """
    refuse_missing_gpus(config.hardware)
    sys.stdout.flush()
    with Workers(config.hardware.devices) as workers:
        code = workers.wait()
    raise SystemExit(code)


def refuse_missing_gpus(hardware: Hardware) -> None:
    """Ask before any process is started: each would find out after all of its imports.

    Raises:
        UserError: torch sees fewer GPUs than were asked for by `accelerator=gpu`.
    """
    if hardware.accelerator != "gpu":
        return  # a parent on a CPU does without torch
    import torch

    if (count := torch.cuda.device_count()) < hardware.devices:
        raise UserError(
            f"hardware.devices={hardware.devices} and accelerator=gpu: torch sees {count} GPUs; "
            "take as many as there are, or hardware=cpu"
        )


class Workers:
    """The processes of one machine, each in a session of its own.

    So a terminal's Ctrl-C reaches them once, through us. They die with us, however we end.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Workers":
        signals = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._pass_on) for number in signals}
        for environment in rank_environments(self.count):
            self.processes.append(start_rank([sys.executable, *sys.argv], environment))
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait(self) -> int:
        """Exit code of the first process that failed, 0 if none did."""
        first, end = 0, None
        while any(worker.poll() is None for worker in self.processes):
            codes = [worker.poll() for worker in self.processes]
            first = first or next((code for code in codes if code), 0)
            if end is None and (seconds := _seconds_left(codes)) is not None:
                end = time.monotonic() + seconds
            if end is not None and time.monotonic() > end:
                break
            time.sleep(0.05)
        first = first or next((w.returncode for w in self.processes if w.returncode), 0)
        return shell_code(first)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for worker in self.processes:
            worker.send_signal(number)

    def _kill(self) -> None:
        """End what is left, and what it has started."""
        for worker in self.processes:
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def rank_environments(count: int) -> list[dict[str, str]]:
    """What the ranks of one machine find in their environment."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ours |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = ({"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count))
    return [threads | os.environ | ours | mine for mine in ranks]


def start_rank(
    command: list[str], environment: dict[str, str], *, output: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that dies with this one; `output` as of `Popen`."""
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        stdout=output,
        stderr=output,
    )


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Rank 0 speaks for all: another rank tells its error only where rank 0 has none.

    Whoever loses its peers stays silent for a while: the one that ended has told why. torchrun ends
    the others itself, and may start all anew: it is not kept waiting.
    """
    try:
        yield
    except UserError:
        if rank() != 0:
            time.sleep(SPEAK_AFTER)
        raise
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not _lost_peer(error):
            raise
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            time.sleep(FAREWELL)
        raise MachineError("another process of this run ended") from None


def _lost_peer(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("closed by peer", "reset by peer", "Broken pipe"))


def _seconds_left(codes: list[int | None]) -> float | None:
    """How long the others may go on, given exit codes so far; None: as long as they like."""
    if codes[0] is not None:
        return 0.0 if codes[0] else FAREWELL
    ended = [code for code in codes if code]
    if not ended:
        return None
    return FAREWELL if all(code in (130, 143) for code in ended) else GRACE


def shell_code(code: int) -> int:
    """The exit code as a shell has it; a process that was killed could not say so itself."""
    if code >= 0:
        return code
    if code not in (-signal.SIGTERM, -signal.SIGINT):
        name = signal.Signals(-code).name
        print(f"error: a process of this run was ended by {name}", file=sys.stderr, flush=True)
    return 128 - code


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)

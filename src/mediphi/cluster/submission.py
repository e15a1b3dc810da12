"""From a config to a job in the queue."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mediphi.artifacts import locked, refuse_taken, write_atomic
from mediphi.cluster.batch import Job, batch_text
from mediphi.cluster.queue import Queue, answer
from mediphi.config import Config, config_hash, run_dir, run_name
from mediphi.config.slurm import Slurm
from mediphi.errors import ArtifactError, UserError

CARRIED = (
    "MEDIPHI_ROOT",
    "MEDIPHI_RUNS",
    "MEDIPHI_CACHE",
    "PYTHONPATH",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
)
"""Variables that the file repeats, so that it also runs when it is submitted elsewhere."""


def wanted(config: Config) -> Slurm | None:
    """What to ask Slurm for; None where nothing is to be submitted: in a job, or under torchrun."""
    trains_here = own_job() is not None or "WORLD_SIZE" in os.environ
    return None if trains_here else config.hardware.slurm


def own_job() -> str | None:
    """The number of the job that this is part of, the same whenever it comes back; None outside.

    Both variables are compared: those of a job reach whatever is submitted from within it.
    """
    job = os.environ.get("SLURM_JOB_ID")
    return job if job == os.environ.get("MEDIPHI_JOB") else None


def job_of(config: Config, slurm: Slurm, arguments: Sequence[str]) -> Job:
    """The job that runs `arguments` (program first) on the hardware of `config`."""
    hardware, here = config.hardware, Path.cwd()
    return Job(
        name=f"{config.stage.kind}-{run_name(config)}",
        arguments=tuple(arguments),
        slurm=slurm,
        directory=here,
        num_nodes=hardware.num_nodes,
        devices=hardware.devices,
        needs_gpus=hardware.accelerator == "gpu",
        python=slurm.python or ("python" if slurm.container else shlex.quote(sys.executable)),
        environment={name: os.environ[name] for name in CARRIED if name in os.environ},
        folders=(
            Path(arguments[0]).parent,
            Path(config.paths.runs).absolute(),
            Path(config.paths.cache).absolute(),
        ),
    )


def submit(config: Config, slurm: Slurm, arguments: Sequence[str]) -> None:
    """Write the job's file, submit it, and print how to follow it; `check_only` prints it.

    Raises:
        UserError: Slurm is not on this machine, or refuses the job.
        ArtifactError: a job of this run is in the queue, or would refuse the run directory.
        MachineError: Slurm does not answer.
    """
    job = job_of(config, slurm, [a for a in arguments if not a.startswith("check_only=")])
    folder = slurm_folder(config)
    if config.check_only:
        print(batch_text(job, log=_log(folder, job)), end="")
        return
    refuse_taken(run_dir(config), config_hash=config_hash(config), on_existing=config.on_existing)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if shutil.which("sbatch") is None:
            raise UserError(
                f"sbatch is not on this machine: submit {write_batch_file(job, folder)} where it "
                "is and sees the same folders, or choose another hardware="
            )
        record = folder / f"{job.name}.job"
        if known := Queue().holds(record):
            raise ArtifactError(
                f"{run_dir(config)}: job {known} is in the queue; wait, or end it: scancel {known}"
            )
        file = write_batch_file(job, folder)
        number = answer(["sbatch", "--parsable", str(file)]).split(";")[0].strip()
        write_atomic(record, f"{number}\n")
    log = _log(folder, job).replace("%j", number).replace("%%", "%")
    print(
        f"job     {number}  ({job.num_nodes} x {job.devices} devices, {file})\n"
        f"run     {run_dir(config)}\n"
        f"follow  tail -F {shlex.quote(log)}\n"
        f"state   squeue --jobs={number}; to end it: scancel {number}"
    )


def slurm_folder(config: Config) -> Path:
    """Where the files of jobs lie."""
    return Path(config.paths.runs).absolute() / "slurm"


def write_batch_file(job: Job, folder: Path) -> Path:
    """The file of a job, in `folder`, under the job's name."""
    file = folder / f"{job.name}.sbatch"
    write_atomic(file, batch_text(job, log=_log(folder, job)))
    return file


def _log(folder: Path, job: Job) -> str:
    """Slurm's pattern of the log's path: one file for all lives of a job."""
    return f"{str(folder).replace('%', '%%')}/{job.name}.%j.log"

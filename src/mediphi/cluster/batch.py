"""The file that Slurm runs: a function of the job, and also a plain script.

One task a node starts torchrun, which starts a process per device. When the time is up, or the job
is preempted, Slurm signals the tasks and not this script. So a task tells torchrun, which ends with
143 once the state is saved, and the script puts the job back into the queue.

srun ends with the highest code of its tasks, and where one fails it, or the cluster, may end the
others by SIGTERM: then 143 is no order to stop. So the first task that does not end well writes its
code beside the log, and that is the job's.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mediphi.config.slurm import Slurm

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Below the ports that Linux hands out by itself."""
STRAGGLERS = 600
"""Seconds that the other nodes may go on after the first has ended."""

TO_REQUEUE = 15
"""Seconds before the time limit by which the script must have its say."""


@dataclass(frozen=True, slots=True)
class Job:
    """What runs on the nodes.

    Attributes:
        name: of the job and of its files.
        arguments: the program and its overrides.
        slurm: what to ask for.
        directory: where the program starts; relative paths among the arguments count from here.
        num_nodes: machines.
        devices: processes of each.
        needs_gpus: whether a device is a GPU.
        python: the nodes' interpreter.
        environment: variables to set; the submission's own reach the job too.
        folders: what a container must see.
    """

    name: str
    arguments: tuple[str, ...]
    slurm: Slurm
    directory: Path
    num_nodes: int = 1
    devices: int = 1
    needs_gpus: bool = True
    python: str = "python"
    environment: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()


def batch_options(job: Job) -> dict[str, str]:
    """Options of sbatch by name; an empty value is a switch."""
    slurm = job.slurm
    minutes = math.ceil(slurm.hours * 60)
    options = {
        "job-name": job.name,
        "chdir": str(job.directory),
        "nodes": str(job.num_nodes),
        "ntasks-per-node": "1",
        "time": f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        "signal": f"USR1@{slurm.signal_seconds}",
        "requeue": "",
        "open-mode": "append",
    }
    if job.needs_gpus:
        options["gres"] = ":".join(filter(None, ("gpu", slurm.gpu_type, str(job.devices))))
    if slurm.cpus_per_task is not None:
        options["cpus-per-task"] = str(slurm.cpus_per_task)
    if slurm.mem_gb is not None:
        options["mem"] = f"{slurm.mem_gb}G" if slurm.mem_gb else "0"
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(slurm, name)) is not None:
            options[name] = value
    for option in slurm.options:
        name, _, value = option.removeprefix("--").partition("=")
        options[name] = value
    return options


def batch_text(job: Job, *, log: str) -> str:
    """The whole file.

    Args:
        log: where the job writes; `%j` stands for its number.
    """
    asked = {**batch_options(job), "output": log}
    exports = {
        "PYTHONUNBUFFERED": "1",
        # Else torchrun kills after 30 seconds what is still saving.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.slurm.signal_seconds - TO_REQUEUE),
        **job.environment,
    }
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{k}" + (f"={shlex.quote(v)}" if v else "") for k, v in asked.items()),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{_threads(job)}}}"',
        'export MEDIPHI_JOB="$SLURM_JOB_ID"  # in here the program trains instead of submitting',
        f"export MEDIPHI_ENDED={_ended(log)}",
        *job.slurm.setup,
        "",
        _on_node(job),
        _main(job),
    ]
    return "\n".join(lines)


def _threads(job: Job) -> str:
    """CPU threads of a process; torchrun would say one."""
    if (cores := job.slurm.cpus_per_task) is not None:
        return str(max(1, cores // job.devices))
    count = f"SLURM_CPUS_ON_NODE / {job.devices}"
    return f"$(({count} > 0 ? {count} : 1))"


def _ended(log: str) -> str:
    """A word for bash: the file of a life's first bad exit code, beside the log."""
    quoted = re.sub(r'([\\"$`])', r"\\\1", log.removesuffix(".log"))
    places = (part.replace("%j", "$SLURM_JOB_ID") for part in quoted.split("%%"))
    return f'"{"%".join(places)}.${{SLURM_RESTART_COUNT:-0}}.ended"'


def _on_node(job: Job) -> str:
    return f"""\
# Slurm may say more than once that the time is up; torchrun must hear it once.
on_node() {{
  local head torchrun code
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  (
    trap '' USR1
    exec {_torchrun(job)}
  ) &
  torchrun=$!
  trap 'trap "" USR1 TERM; kill -TERM "$torchrun"' USR1 TERM
  while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
  wait "$torchrun"
  code=$?
  # The first node's word counts: others are ended because of it. An existing file is not written.
  [ "$code" -eq 0 ] || (set -o noclobber; echo "$code" >"$MEDIPHI_ENDED") 2>/dev/null
  return "$code"
}}
"""


def _main(job: Job) -> str:
    cores, most = job.slurm.cpus_per_task, job.slurm.max_requeues
    step = [f"--nodes={job.num_nodes}", "--ntasks-per-node=1", f"--wait={STRAGGLERS}"]
    # Since Slurm 22.05 a step no longer takes its cores over from the job.
    step += [f"--cpus-per-task={cores}"] if cores else []
    return f"""\
rm -f "$MEDIPHI_ENDED"
srun --export=ALL {" ".join(step)} \\
  bash -c "$(declare -f on_node); on_node"
code=$?
[ "$code" -eq 0 ] || [ ! -s "$MEDIPHI_ENDED" ] || read -r code <"$MEDIPHI_ENDED"
rm -f "$MEDIPHI_ENDED"
# An array's number stands for all of its jobs.
job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
# 143: told to stop. A job that was cancelled is COMPLETING by now, and must not come back.
if [ "$code" -eq 143 ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" != COMPLETING ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
    echo "job $job goes back into the queue, and on from its last checkpoint"
    scontrol requeue "$job"
  else
    echo "job $job came back {most} times (hardware.slurm.max_requeues): submit it again to go on"
  fi
fi
exit "$code"
"""


def _torchrun(job: Job) -> str:
    """The command of a node, which reads `$head` and Slurm's variables."""
    words = [
        f"{_python(job)} -m mediphi.torchrun",
        f"--nnodes={job.num_nodes} --nproc-per-node={job.devices} --rdzv-backend=c10d",
        '--rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        f'--rdzv-endpoint="$head:$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))"',
        # Else torchrun guesses from host names which node is the first.
        '--rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$SLURMD_NODENAME"',
        *map(shlex.quote, job.arguments),
    ]
    return " \\\n      ".join(words)


def _python(job: Job) -> str:
    if (image := job.slurm.container) is None:
        return job.python
    folders = dict.fromkeys(map(str, (job.directory, *job.folders)))
    gpus = ["--nv"] if job.needs_gpus else []
    places = ["--bind", ",".join(folders), "--pwd", str(job.directory)]
    return f"{shlex.join(['apptainer', 'exec', *gpus, *places, image])} {job.python}"

"""Slurm's commands on one machine: sbatch keeps a job, `life` runs its script as slurmd would.

Each command is this file under another name. The folder `$FAKE_SLURM` holds a folder a job with its
script and state, `tasks` with the process ids of the running step, and `calls`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path) -> dict[str, str]:
    """Environment in which the commands are found; their state is in `folder`."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("sbatch", "squeue", "scontrol", "srun"):
        text = f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", __file__, name])} "$@"\n'
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def life(
    folder: Path, job: str, *, restarts: int = 0, index: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a kept job once more; what it prints goes to `life.log` in its folder."""
    script = folder / job / "script"
    env = json.loads((folder / job / "environment").read_text()) | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_ON_NODE": "1",
        **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
    }
    if index is not None:
        env |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(index)}
        env["SLURM_JOB_ID"] = str(int(job) + index)
    with (folder / job / "life.log").open("ab") as log:
        return subprocess.Popen(
            ["bash", str(script)], cwd=options(script)["chdir"], env=env, stdout=log, stderr=log
        )


def options(script: Path) -> dict[str, str]:
    """The `#SBATCH` lines by name."""
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --")]
    words = [shlex.split(line.removeprefix("#SBATCH --"))[0].partition("=") for line in lines]
    return {name: value for name, _, value in words}


def keep(folder: Path, job: str, script: str, *, state: str = "RUNNING") -> None:
    """Take a job in, with the environment that it was submitted from."""
    (folder / job).mkdir()
    (folder / job / "script").write_text(script)
    (folder / job / "state").write_text(state)
    (folder / job / "environment").write_text(json.dumps(dict(os.environ)))


def sbatch(arguments: list[str]) -> int:
    """Keep the script, as Slurm does, under the next number."""
    script = Path(arguments[-1])
    if options(script).get("partition") == "none":
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        return 1
    number = len(list(STATE.glob("*/script"))) + 41
    keep(STATE, str(number), script.read_text())
    print(f"{number};toy" if "--parsable" in arguments else f"Submitted batch job {number}")
    return 0


def squeue(arguments: list[str]) -> int:
    """The state of one job, or the numbers of all that are there."""
    (job,) = [a.partition("=")[2] for a in arguments if a.startswith("--jobs=")] or [None]
    if job is not None:
        print((STATE / job.partition("_")[0] / "state").read_text())
        return 0
    for script in sorted(STATE.glob("*/script")):
        if (script.parent / "state").read_text() in ("RUNNING", "PENDING"):
            last = options(script).get("array", "").partition("-")[2].partition("%")[0]
            name = script.parent.name
            print(*([f"{name}_{i}" for i in range(int(last) + 1)] if last else [name]), sep="\n")
    return 0


def scontrol(arguments: list[str]) -> int:
    """`show hostnames` and `requeue`."""
    if arguments[0] == "show":
        print(arguments[2])
    return 0


def srun(arguments: list[str]) -> int:
    """A task a node, all of them here; `$FAKE_SLURM_KILLS`: as Slurm's `KillOnBadExit=1`."""
    words = [a for a in arguments if a.startswith("--")]
    (nodes,) = [int(a.partition("=")[2]) for a in words if a.startswith("--nodes=")]
    command = arguments[len(words) :]
    step = {"SLURMD_NODENAME": "localhost"}
    step |= dict.fromkeys(("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), str(nodes))
    places = [{"SLURM_NODEID": str(i), "SLURM_PROCID": str(i)} for i in range(nodes)]
    tasks = [subprocess.Popen(command, env=os.environ | step | place) for place in places]
    (STATE / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    if "FAKE_SLURM_KILLS" in os.environ:
        while all(task.poll() in (None, 0) for task in tasks):
            time.sleep(0.01)
        for task in tasks:
            task.terminate()  # nothing where it has ended
    return max(code if (code := task.wait()) >= 0 else 128 - code for task in tasks)


def tell(folder: Path, *numbers: signal.Signals) -> None:
    """Signal the tasks of the running step, as slurmd does; the script hears nothing."""
    for number in numbers:
        for task in (folder / "tasks").read_text().split():
            os.kill(int(task), number)


if __name__ == "__main__":
    with (STATE / "calls").open("a") as calls:
        print(*sys.argv[1:], file=calls)
    commands = {"sbatch": sbatch, "squeue": squeue, "scontrol": scontrol, "srun": srun}
    raise SystemExit(commands[sys.argv[1]](sys.argv[2:]))

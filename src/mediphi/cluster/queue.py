"""Which jobs of this user Slurm still holds."""

import subprocess
from pathlib import Path

from mediphi.errors import MachineError, UserError


class Queue:
    """The jobs that wait or run, as `squeue` says once.

    Every run has a file that keeps the number of its last job.

    Raises:
        MachineError: Slurm does not answer.
    """

    def __init__(self) -> None:
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        self._jobs = set(answer(command, MachineError).split())

    def holds(self, record: Path) -> str | None:
        """The job that `record` names, if it is still there."""
        known = record.read_text("utf-8").strip() if record.is_file() else ""
        return known if known in self._jobs else None


def answer(command: list[str], error: type[UserError] = UserError) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: or the `error` given, in Slurm's words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise error(f"{command[0]} is not on this machine") from None
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix(f"{command[0]}: ")
        raise error(f"{command[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout

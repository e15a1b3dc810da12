"""What a job asks of a Slurm cluster."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mediphi.config.strict import BrokenRule, Strict

Word = Annotated[str, Field(pattern=r"^\S+$")]
Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]


class Slurm(Strict):
    """Jobs of a Slurm cluster: one task a node, in which torchrun starts a process per device.

    Nodes and GPUs are those of `hardware.num_nodes` and `hardware.devices`.
    """

    partition: Word | None = None
    """null, here and below: the cluster's default."""
    account: Word | None = None
    """Whom to charge."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have."""
    gpu_type: Word | None = None
    """Which GPUs, by Slurm's name for them; null: any."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores of a node."""
    mem_gb: NonNegativeInt | None = None
    """Memory of a node; 0: all that it has."""
    hours: PositiveFloat = 24.0
    """Time limit; training that needs longer saves, and the job goes back to the queue."""
    signal_seconds: Annotated[int, Field(ge=30, le=65535)] = 300
    """Training is told to save so long before the limit; the longest step and a save must fit."""
    max_requeues: NonNegativeInt = 20
    """Times that a job goes back to the queue at most."""
    max_jobs: PositiveInt = 8
    """Jobs of a sweep that run at the same time."""
    setup: tuple[Line, ...] = ()
    """Shell lines before the start, such as `module load cuda`."""
    container: Line | None = None
    """Apptainer image (.sif) that everything runs in; null: none."""
    python: Line | None = None
    """Python of the nodes; null: that of the submission, in a container its own."""
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z][\w-]*(=[^\r\n]+)?$")], ...] = ()
    """More options of sbatch, such as `--exclusive`."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.signal_seconds >= self.hours * 3600:
            yield BrokenRule("signal_seconds", f"must be below hours={self.hours:g}")

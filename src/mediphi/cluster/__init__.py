"""Jobs of a Slurm cluster: their file, their submission, and whether they are still there."""

from mediphi.cluster.batch import Job, batch_options, batch_text
from mediphi.cluster.queue import Queue
from mediphi.cluster.submission import (
    job_of,
    own_job,
    slurm_folder,
    submit,
    wanted,
    write_batch_file,
)

__all__ = [
    "Job",
    "Queue",
    "batch_options",
    "batch_text",
    "job_of",
    "own_job",
    "slurm_folder",
    "submit",
    "wanted",
    "write_batch_file",
]

"""A sweep whose points are jobs of a Slurm cluster, submitted by submitit as one job array.

Every point has the same file as a single run and runs it as a script, so that saving and requeueing
is that of a single run. submitit makes the array. Nothing waits here: the same command given again
says what is done, queues what failed, and leaves alone what is in the queue.
"""

import subprocess
from pathlib import Path

from mediphi.artifacts import locked, write_atomic
from mediphi.cluster import Job, Queue, batch_options, job_of, slurm_folder, write_batch_file
from mediphi.config.slurm import Slurm
from mediphi.errors import UserError
from mediphi.sweep.plan import Plan, Point
from mediphi.sweep.runner import is_done, row, this_program
from mediphi.sweep.table import Row, show, write


def submit_sweep(sweep: Plan, slurm: Slurm) -> list[Row]:
    """Submit what is neither finished nor in the queue; print and write the table.

    Args:
        slurm: of all points; they cannot differ in their hardware and be different runs.

    Raises:
        UserError: submitit is missing, or Slurm refuses.
        ArtifactError: the same sweep is being submitted already.
        MachineError: Slurm does not answer.
    """
    folder = slurm_folder(sweep.points[0].config)
    for place in (sweep.folder, folder):
        place.mkdir(parents=True, exist_ok=True)
    with locked(sweep.folder), locked(folder):
        queue, rows, left = Queue(), list[Row](), list[tuple[Point, Job]]()
        for point in sweep.points:
            job = job_of(point.config, slurm, this_program(point, sweep.name)[1:])
            done = is_done(point)
            if not done and not queue.holds(folder / f"{job.name}.job"):
                left.append((point, job))
            rows.append(row(point, "skipped" if done else "queued"))
        if left:
            files = [write_batch_file(job, folder) for _, job in left]
            numbers = _submit_array(left[0][1], files, folder / sweep.name)
            for (point, _), file, number in zip(left, files, numbers, strict=True):
                write_atomic(file.with_suffix(".job"), f"{number}\n")
                print(f"{number}  {point.label}", flush=True)
            print(f"logs    {folder / sweep.name}", flush=True)
        write(rows, sweep.folder)
    show(rows)
    return rows


def run_script(file: Path) -> None:
    """What submitit runs in the job; it would print a traceback for any other exception.

    Raises:
        SystemExit: with the script's exit code, unless that is 0.
    """
    if code := subprocess.call(["bash", str(file)]):
        raise SystemExit(code)


def _submit_array(job: Job, files: list[Path], folder: Path) -> list[str]:
    """Numbers of the jobs; `job` says what each of them asks for."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise UserError(
            "a sweep on Slurm needs submitit: pip install -e '.[slurm]', or submit its points one "
            "by one"
        ) from None
    asked = {k.replace("-", "_"): v or True for k, v in batch_options(job).items()}
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=job.slurm.max_requeues)
        executor.update_parameters(
            nodes=job.num_nodes,
            # The script starts its steps itself: a step of submitit's would hold their places.
            use_srun=False,
            stderr_to_stdout=True,
            array_parallelism=job.slurm.max_jobs,
            wckey=None,
            additional_parameters=asked | {"job_name": folder.name},
        )
        with executor.batch():
            jobs = [executor.submit(run_script, file) for file in files]
    except (RuntimeError, FailedJobError) as error:
        raise UserError(f"submitit: {' '.join(str(error).split())}") from None
    return [str(one.job_id) for one in jobs]

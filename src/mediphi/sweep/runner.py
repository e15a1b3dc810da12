"""Run the points of a sweep, each in a process of its own, and end with a table.

One process cannot train twice: a second process group fails, and launchers re-execute `sys.argv`.
A finished point is skipped and a failed one runs again when the same command is given again,
because a run directory is a function of its config.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mediphi.artifacts import (
    check_data,
    locked,
    named_parents,
    plain_folder,
    read_config_hash,
    verify,
)
from mediphi.config import config_hash
from mediphi.data.fingerprint import fingerprint
from mediphi.errors import ArtifactError, DataError, Interrupted
from mediphi.sweep.plan import Plan, Point
from mediphi.sweep.table import Row, heldout_loss, objective, show, write

Command = Callable[[Point, str], list[str]]
_hashing = threading.Lock()


class Stop:
    """Passes signals on to the running jobs and keeps new ones from starting."""

    def __init__(self, *, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment
        self.signal_number: int | None = None
        self._children: set[subprocess.Popen[bytes]] = set()

    def run(self, command: list[str], log: Path) -> int | None:
        """Exit code of `command`, or None when a signal came before it could start."""
        with log.open("wb") as output:
            if self.signal_number is not None:
                return None
            # Its own session: a terminal's Ctrl-C reaches it once, through us.
            child = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
            )
            self._children.add(child)
            try:
                if self.signal_number is not None:  # it came between the check and the start
                    child.send_signal(self.signal_number)
                return child.wait()
            finally:
                self._children.discard(child)

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_number = signal_number
        for child in list(self._children):
            child.send_signal(signal_number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_sweep(sweep: Plan, *, num_jobs: int = 1, command: Command | None = None) -> list[Row]:
    """Run what is not finished, at most `num_jobs` at a time; print and write the table.

    Args:
        command: how to start one point; by default this program with the point's overrides.

    Raises:
        ArtifactError: the same sweep runs already.
        SystemExit: 1 when a job failed.
        Interrupted: a signal came; running jobs have saved and ended.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    stop = Stop(environment=_environment(num_jobs))
    start = command or this_program
    total = len(sweep.points)

    def job(item: tuple[int, Point]) -> Row:
        index, point = item
        begun = time.monotonic()
        outcome = _run_point(point, sweep, index, start=start, stop=stop)
        spent = f"{time.monotonic() - begun:.0f} s" if outcome.status != "skipped" else ""
        print(f"[{index + 1}/{total}] {outcome.status} {point.label} {spent}", flush=True)
        return outcome

    print(f"sweep {sweep.name}: {total} points, logs in {sweep.folder}", flush=True)
    with locked(sweep.folder), stop.listening():
        with ThreadPoolExecutor(max(1, num_jobs)) as pool:
            rows = list(pool.map(job, enumerate(sweep.points)))
        write(rows, sweep.folder)
    show(rows)
    if stop.signal_number is not None:
        raise Interrupted(128 + stop.signal_number)
    if any(row.status == "failed" for row in rows):
        raise SystemExit(1)
    return rows


def _run_point(point: Point, sweep: Plan, index: int, *, start: Command, stop: Stop) -> Row:
    if is_done(point):
        return row(point, "skipped")
    log = sweep.folder / f"{index:03d}.log"
    code = stop.run(start(point, sweep.name), log)
    if code is None or stop.signal_number is not None:
        return row(point, "stopped")
    if code:
        return row(point, "failed", f"exit {code}: {_last_line(log)}")
    if point.config.check_only:  # its page is in the log, and there is no run directory
        return Row(point.label, "checked", "", None, str(log), "")
    if not _finished(point):
        return row(point, "failed", "ended without a manifest")
    return row(point, "done")


def is_done(point: Point) -> bool:
    """Whether a job of this point would only announce what is there."""
    return point.config.on_existing == "resume" and _finished(point) and _same_inputs(point)


def row(point: Point, status: str, error: str = "") -> Row:
    """The point's line of the table."""
    folder = point.run_dir
    if status not in ("done", "skipped"):
        return Row(point.label, status, "", None, str(folder), error)
    return Row(point.label, status, *objective(folder), str(folder), error, heldout_loss(folder))


def _finished(point: Point) -> bool:
    """Whether a whole artifact of this very config is there."""
    try:
        verify(point.run_dir)
        return read_config_hash(point.run_dir) == config_hash(point.config)
    except (ArtifactError, OSError):
        return False


def _same_inputs(point: Point) -> bool:
    """Whether data and parent are those of the finished run; if not, its job says so and fails."""
    config = point.config
    try:
        with _hashing:  # one writer of the cache of file hashes
            content = fingerprint(config.corpus, cache=Path(config.paths.cache))
    except DataError:  # they are gone: the artifact still stands
        content = None
    parents = plain = None
    if config.model.is_pretrained:
        parents, plain = named_parents(config.model.folder), plain_folder(config.model.folder)
    try:
        check_data(point.run_dir, content, parents=parents, folder=plain)
    except ArtifactError:
        return False
    return True


def _environment(num_jobs: int) -> dict[str, str]:
    """Jobs side by side share the cores; each would take all of them."""
    cores = os.cpu_count() or 1
    shared = {"OMP_NUM_THREADS": str(max(1, cores // num_jobs))} if num_jobs > 1 else {}
    return shared | os.environ


def this_program(point: Point, group: str) -> list[str]:
    """The same program and config files, one point, all jobs in one W&B group."""
    grouped = [] if point.config.logger.group else [f"++logger.group={group}"]
    program = str(Path(sys.argv[0]).resolve())
    run = ["hydra.mode=RUN", *grouped]
    return [sys.executable, program, *_config_flags(sys.argv[1:]), *point.overrides, *run]


def _config_flags(arguments: Sequence[str]) -> list[str]:
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_args(list(arguments))
    flags = {
        "--config-dir": args.config_dir,
        "--config-name": args.config_name,
        "--config-path": args.config_path,
    }
    return [word for flag, value in flags.items() if value for word in (flag, value)]


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "no output"

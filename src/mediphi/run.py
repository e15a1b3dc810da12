"""The switch: hold the run directory, say that it is done, or run the stage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mediphi import cluster, launch
from mediphi.announcement import announce
from mediphi.artifacts import check_data, is_run_of, named_parents, open_run, plain_folder
from mediphi.config import config_hash, dump, run_dir
from mediphi.config.schema import Config
from mediphi.config.stages import TRAINING_KINDS, DoctorStage
from mediphi.data.fingerprint import fingerprint
from mediphi.errors import DataError, UserError
from mediphi.interruption import interruptible
from mediphi.launch import RunResult


def run(config: Config) -> RunResult:
    """Run one stage, here or as a job of Slurm; a finished run is only announced.

    Several devices get a process each.

    Raises:
        UserError: whatever the user can mend, in one line.
        Interrupted: a signal came.
    """
    launch.refuse_several_tasks()
    trains = config.stage.kind in TRAINING_KINDS
    if isinstance(config.stage, DoctorStage):
        return _doctor(config)
    job = cluster.own_job()
    came_back = job is not None and is_run_of(run_dir(config), job)
    on_existing = "resume" if came_back else config.on_existing
    looks_finished = on_existing == "resume" and (run_dir(config) / "manifest.json").is_file()
    if not looks_finished:
        if (slurm := cluster.wanted(config)) is not None:
            cluster.submit(config, slurm, [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]])
            if not config.check_only:  # the plan comes below the file
                return RunResult(None, run_dir(config))
        if trains and launch.needs_processes(config):
            launch.run_in_processes(config)
    with launch.one_voice(), interruptible(), ExitStack() as stack:
        if not config.check_only:
            if launch.rank() == 0:
                held = open_run(
                    run_dir(config),
                    config_yaml=dump(config),
                    config_hash=config_hash(config),
                    on_existing=on_existing,
                    job=job,
                )
                if stack.enter_context(held).outcome == "finished":
                    _refuse_changed_inputs(config)
                    return announce(run_dir(config))
            elif looks_finished:  # rank 0 announces it
                return RunResult(None, run_dir(config))
        # Everything heavy comes in here; a finished run needs none of it.
        with _collector_asleep():
            match config.stage.kind:
                case "merge":
                    from mediphi.merging import merge_models as go
                case "search":
                    from mediphi.searching import search_merge as go
                case _:
                    from mediphi.training import train as go
        return go(config)


@contextmanager
def _collector_asleep() -> Iterator[None]:
    """For imports: what they bring stays, and is not looked through again, not even at the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _doctor(config: Config) -> RunResult:
    """In one process, whatever the devices; nothing it writes is read by another stage."""
    from mediphi.doctor import check_up

    with interruptible():
        return check_up(config)


def _refuse_changed_inputs(config: Config) -> None:
    """A finished run answers for what it saw. Where data or parent are gone, it still stands."""
    if config.merge is not None:
        _refuse_changed_sources(config)
        return
    try:
        content = fingerprint(config.corpus, cache=Path(config.paths.cache))
    except DataError:
        content = None
    parents = plain = None
    if config.model.is_pretrained:
        parents, plain = named_parents(config.model.folder), plain_folder(config.model.folder)
    check_data(run_dir(config), content, parents=parents, folder=plain)


def _refuse_changed_sources(config: Config) -> None:
    from mediphi.sources import inputs_of, told_sources

    assert config.merge is not None
    try:
        inputs = inputs_of(config.merge, told_sources(config.merge))
        asked = _questions(config)
    except UserError:
        return
    check_data(run_dir(config), asked, parents=inputs)


def _questions(config: Config) -> str | None:
    """The fingerprint of a search's questions; None where it takes a corpus to make them."""
    if config.validation is None or config.validation.reads_documents:
        return None
    from mediphi.data.validation_sets import build_sets, fingerprint_of

    return fingerprint_of(build_sets(config.validation, seed=config.seed))

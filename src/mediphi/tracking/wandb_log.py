"""Weights & Biases: offline without an account, silent, without secrets, never in the way."""

import netrc
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mediphi.config.schema import Logger as LoggerConfig
from mediphi.tracking.names import SPLITS
from mediphi.tracking.redaction import redact

ID_FILE = "wandb_id"
INIT_SECONDS = 30.0
NETRC_HOSTS = ("api.wandb.ai",)
"""Where keys were filed before W&B's default server moved; it still reads them."""


class RunWandbLogger(WandbLogger):
    """One W&B run per job, over all its phases; continued, not doubled, on resume.

    Whatever W&B cannot do (no network, full disk, refused key) becomes one warning and the training
    goes on without it: `metrics.csv` has every number.

    Args:
        config: project, entity, group, tags.
        run_dir: holds `wandb/` and the run's id.
        run_name: shown on the dashboard.
        config_dict: the resolved config; secrets are blanked before it is passed on.
    """

    def __init__(
        self, config: LoggerConfig, *, run_dir: Path, run_name: str, config_dict: Mapping[str, Any]
    ) -> None:
        self._first_step = 0
        self._broken = False
        super().__init__(
            name=run_name,
            save_dir=run_dir,
            version=_run_id(run_dir),
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags),
            job_type=str(config_dict.get("stage", {}).get("kind", "train")),
            config=redact(dict(config_dict)),
            mode=wandb_mode(),
            settings=_settings(),
        )
        del self._wandb_init["anonymous"]  # W&B warns of it even where it is None

    def begin_phase(self, phase: str, *, first_step: int, resumed_step: int | None) -> None:
        """Steps from now on count from `first_step`; the axis runs over all phases."""
        self._first_step = first_step

    @property
    def experiment(self) -> Any:
        """The W&B run, begun at first use; None after a failure and on other ranks."""
        if self._experiment is None and rank_zero_only.rank == 0:
            self._guarded(self._start)
        return self._experiment

    def _start(self) -> None:
        import wandb

        if wandb.run is not None:  # of an earlier job in this process
            wandb.finish()
        with _without_argv():
            self._experiment = _init_or_offline(self._wandb_init)
        for axis in ("step", "tokens_seen"):
            self._experiment.define_metric(axis, hidden=True)
        self._experiment.define_metric("*", step_metric="step")
        for split in SPLITS:
            self._experiment.define_metric(f"{split}/loss", step_metric="step", summary="min,last")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        place, run = self._first_step + (step or 0), self.experiment
        if run is not None:
            self._guarded(lambda: run.log({**metrics, "step": place}, step=place))

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config went in at `init`, redacted; Lightning's own copy would not be."""

    @rank_zero_only
    def finish(self, *, exit_code: int) -> None:
        """End the run, so that the next job of this process begins its own."""
        run, self._experiment = self._experiment, None
        if run is not None:
            self._guarded(lambda: run.finish(exit_code=exit_code))

    def _guarded(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:
            self._broken = True
            _warn("W&B is off, metrics.csv goes on", error)


def _init_or_offline(arguments: dict[str, Any]) -> Any:
    import wandb

    try:
        return wandb.init(**arguments)
    except Exception as error:
        if arguments["mode"] != "online":
            raise
        _warn("W&B cannot be reached, the run is kept offline (wandb sync sends it)", error)
        return wandb.init(**{**arguments, "mode": "offline"})


def _warn(what: str, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    with suppress(OSError):
        print(f"warning: {what}: {redact(reason)}", file=sys.stderr)


def _run_id(run_dir: Path) -> str:
    """Random once per run directory, then the same for ever."""
    path = run_dir / ID_FILE
    with suppress(FileNotFoundError):
        if known := path.read_text("utf-8").strip():
            return known
    new = uuid.uuid4().hex[:16]
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{new}\n", "utf-8")
    return new


def wandb_mode() -> str:
    """`WANDB_MODE` where set, online where logged in, else offline: never a prompt."""
    wanted = {"dryrun": "offline", "run": "online"}.get(m := os.environ.get("WANDB_MODE", ""), m)
    if wanted in ("offline", "disabled"):
        return wanted
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.Settings()
    if settings.api_key:
        return True
    hosts = {urlsplit(settings.base_url).hostname or "", *NETRC_HOSTS}
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).hosts
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False
    return not hosts.isdisjoint(entries)


def _settings() -> Any:
    """No argv, git, code, package list, console or prompt; system metrics stay."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_SECONDS,
        login_timeout=1.0,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


@contextmanager
def _without_argv() -> Iterator[None]:
    """W&B reads `sys.argv` when a run begins; a key typed there would be recorded."""
    kept, sys.argv = sys.argv, sys.argv[:1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.argv = kept

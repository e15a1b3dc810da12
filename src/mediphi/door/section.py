"""The `hydra` section: Hydra acts on it before the schema sees anything, so most of it is fixed.

It would make folders and log files, and a config file's `callbacks` or `job_logging` would run
any code that they name.
"""

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mediphi.errors import ConfigError

NO_LOG = {"version": 1, "root": None, "disable_existing_loggers": False}
FIXED = {
    "run.dir": ".",
    "sweep.dir": ".",
    "output_subdir": None,
    "job.chdir": None,
    "callbacks": {},
    "hydra_logging": NO_LOG,
    "job_logging": NO_LOG,
    "sweeper._target_": "hydra_plugins.mediphi_sweeper.ProcessSweeper",
}
RUN = "hydra.mode=RUN"
HINT = "fixed here; of hydra's settings sweeper.params, sweeper.jobs and mode are yours"


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's composition behind a look at the `hydra` section, wherever that came from.

    Hydra composes twice: first only to read `hydra.mode`, as if for a sweep. Here the first one is
    composed for a run, and kept for the second, which asks for the same and `hydra.mode=RUN`.
    """

    _kept: tuple[str | None, list[str], DictConfig] | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose.

        Raises:
            ConfigError: with a line for every fixed setting that was changed.
        """
        kept, self._kept = self._kept, None
        if kept and kept[:2] == (config_name, overrides[:-1]) and overrides[-1:] == [RUN]:
            kept[2].hydra.mode = RunMode.RUN
            kept[2].hydra.overrides.hydra.append(RUN)
            return kept[2]
        looks_for_mode = run_mode == RunMode.MULTIRUN and not validate_sweep_overrides
        cfg = super().load_configuration(
            config_name,
            overrides,
            run_mode=RunMode.RUN if looks_for_mode else run_mode,
            from_shell=from_shell,
            validate_sweep_overrides=validate_sweep_overrides or looks_for_mode,
        )
        if lines := _changed(cfg):
            raise ConfigError(lines)
        if looks_for_mode:
            self._kept = (config_name, [*overrides], cfg)
        return cfg


def _changed(cfg: DictConfig) -> list[str]:
    raw = OmegaConf.to_container(cfg.hydra, resolve=False)
    found = {key: _at(raw, key) for key in FIXED}
    if found == FIXED:
        return []
    from mediphi.config.report import line  # brings pydantic, which --help does without

    changed = [key for key, value in FIXED.items() if found[key] != value]
    return [line(f"hydra.{key}", found[key], HINT) for key in changed]


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node

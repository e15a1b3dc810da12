"""The `hydra` section: Hydra acts on it before the schema sees anything, so most of it is fixed.

It would make folders and log files, and a config file's `callbacks` or `job_logging` would run
any code that they name.
"""

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
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
HINT = "fixed here; of hydra's settings sweeper.params, sweeper.jobs and mode are yours"


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's composition behind a look at the `hydra` section, wherever that came from."""

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Compose.

        Raises:
            ConfigError: with a line for every fixed setting that was changed.
        """
        cfg = super().load_configuration(*args, **kwargs)
        if lines := _changed(cfg):
            raise ConfigError(lines)
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

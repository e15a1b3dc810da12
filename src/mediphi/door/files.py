"""Reading of YAML files for Hydra: what would hang or surprise later is refused here, by line."""

from pathlib import Path

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from mediphi.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32


def check_file(path: Path) -> None:
    """Refuse a YAML file that is not UTF-8, huge, malformed, too deep or uses aliases.

    A kilobyte of aliases can stand for gigabytes; `${key}` does the same job in the open.

    Raises:
        ConfigError: one line, `file:line: why`.
    """
    shown = _shown(path)
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError([f"{shown}: larger than {MAX_BYTES} bytes, not a config"])
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ConfigError([f"{shown}:{number}: not UTF-8 text"]) from None
    try:
        if why := _refused(text):
            raise ConfigError([f"{shown}:{why}"])
    except yaml.YAMLError as error:
        raise ConfigError([f"{shown}:{yaml_reason(error)}"]) from None


def yaml_reason(error: yaml.YAMLError) -> str:
    """`line: what` of a YAML error, without the excerpt of the file."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
    if what.startswith("but ") and getattr(error, "context", None):
        what = f"{error.context}, {what}"  # type: ignore[attr-defined]
    return f"{mark.line + 1 if mark else 1}: {' '.join(str(what).split())}"


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _refused(text: str) -> str | None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            return f"{event.start_mark.line + 1}: aliases (*name) are not allowed, use ${{key}}"
        if depth > MAX_DEPTH:
            return f"{event.start_mark.line + 1}: nested more than {MAX_DEPTH} levels deep"
    return None


class CheckedFileSource(FileConfigSource):
    """Hydra's reader of config files behind `check_file`."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        check_file(path)
        try:
            return super().load_config(config_path)
        except yaml.YAMLError as error:  # duplicate keys and tags, seen only when building values
            raise ConfigError([f"{_shown(path)}:{yaml_reason(error)}"]) from None


def tame_hydra() -> None:
    """Read configs through `CheckedFileSource`, write no logs and folders, and start faster."""
    from hydra._internal import hydra as main
    from hydra._internal.sources_registry import SourcesRegistry

    from mediphi.door.section import CheckedLoader

    Plugins.instance()  # fills the registry, which keeps whatever came first
    SourcesRegistry.instance().types["file"] = CheckedFileSource
    setattr(main, "ConfigLoaderImpl", CheckedLoader)  # noqa: B010
    # Hydra copies its singleton store with every look at a group: 0.15 of 0.4 CPU-s of --help.
    setattr(ConfigStore, "__deepcopy__", lambda self, memo: self)  # noqa: B010
    store = ConfigStore.instance()
    defaults = store.load("hydra/config.yaml").node  # a copy
    # A refused config leaves nothing behind, and run directories are functions of the config.
    defaults.run.dir = defaults.sweep.dir = "."
    defaults.output_subdir = None
    ours = {"hydra_logging": "none", "job_logging": "none", "sweeper": "processes"}
    for item in defaults.defaults:
        for group in ours.keys() & item.keys():
            item[group] = ours[group]
    store.store(group="hydra", name="config", node=defaults, provider="hydra")

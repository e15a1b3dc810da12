"""The points of a sweep, all judged before one of them runs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from mediphi.config import Config, check, run_dir
from mediphi.config.stages import DoctorStage
from mediphi.door.compose import compose, diagnose
from mediphi.door.enter import forced
from mediphi.errors import ConfigError

DEFAULT_CONFIG = "config"


class Point(NamedTuple):
    """One job: the overrides that make it, those that tell it apart, and its judged config."""

    overrides: tuple[str, ...]
    label: str
    config: Config
    run_dir: Path


class Plan(NamedTuple):
    """A sweep whose points are all valid."""

    name: str
    config_name: str
    points: tuple[Point, ...]

    @property
    def folder(self) -> Path:
        return Path(self.points[0].config.paths.runs) / "sweeps" / self.name


def expand(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The grid over all comma-separated values, in the order of the arguments.

    Raises:
        ConfigError: an argument cannot be read.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([forced(a) for a in arguments])
        batches = BasicSweeper.split_arguments(overrides, None)
    except OverrideParseException as error:
        raise ConfigError([f"{error.override}: cannot be read; write key=value"]) from None
    return [tuple(point) for batch in batches for point in batch]


def plan(loader: ConfigLoader, *, config_name: str, points: Sequence[tuple[str, ...]]) -> Plan:
    """Compose and judge every point.

    Raises:
        ConfigError: the problems of all points, each once, with the points that have it.
    """
    varying = {o for point in points for o in point if not all(o in other for other in points)}
    labels = [" ".join(o.lstrip("+") for o in p if o in varying) or "(one point)" for p in points]
    planned: list[Point] = []
    problems: dict[str, list[str]] = {}
    for overrides, label in zip(points, labels, strict=True):
        config, lines = _judge(loader, config_name, overrides)
        if config is not None and isinstance(config.stage, DoctorStage):
            lines = ["stage=doctor: trains nothing that a sweep could compare; run it without -m"]
        for text in lines:
            problems.setdefault(text, []).append(label)
        if config is not None:
            planned.append(Point(overrides, label, config, run_dir(config)))
    _refuse_shared_directories(planned, problems)
    if problems:
        raise ConfigError([_told(text, at, len(points)) for text, at in problems.items()])
    return Plan(_name(config_name, points), config_name, tuple(planned))


def _judge(
    loader: ConfigLoader, config_name: str, overrides: Sequence[str]
) -> tuple[Config | None, list[str]]:
    run = [*overrides, "hydra.mode=RUN"]
    try:
        cfg = compose(loader, config_name, run)
    except Exception as error:
        return None, diagnose(loader, config_name, run) or [str(error)]
    return check(cfg)


def _refuse_shared_directories(planned: Sequence[Point], problems: dict[str, list[str]]) -> None:
    first: dict[Path, str] = {}
    for point in planned:
        other = first.setdefault(point.run_dir, point.label)
        if other != point.label:
            text = f"{point.run_dir}: two points would share it ({other}); vary what decides the "
            problems.setdefault(text + "result, and leave name= out", []).append(point.label)


def _told(text: str, labels: Sequence[str], total: int) -> str:
    if len(labels) == total:
        return text
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"{text} [point {labels[0]}{more}]"


def _name(config_name: str, points: Sequence[tuple[str, ...]]) -> str:
    if config_name != DEFAULT_CONFIG:
        return config_name
    text = "\n".join(sorted(" ".join(sorted(point)) for point in points))
    return f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

"""What Hydra says about overrides and groups, in our words, and *all* of it.

Hydra stops at the first error. `diagnose` writes it down, mends or drops the override that caused
it, and composes again until the schema can judge the rest.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig

from mediphi.config.keys import keys_of
from mediphi.config.load import check
from mediphi.config.report import line, nearest, nearest_key
from mediphi.config.schema import Config
from mediphi.door.section import CheckedLoader
from mediphi.errors import ConfigError

OWN = {
    "model": "model.path={}",
    "corpus": "corpus=local corpus.sources.mine.path={}",
}
"""How to name a folder or file where a group wants one of its options."""


def make_loader(conf: Path, extra: Path | None = None) -> ConfigLoader:
    """Hydra's loader over `conf` and, after it, the folder that `--config-dir` names."""
    paths = create_config_search_path(str(conf))
    if extra is not None:
        before = SearchPathQuery(provider="schema")
        paths.prepend("command-line", f"file://{extra.resolve()}", before)
    return CheckedLoader(paths)


def compose(loader: ConfigLoader, config_name: str | None, overrides: Sequence[str]) -> DictConfig:
    """The composed config of one run, not yet judged."""
    return loader.load_configuration(config_name, list(overrides), RunMode.RUN)


def diagnose(
    loader: ConfigLoader,
    config_name: str | None,
    overrides: Sequence[str],
    *,
    run_mode: RunMode = RunMode.RUN,
    error: Exception | None = None,
) -> list[str]:
    """Every problem of a config that Hydra cannot compose, one line each.

    `error` is what composing ended with, where the caller has tried.
    """
    left, lines, doubtful = list(overrides), [], []
    found = error or _composed(loader, config_name, left, run_mode)
    while isinstance(found, Exception):
        culprit = _culprit(found, loader, config_name, left, run_mode)
        text, instead = _explain(found, loader, culprit)
        lines.append(text)
        if culprit is None:
            return lines
        at = left.index(culprit)
        left[at : at + 1] = [instead] if instead else []
        doubtful += [] if instead else [_pair(culprit)[0]]
        found = _composed(loader, config_name, left, run_mode)
    if run_mode is RunMode.MULTIRUN:
        return lines
    more = check(found)[1]
    return lines + [text for text in more if not any(text.startswith(f"{k}.") for k in doubtful)]


def _composed(
    loader: ConfigLoader, config_name: str | None, overrides: Sequence[str], run_mode: RunMode
) -> DictConfig | Exception:
    try:
        return loader.load_configuration(config_name, list(overrides), run_mode)
    except Exception as error:
        return error


def _culprit(
    error: Exception,
    loader: ConfigLoader,
    config_name: str | None,
    overrides: Sequence[str],
    run_mode: RunMode,
) -> str | None:
    """The override behind `error`: the one it names, else one that fails alike on its own."""
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file)
        return next((o for o in overrides if "/".join(_pair(o)) == missing), None)
    named = error.override if isinstance(error, OverrideParseException) else None
    if named in overrides:
        return named
    for override in overrides:
        alone = _composed(loader, config_name, [override], run_mode)
        if isinstance(alone, Exception) and str(alone) == str(error):
            return override
    return None


def _explain(error: Exception, loader: ConfigLoader, culprit: str | None) -> tuple[str, str | None]:
    """One line for Hydra's `error`, and what to compose with instead of the culprit."""
    message = str(error) or str(error.__cause__)
    if isinstance(error, ConfigError):
        return error.lines[0], None
    if isinstance(error, MissingConfigException):
        return _missing(error, loader, culprit)
    first = _first(message)
    if culprit is None:
        return first or type(error).__name__, None
    key, value = _pair(culprit)
    if isinstance(error, OverrideParseException):
        return line(key, value or ..., "cannot be read; write key=value, quote special signs"), None
    if message.startswith(("Ambiguous value", "Sweep parameters")):
        return line(key, value, "several values need -m (a sweep), a list needs [brackets]"), None
    if key in loader.list_groups("") and not message.startswith("force-add"):
        return line(key, value or ..., "must be the name of one option of this group"), None
    if message.startswith("Could not override"):
        return line(key, value, "unknown key", nearest_key(key, _known(loader))), None
    if message.startswith("Could not delete"):
        return line(f"~{key}", ..., "nothing to delete", nearest_key(key, _known(loader))), None
    if "Could not append" in message or message.startswith("force-add"):
        return line(key, value, "already there, write it without +"), culprit.lstrip("+")
    if message.startswith("Error merging"):
        first = _first(str(error.__cause__))
    return line(key, value or ..., first), None


def _missing(
    error: MissingConfigException, loader: ConfigLoader, culprit: str | None
) -> tuple[str, str | None]:
    missing = str(error.missing_cfg_file)
    group, option = _pair(culprit) if culprit else missing.rpartition("/")[::2]
    if not group:
        names = [n for n in loader.get_group_options("") if not n.startswith("_")]
        groups = [g for g in loader.list_groups("") if missing in loader.get_group_options(g)]
        near = f"{groups[0]}={missing}" if groups else nearest(missing, names)
        allowed = f"no such config; allowed: {', '.join(names)}"
        return line("--config-name", missing, allowed, near), None
    inner = option.rpartition("/")[0]
    folder = f"{inner}/" if inner in loader.list_groups(group) else ""  # corpus=paper/...
    names = loader.get_group_options(f"{group}/{folder}".rstrip("/"))
    near = nearest(option.removeprefix(folder), names)
    near = near and folder + near
    allowed = f"allowed: {', '.join(folder + name for name in names)}"
    if not near and group in OWN and re.search(r"[/.]", option):
        allowed += f"; your own: {OWN[group].format(option)}"
    return line(group, option, allowed, near), f"{group}={near}" if near and culprit else None


def _first(message: str) -> str:
    """The telling line of Hydra's message, which may put a heading before it."""
    head, _, rest = message.partition("\n")
    if head.endswith("raised while composing config:"):
        head = f"{head.partition(':')[0]}: {rest.partition(chr(10))[0]}"
    return " ".join(head.split())


def _known(loader: ConfigLoader) -> list[str]:
    return [*keys_of(Config, {}).known, *loader.list_groups("")]


def _pair(override: str) -> tuple[str, str]:
    """Key and value."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value

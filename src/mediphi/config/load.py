"""The door's inside: Hydra's `DictConfig` in, a frozen `Config` or one report of all problems out.

After `load` no `DictConfig` exists.
"""

import json
import re
from contextlib import suppress
from typing import Any, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from mediphi.config.keys import keys_of, of_its_kind, sections_in
from mediphi.config.report import broken, dotted, line, render_all
from mediphi.config.schema import Config
from mediphi.config.strict import BROKEN_RULES, Strict
from mediphi.errors import ConfigError

MAX_DEPTH = 32
PLAIN = (DictConfig, ListConfig, str, int, float, bool, type(None))
SECRET_VALUE = re.compile(
    r"\$\{oc\.env:\w*(KEY|TOKEN|PASSWORD|SECRET)|://[^/@\s]+:[^/@\s]+@"
    r"|\b(export|setenv)\s+\w*(KEY|TOKEN|PASSWORD|PASSWD|SECRET)[=\s]",
    re.IGNORECASE,
)
"""An environment secret, a password in an address or a shell line that sets one: they would land in
every copy of a config."""


def load(cfg: DictConfig) -> Config:
    """Judge a composed config.

    Raises:
        ConfigError: with one line for every problem found.
    """
    config, lines = check(cfg)
    if config is None:
        raise ConfigError(lines)
    return config


def check(cfg: DictConfig) -> tuple[Config | None, list[str]]:
    """`load` for callers that collect the lines of several configs: a config or its problems."""
    unresolved: dict[str, str] = {}
    plain = _resolve(cfg, "", unresolved)
    plain.pop("hydra", None)
    lines = list(unresolved.values())
    try:
        # JSON's strict mode: no text for a number, no `true` for 1, but lists for tuples.
        config = Config.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        items = [e for e in error.errors(include_url=False) if e["type"] != BROKEN_RULES]
        bad = [dotted(item["loc"], plain) for item in items]
        # A key that could not be read is missing now; it has had its line.
        told = [i for i, key in zip(items, bad, strict=True) if key not in unresolved]
        lines += render_all(told, plain, keys_of(Config, plain))
        salvage = _Salvage(plain, bad={*unresolved, *bad})
        salvage.section(Config, plain)
        return None, lines + salvage.lines
    return (None, lines) if lines else (config, [])


class _Salvage:
    """What is valid of a config that is not, to judge the rules between keys that are all fine.

    Pydantic looks at no rule of a section before all its keys are valid.

    Attributes:
        lines: of the broken rules.
    """

    def __init__(self, plain: dict[str, Any], *, bad: set[str]) -> None:
        self.lines: list[str] = []
        self._plain = plain
        self._bad = bad

    def section(self, model: type[Strict], data: dict[str, Any], prefix: str = "") -> Strict:
        """A section of what is valid, its rules judged; other keys raise AttributeError."""
        bad = {name for name in model.model_fields if self._is_bad(model, name, data, prefix)}
        values = {
            name: self._value(field.annotation, data[name], prefix + name)
            for name, field in model.model_fields.items()
            if name in data and name not in bad
        }
        found = model.model_construct(**values)
        for name in bad & vars(found).keys():  # a default is not what the user meant
            object.__delattr__(found, name)
        with suppress(AttributeError):  # a rule about a bad key says nothing
            for rule in found.broken_rules():
                self.lines.append(broken(prefix + rule.key, rule.allowed, self._plain))
        return found

    def _is_bad(self, model: type[Strict], name: str, data: dict[str, Any], prefix: str) -> bool:
        """Sections with a bad key inside are not bad themselves, lists of values are."""
        key, inside = prefix + name, set[str]()
        annotation = model.model_fields[name].annotation
        if not any(sections_in(annotation)):
            inside = {bad for bad in self._bad if bad.startswith(f"{key}.")}
        elif get_origin(annotation) is dict and isinstance(data.get(name), dict):
            inside = self._bad & {f"{key}.{entry}" for entry in data[name]}
        return key in self._bad or bool(inside)

    def _value(self, annotation: Any, data: Any, key: str) -> Any:
        sections = list(sections_in(annotation))
        if isinstance(data, list):
            return tuple(data)
        if not sections or not isinstance(data, dict):
            return data
        if get_origin(annotation) is not dict:
            return self.section(of_its_kind(sections, data)[0], data, f"{key}.")
        return {
            k: self.section(of_its_kind(sections, v)[0], v, f"{key}.{k}.") for k, v in data.items()
        }


def _resolve(node: Any, prefix: str, unresolved: dict[str, str]) -> Any:
    """Plain copy of `node` without the keys that have no value; those get a line each."""
    is_list = isinstance(node, ListConfig)
    raw: Any = OmegaConf.to_container(node, resolve=False)
    plain: dict[str, Any] = {}
    for key in range(len(node)) if is_list else list(node.keys()):
        name = f"{prefix}{key}"
        if name == "hydra":
            continue
        value = _value(node, key, name, raw[key], unresolved)
        if isinstance(value, DictConfig | ListConfig):
            if name.count(".") > MAX_DEPTH:
                unresolved[name] = line(name.split(".")[0], ..., "refers to itself")
                break
            value = _resolve(value, f"{name}.", unresolved)
        if name not in unresolved:
            plain[str(key)] = value
    return list(plain.values()) if is_list else plain


def _value(node: Any, key: Any, name: str, raw: object, unresolved: dict[str, str]) -> Any:
    if isinstance(raw, str) and SECRET_VALUE.search(raw):
        unresolved[name] = line(name, ..., "holds a secret; leave it in the environment")
        return None
    try:
        if OmegaConf.is_missing(node, key):
            unresolved[name] = line(name, "???", "needs a value")
            return None
        value = node[key]
    except RecursionError:
        unresolved[name] = line(name, raw, "refers to itself")
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        circular = "recursi" in reason.lower()
        unresolved[name] = line(name, raw, "refers to itself" if circular else reason)
    else:
        if isinstance(value, PLAIN):
            return value
        unresolved[name] = line(name, ..., f"{type(value).__name__} is not a config value")
    return None

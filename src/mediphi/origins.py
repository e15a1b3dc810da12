"""What model folders say of where they come from: names on the hub, and licences.

A folder says it by its card (the front matter of README.md), its `config.json` and its place in
the hub's cache; a run of ours also by its manifest and the models that it was made from.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mediphi.artifacts import read_manifest
from mediphi.artifacts.manifest import MANIFEST
from mediphi.artifacts.runs import CONFIG
from mediphi.errors import ArtifactError

_KNOWN = """
apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-permissive-1.0 cdla-permissive-2.0 gemma gpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 llama2 llama3
llama3.1 llama3.2 llama3.3 llama4 mpl-2.0 odc-by openrail openrail++ bigscience-openrail-m
unlicense
"""
HUB_LICENCES = frozenset(_KNOWN.split())
"""Identifiers that the hub knows; another is `other` there, with a `license_name`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_LOCAL = ("runs", "models", "checkpoints", "outputs", "data", "tmp")
"""First words of relative paths that have the form of a hub id."""
_FRONT_BYTES = 2**16


class Licences(NamedTuple):
    """What the models of a merge are licensed under, and the data behind them.

    Attributes:
        by_model: their licences; none: it says nothing of one.
    """

    by_model: dict[str, frozenset[str]]

    @property
    def unknown(self) -> list[str]:
        """Models that say nothing of a licence."""
        return [name for name, own in self.by_model.items() if not own]

    def front(self) -> dict[str, str]:
        """Keys of a card's front matter; none where a model's licence is unknown."""
        if self.unknown:
            return {}
        found = {one.lower(): one for own in self.by_model.values() for one in own}
        if len(found) > 1:
            return {"license": "other"}
        ((known, told),) = found.items()
        if known in HUB_LICENCES:
            return {"license": known}
        return {"license": "other"} | ({} if known == "other" else {"license_name": told})


def licences_behind(folders: Mapping[str, Path]) -> Licences:
    """Licences of models, each with those of all that it was made from."""
    found = {name: _licences(folder, set()) for name, folder in folders.items()}
    return Licences({name: frozenset(own or ()) for name, own in found.items()})


def hub_names(folders: Mapping[str, Path]) -> list[str]:
    """What may stand in `base_model` of a card, each once: the names on the hub that models give,
    or the folder's name; never a path of this machine."""
    names: list[str] = []
    for folder in folders.values():
        names += _hub_ids(folder, set()) or [_run_of(folder).name]
    return list(dict.fromkeys(names))


def _licences(folder: Path, seen: set[Path]) -> set[str] | None:
    """Licences of a model and of the data behind it; None where any of it is unknown."""
    stated = {own for card in _cards(folder) for own in _texts(card.get("license"))}
    stated |= {own for card in _cards(folder) for own in _texts(card.get("license_name"))}
    if len(stated) > 1:  # `other` is only the place holder of a licence with a name
        stated -= {"other"}
    if stated:
        return stated
    manifest = _manifest(folder)
    roots = None if manifest is None else _roots(folder, manifest)
    if manifest is None or roots is None or folder in seen:
        return None
    found = {str(own.get("id")) for own in manifest["data"].get("licences", {}).values()}
    for root in roots:
        theirs = _licences(root, seen | {folder})
        if theirs is None:
            return None
        found |= theirs
    return None if any(own.lower().startswith("unknown") for own in found) else found


def _hub_ids(folder: Path, seen: set[Path]) -> list[str]:
    cached = _HUB_CACHE.search(f"{folder.absolute().as_posix()}/")
    if cached:
        return ["/".join(cached.groups())]
    told = [_json(folder / "config.json").get("_name_or_path")]
    told += [one for card in _cards(folder) for one in _texts(card.get("base_model"))]
    if found := [one for one in told if isinstance(one, str) and is_hub_id(one)]:
        return found[:1] if found[0] == told[0] else found
    manifest = _manifest(folder)
    if manifest is None or folder in seen:
        return []
    path = _started_from(folder)
    if path is not None and is_hub_id(path):
        return [path]
    roots = _roots(folder, manifest) or []
    return [one for root in roots for one in _hub_ids(root, seen | {folder})]


def is_hub_id(text: str) -> bool:
    """Whether it has the form `owner/name` and is no path of this machine."""
    if not _HUB_ID.fullmatch(text) or text.partition("/")[0] in _LOCAL:
        return False
    return not Path(text).exists()


def _run_of(folder: Path) -> Path:
    """The run whose `model/` it is, or the folder."""
    is_run = folder.name == "model" and (folder.parent / MANIFEST).is_file()
    return (folder.parent if is_run else folder).absolute()


def _cards(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Front matters of the folder's card and of its run's."""
    for place in dict.fromkeys((folder.absolute(), _run_of(folder))):
        try:
            with (place / "README.md").open(encoding="utf-8", errors="replace") as file:
                text = file.read(_FRONT_BYTES)
            _, front, _ = text.split("---\n", 2) if text.startswith("---\n") else ("", "", "")
            content = yaml.safe_load(front)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one.strip() for one in values if isinstance(one, str) and one.strip()]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Of a run of ours."""
    try:
        return read_manifest(_run_of(folder))
    except (ArtifactError, OSError):
        return None


def _roots(folder: Path, manifest: Mapping[str, Any]) -> list[Path] | None:
    """Model folders that a run was made from, none where weights were drawn; None: not known."""
    told = _config(folder)
    if told.get("merge") is not None:
        return None  # its manifest names no folders of others; its card says what it knows
    if parents := manifest.get("parents"):
        places = [Path(str(own["path"])) for own in parents.values()]
        return [place / "model" if (place / "model").is_dir() else place for place in places]
    if "init" not in told.get("model", {}):
        return None
    path = _started_from(folder)
    return [] if path is None else [Path(path)]


def _started_from(folder: Path) -> str | None:
    """`model.path` of a training run that read weights."""
    model = _config(folder).get("model", {})
    return None if model.get("init") == "random" else model.get("path")


def _config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run of ours."""
    try:
        content = yaml.safe_load((_run_of(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("model"), dict) else {}

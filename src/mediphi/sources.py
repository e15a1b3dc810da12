"""What a merge reads: folders of models by name, and who vouches for them."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mediphi.artifacts import (
    Parent,
    named_parents,
    plain_folder,
    read_manifest,
    trained_from,
    verified_parent,
)
from mediphi.config.merging import Merge
from mediphi.config.methods import METHODS
from mediphi.errors import ArtifactError, ConfigError, UserError

BASE = "base"


class Sources(NamedTuple):
    """The models of a merge.

    Attributes:
        base: None where the method has none.
        parents: artifacts of ours among them, by name and `base`.
        plain: the folders that no manifest of ours vouches for, likewise; large files are sampled.
    """

    base: Path | None
    models: dict[str, Path]
    parents: dict[str, Parent]
    plain: dict[str, Parent]

    @property
    def folders(self) -> dict[str, Path]:
        """All of them by name, the base first."""
        return ({} if self.base is None else {BASE: self.base}) | self.models

    @property
    def fingerprint(self) -> str:
        """Of the folders that no manifest of ours vouches for."""
        plain = {name: one.sha256 for name, one in self.plain.items()}
        return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def find_sources(merge: Merge, *, verify: bool = True) -> Sources:
    """Look for the folders, and check those of ours against their manifests.

    Args:
        verify: hash every file; without it the manifests' word is taken.

    Raises:
        UserError: a folder or a base is missing, or stands there twice; or an artifact is damaged.
    """
    models = {
        name: model_folder(model.path, key=f"merge.models.{name}.path").resolve()
        for name, model in merge.models.items()
    }
    method = METHODS.get(merge.method or "")
    base = None
    if merge.base is not None:
        base = model_folder(merge.base, key="merge.base").resolve()
    elif method is not None and method.base == "required":
        base = _common_base(merge).resolve()
    takes_base = method is None or method.base != "none"
    _check_distinct(base if takes_base else None, models)
    return sources_of(base, models, verify=verify)


def _check_distinct(base: Path | None, models: Mapping[str, Path]) -> None:
    """A recipe names models by their folders alone.

    Raises:
        UserError: one folder has two names.
    """
    names: dict[Path, str] = {}
    for name, folder in models.items():
        if folder == base:
            raise UserError(f"merge: model {name} is the base itself, {folder}: leave it out")
        other = names.setdefault(folder, name)
        if other != name:
            why = f"models {other} and {name} are one folder, {folder}: leave one out"
            raise UserError(f"merge: {why}")


def told_sources(told: Merge) -> Sources:
    """What the merge reads, also where a file tells it; by the word of the manifests.

    Raises:
        UserError: a file, folder or base is missing.
    """
    if told.config is None:
        return find_sources(told, verify=False)
    if told.backend == "mergekit":
        return mergekits_sources(read_recipe_text(told.config), verify=False)
    from mediphi.merge.mergekit_yaml import read_mergekit

    return find_sources(read_mergekit(Path(told.config)).merge, verify=False)


def mergekits_sources(text: str, *, verify: bool = True) -> Sources:
    """What mergekit would read for a text in its YAML.

    Raises:
        UserError: mergekit is not installed or cannot read it, or a folder is missing.
    """
    from mediphi.merge.by_mergekit import folders_in
    from mediphi.merge.mergekit_yaml import short_names

    base, folders = folders_in(text)
    models = {
        short: model_folder(folder, key="model") for folder, short in short_names(folders).items()
    }
    root = None if base is None else model_folder(base, key="base_model")
    return sources_of(root, models, verify=verify)


def read_recipe_text(path: str) -> str:
    """The file that `merge.config` names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError([f"merge.config={path}: cannot be read: {why}"]) from None


def inputs_of(told: Merge, sources: Sources) -> dict[str, Parent]:
    """All that the config's merge reads, by the names that an error tells.

    Raises:
        ConfigError: the file that tells it cannot be read.
    """
    found = sources.parents | sources.plain
    inputs = {n if n == BASE else f"model {n}": one for n, one in found.items()}
    if told.config is not None:
        text = read_recipe_text(told.config)
        inputs["merge.config"] = Parent(told.config, sha256(text.encode()).hexdigest())
    return inputs


def sources_of(base: Path | None, models: dict[str, Path], *, verify: bool = True) -> Sources:
    """Folders with what vouches for them.

    Raises:
        UserError: a model is called `base`, or an artifact is damaged.
    """
    if BASE in models:
        raise UserError("merge.models.base: base is the name of the base model; take another")
    parents: dict[str, Parent] = {}
    plain: dict[str, Parent] = {}
    for name, folder in (models | ({} if base is None else {BASE: base})).items():
        parent = verified_parent(folder) if verify else _named(folder)
        if parent is not None:
            parents[name] = parent
        else:
            plain[name] = plain_folder(str(folder)) or Parent(str(folder), "")
    return Sources(base, models, parents, plain)


def model_folder(path: str, *, key: str) -> Path:
    """The folder with weights that `path` means: a run directory stands for its `model/`.

    Raises:
        UserError: there is none.
    """
    root = Path(path)
    for folder in (root, root / "model"):
        if (folder / "config.json").is_file():
            return folder
    if (root / "config.yaml").is_file():
        raise UserError(f"{key}={path}: this run is not finished: run its command again")
    if root.exists():
        raise UserError(f"{key}={path}: no model folder, it has no config.json")
    raise UserError(
        f"{key}={path}: no such folder; give a run directory or a local model folder (a model of "
        "the hub: huggingface-cli download NAME --local-dir FOLDER)"
    )


def _common_base(merge: Merge) -> Path:
    """The model that all of them were made from, as it is now."""
    found = {name: trained_from(model.path) for name, model in merge.models.items()}
    named = {parent.sha256: parent for parent in found.values() if parent is not None}
    unknown = [name for name, parent in found.items() if parent is None]
    if unknown or len(named) != 1:
        why = (
            f"{unknown[0]}'s folder does not name the model it was made from"
            if unknown
            else "the models were made from different ones"
        )
        raise UserError(f"merge.base=null: {why}; give merge.base=RUN_DIRECTORY_OR_FOLDER")
    (parent,) = named.values()
    folder = model_folder(parent.path, key="merge.base")
    now = _named(folder)
    if now is None or now.sha256 != parent.sha256:
        raise ArtifactError(
            f"{parent.path}: not what the models were made from any more; give merge.base="
        )
    return folder


def _named(folder: Path) -> Parent | None:
    named = named_parents(str(folder))
    return None if named is None else named["model"]


def licences_of(parents: Mapping[str, Parent]) -> dict[str, dict[str, Any]]:
    """Licences of the data behind all parents, by source, as their manifests have them."""
    found: dict[str, dict[str, Any]] = {}
    for parent in parents.values():
        found |= read_manifest(Path(parent.path))["data"].get("licences", {})
    return found

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
from mediphi.errors import ArtifactError, UserError

BASE = "base"


class Sources(NamedTuple):
    """The models of a merge.

    Attributes:
        base: None where the method has none.
        parents: artifacts of ours among them, by name and `base`.
        fingerprint: of the folders that no manifest of ours vouches for.
    """

    base: Path | None
    models: dict[str, Path]
    parents: dict[str, Parent]
    fingerprint: str

    @property
    def folders(self) -> dict[str, Path]:
        """All of them by name, the base first."""
        return ({} if self.base is None else {BASE: self.base}) | self.models


def find_sources(merge: Merge, *, verify: bool = True) -> Sources:
    """Look for the folders, and check those of ours against their manifests.

    Args:
        verify: hash every file; without it the manifests' word is taken.

    Raises:
        UserError: a folder or a base is missing, or an artifact is damaged.
    """
    models = {
        name: model_folder(model.path, key=f"merge.models.{name}.path")
        for name, model in merge.models.items()
    }
    method = METHODS.get(merge.method or "")
    base = None
    if merge.base is not None:
        base = model_folder(merge.base, key="merge.base")
    elif method is not None and method.base == "required":
        base = _common_base(merge)
    return sources_of(base, models, verify=verify)


def sources_of(base: Path | None, models: dict[str, Path], *, verify: bool = True) -> Sources:
    """Folders with what vouches for them.

    Raises:
        UserError: a model is called `base`, or an artifact is damaged.
    """
    if BASE in models:
        raise UserError("merge.models.base: base is the name of the base model; take another")
    parents: dict[str, Parent] = {}
    plain: dict[str, str] = {}
    for name, folder in (models | ({} if base is None else {BASE: base})).items():
        parent = verified_parent(folder) if verify else _named(folder)
        if parent is not None:
            parents[name] = parent
        else:
            found = plain_folder(str(folder))
            plain[name] = "" if found is None else found.sha256
    digest = sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return Sources(base, models, parents, digest)


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

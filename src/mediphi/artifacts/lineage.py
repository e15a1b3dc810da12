"""What a run was made from: the data it began with, and the weights that it started from."""

import json
from collections.abc import Mapping
from pathlib import Path

from mediphi.artifacts.files import write_atomic
from mediphi.artifacts.manifest import MANIFEST, Parent, manifest_hash, read_manifest, verify
from mediphi.errors import ArtifactError

DATA = "data.json"
OUR_WORDS = (b'"config_hash"', b'"parents"')
"""Either marks a manifest as ours; one flipped bit cannot hide both."""


def check_data(
    run_dir: Path, fingerprint: str | None, *, parents: Mapping[str, Parent] | None = None
) -> None:
    """Record the inputs of a run that begins; refuse others when it goes on or is finished.

    The config hash covers where data and parents are, not what they are.

    Args:
        fingerprint: of the data as they are now; None: they are gone, do not compare.
        parents: artifacts read, by role, as they are now; None: do not compare.

    Raises:
        ArtifactError: the run began with other data or parents, or its record is damaged.
    """
    path = run_dir / DATA
    now = None if parents is None else {role: one.sha256 for role, one in parents.items()}
    if not path.exists():
        if not (run_dir / MANIFEST).exists():
            inputs = {"fingerprint": fingerprint} | ({} if now is None else {"parents": now})
            write_atomic(path, json.dumps(inputs) + "\n")
        return
    try:
        inputs = json.loads(path.read_bytes())
        recorded, before = inputs["fingerprint"], dict(inputs.get("parents") or {})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path}: damaged; make the run anew: on_existing=overwrite") from None
    if fingerprint is not None and recorded != fingerprint:
        raise ArtifactError(
            f"{run_dir}: the data changed since this run began ({str(recorded)[:8]}, now "
            f"{fingerprint[:8]}); restore them, choose another name= or on_existing=overwrite"
        )
    if parents is not None and "parents" in inputs:  # earlier versions did not record them
        _refuse_other_parents(run_dir, before, parents)


def _refuse_other_parents(
    run_dir: Path, before: Mapping[str, str], parents: Mapping[str, Parent]
) -> None:
    for role in sorted(before.keys() | parents.keys()):
        now = parents.get(role, Parent("", ""))
        if (old := before.get(role, "")) != now.sha256:
            where = f" at {now.path}" if now.path else ""
            raise ArtifactError(
                f"{run_dir}: the {role}{where} changed since this run began "
                f"({str(old)[:8] or 'no manifest'}, now {now.sha256[:8] or 'no manifest'}); "
                "restore it, choose another name= or on_existing=overwrite"
            )


def verified_parent(folder: Path) -> Parent | None:
    """Check a model folder by its own manifest, else by that of the run it lies in.

    Returns:
        the artifact and its hash; None where no manifest of ours vouches for the folder.

    Raises:
        ArtifactError: a file is damaged, missing or extra.
    """
    if (artifact := _vouching(folder)) is None:
        return None
    verify(artifact)
    return Parent(str(artifact), manifest_hash(artifact))


def named_parents(path: str) -> dict[str, Parent] | None:
    """What `model.path` names now, by its manifest alone: no other file is read.

    Returns:
        the artifact as `model`; None where there is none, or no whole manifest of ours.
    """
    root = Path(path)
    try:
        folder = root if (root / "config.json").is_file() else root / "model"
        if (artifact := _vouching(folder)) is None:
            return None
        return {"model": Parent(str(artifact), manifest_hash(artifact))}
    except (ArtifactError, OSError):
        return None


def _vouching(folder: Path) -> Path | None:
    """The artifact whose manifest lists the files of a model folder."""
    if not folder.is_dir():
        return None
    if _is_ours(folder / MANIFEST):
        return folder
    if _is_ours(folder.parent / MANIFEST) and _lists(folder.parent, folder.name):
        return folder.parent
    return None


def _is_ours(manifest: Path) -> bool:
    """Browsers and others have files of this name, too."""
    if not manifest.is_file():
        return False
    raw = manifest.read_bytes()
    return any(word in raw for word in OUR_WORDS)


def _lists(run_dir: Path, name: str) -> bool:
    return any(file.startswith(f"{name}/") for file in read_manifest(run_dir)["files"])

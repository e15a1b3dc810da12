"""What a run was made from: the data it began with, and the weights that it started from."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from mediphi.artifacts.files import write_atomic
from mediphi.artifacts.manifest import MANIFEST, Parent, manifest_hash, read_manifest, verify
from mediphi.errors import ArtifactError

DATA = "data.json"
OUR_WORDS = (b'"config_hash"', b'"parents"')
"""Either marks a manifest as ours; one flipped bit cannot hide both."""
READ = (".json", ".jinja", ".safetensors")
"""What is read of a model folder."""
BLOCK, NUM_BLOCKS = 2**16, 256
"""What is hashed of a larger file, spread over it. Every look at a finished run hashes a plain
model folder, so gigabytes must not be read; training moves weights everywhere: a sample sees it."""


def check_data(
    run_dir: Path,
    fingerprint: str | None,
    *,
    parents: Mapping[str, Parent] | None = None,
    folder: Parent | None = None,
) -> None:
    """Record the inputs of a run that begins; refuse others when it goes on or is finished.

    The config hash covers where data and parents are, not what they are.

    Args:
        fingerprint: of the data as they are now; None: they are gone, do not compare.
        parents: artifacts read, by role, as they are now; None: do not compare.
        folder: the model folder read that is no artifact (`plain_folder`); None: do not compare.

    Raises:
        ArtifactError: the run began with other data or parents, or its record is damaged.
    """
    path = run_dir / DATA
    if not path.exists():
        if not (run_dir / MANIFEST).exists():
            inputs: dict[str, Any] = {"fingerprint": fingerprint}
            if parents is not None:
                inputs["parents"] = {role: one.sha256 for role, one in parents.items()}
            if folder is not None:
                inputs["folder"] = folder.sha256
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
    # Earlier versions did not record parents, nor folders.
    if parents is not None and "parents" in inputs:
        for role in sorted(before.keys() | parents.keys()):
            now = parents.get(role, Parent("", ""))
            _refuse_other(run_dir, role, str(before.get(role, "")), now)
    if folder is not None and "folder" in inputs:
        _refuse_other(run_dir, "model", str(inputs["folder"]), folder)


def _refuse_other(run_dir: Path, role: str, before: str, now: Parent) -> None:
    if before == now.sha256:
        return
    where = f" at {now.path}" if now.path else ""
    raise ArtifactError(
        f"{run_dir}: the {role}{where} changed since this run began "
        f"({before[:8] or 'no manifest'}, now {now.sha256[:8] or 'no manifest'}); "
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
    try:
        if (artifact := _vouching(_model_folder(path))) is None:
            return None
        return {"model": Parent(str(artifact), manifest_hash(artifact))}
    except (ArtifactError, OSError):
        return None


def trained_from(path: str) -> Parent | None:
    """The model that the artifact at `path` was made from: trained from it, or merged into it.

    None where no manifest of ours names one.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    if (artifact := _vouching(_model_folder(path))) is None:
        return None
    parents = read_manifest(artifact)["parents"]
    found = parents.get("base") or parents.get("model")
    return None if found is None else Parent(found["path"], found["sha256"])


def plain_folder(path: str) -> Parent | None:
    """What identifies a local model folder that no manifest of ours vouches for.

    Returns:
        the folder, and a hash of its files' names, sizes and content, of large files a sample;
        None where there is no such folder, or an artifact, or it cannot be read.
    """
    folder, digest = _model_folder(path), sha256()
    try:
        if not (folder / "config.json").is_file() or _vouching(folder) is not None:
            return None
        for file in sorted(f for f in folder.iterdir() if f.suffix in READ and f.is_file()):
            digest.update(json.dumps([file.name, file.stat().st_size]).encode())
            for block in _blocks(file):
                digest.update(block)
    except (ArtifactError, OSError):
        return None
    return Parent(str(folder), digest.hexdigest())


def _blocks(file: Path) -> Iterator[bytes]:
    """A small file whole; of a larger one `NUM_BLOCKS` blocks, its first and last among them."""
    spare = file.stat().st_size - NUM_BLOCKS * BLOCK
    with file.open("rb") as stream:
        for number in range(NUM_BLOCKS):
            if spare > 0:
                stream.seek(number * BLOCK + number * spare // (NUM_BLOCKS - 1))
            yield stream.read(BLOCK)


def _model_folder(path: str) -> Path:
    """A run directory stands for its `model/`."""
    root = Path(path)
    return root if (root / "config.json").is_file() else root / "model"


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

"""Hugging Face folders, read tensor by tensor. Pickles are never opened."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mediphi.errors import ArtifactError
from mediphi.merge.storage import ReadOnlyFile, StoredTensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of numbers that can be merged, by their names in safetensors."""
WHOLE_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Of numbers that must be the same in all models."""
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|word_embeddings|wte)\.weight$")
HEADS = ("lm_head.weight", "embed_out.weight")


class Stored(NamedTuple):
    """A tensor as its file describes it; `start` is its first byte there."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open model folder.

    Attributes:
        config: what config.json holds.
        tensors: what it stores by name, in the order of its files; not a head that is tied to the
            embedding, of which it is a copy.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    _files: Mapping[str, Any] = field(repr=False)
    _handles: Mapping[str, ReadOnlyFile] = field(repr=False)

    def stored(self, name: str) -> StoredTensor:
        """The tensor in its file, to be read by pieces."""
        own = self.tensors[name]
        return StoredTensor(
            self._handles[own.file], start=own.start, dtype=own.dtype, shape=own.shape
        )

    def read(self, name: str) -> torch.Tensor:
        """A view into the memory-mapped file: it takes no memory of its own, do not write to it.

        Raises:
            ArtifactError: the file cannot be read.
        """
        file = self.tensors[name].file
        try:
            return self._files[file].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.folder / file, error) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder; a run directory of ours stands for its `model/`.

    Only headers are read, but a tied head and its embedding. What the files promise is checked
    against what they hold.

    Raises:
        ArtifactError: nothing there, pickles only, a damaged file, a tensor that is missing, stored
            twice or not a number, an index that names a missing file or one outside the folder, a
            head that is tied by the config and differs from the embedding.
    """
    folder = _model_folder(path)
    config = read_json(folder / CONFIG)
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map else [WEIGHTS]
    opened: dict[str, Any] = {}
    handles: dict[str, ReadOnlyFile] = {}
    tensors: dict[str, Stored] = {}
    for file in files:
        path = _inside(folder, file)
        try:
            opened[file] = safe_open(path, framework="pt")
            handles[file] = ReadOnlyFile(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        headers, data_start = _read_header(path)
        if weight_map:
            _check_index(folder, file, headers.keys(), weight_map)
        tensors |= {
            name: _stored(path, name, header, data_start) for name, header in headers.items()
        }
    if not tensors:
        raise ArtifactError(f"{folder}: {files[0]} holds no tensor; {_RESTORE}")
    return _tied_once(Checkpoint(folder, config, tensors, opened, handles))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArtifactError: not readable, not an object, or a key stands there twice.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    return content


_RESTORE = "fetch the model again, or name another folder"


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists():
        raise ArtifactError(f"{path}: no such folder; give a local Hugging Face folder")
    if (path / "config.yaml").is_file():
        raise ArtifactError(f"{path}: this run is not finished: run the same command again")
    raise ArtifactError(f"{path}: no {CONFIG} there; give a Hugging Face folder")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """From tensors to files; None where there is one file only."""
    index, single = folder / INDEX, folder / WEIGHTS
    if not index.exists():
        if not single.exists():
            pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
            found = f"only pickles ({', '.join(pickles[:3])}), which are refused" if pickles else ""
            raise ArtifactError(
                f"{folder}: no {WEIGHTS}{': ' + found if found else ''}; save the model as "
                "safetensors, or name another folder"
            )
        return None
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(f, str) for f in content.values()):
        raise ArtifactError(f"{index}: has no weight_map from tensors to files; {_RESTORE}")
    if not content:
        raise ArtifactError(f"{index}: its weight_map names no tensor; {_RESTORE}")
    if single.exists() and set(content.values()) != {WEIGHTS}:
        raise ArtifactError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove one of them")
    return content


def _inside(folder: Path, file: str) -> Path:
    """The file's path; refused where it leaves the folder, except into the hub cache it is of."""
    path = folder / file
    if Path(file).name != file or file in ("", ".", ".."):
        raise ArtifactError(f"{folder / INDEX}: names {file!r}, outside of the folder; {_RESTORE}")
    if not path.is_file():
        raise ArtifactError(f"{folder}: {file!r} is named by its index but missing; {_RESTORE}")
    home, place = folder.resolve(), path.resolve().parent
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if place not in (home, blobs):
        raise ArtifactError(f"{path}: a link to outside of the folder; put the file itself there")
    return path


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file that safetensors could open, which takes the last of two same names.

    Returns:
        Entries by name, and the byte at which the data begins.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except ValueError as error:
        raise _damaged(path, error) from None
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), 8 + size


def _check_index(folder: Path, file: str, held: Any, weight_map: Mapping[str, str]) -> None:
    """Index and file must tell the same."""
    promised = {name for name, theirs in weight_map.items() if theirs == file}
    if missing := promised - held:
        raise ArtifactError(
            f"{folder}: tensor {min(missing)} is not in {file}, where the index has it; {_RESTORE}"
        )
    if extra := held - promised:
        name = min(extra)
        other = weight_map.get(name)
        fault = f"stored twice, in {other} and {file}" if other else f"in {file}, not in the index"
        raise ArtifactError(f"{folder}: tensor {name} is {fault}; {_RESTORE}")


def _stored(path: Path, name: str, header: Mapping[str, Any], data_start: int) -> Stored:
    dtype = (DTYPES | WHOLE_DTYPES).get(header["dtype"])
    if dtype is None:
        allowed = ", ".join(str(own).removeprefix("torch.") for own in DTYPES.values())
        raise ArtifactError(
            f"{path.parent}: tensor {name} is {header['dtype']}; weights of {allowed} can be merged"
        )
    start = data_start + header["data_offsets"][0]
    return Stored(path.name, dtype, tuple(header["shape"]), start)


def _tied_once(checkpoint: Checkpoint) -> Checkpoint:
    """Without a head that is a copy of the embedding: merged apart, the two might differ."""
    names = checkpoint.tensors
    heads = [name for name in HEADS if name in names]
    embeddings = [name for name in names if EMBEDDING.search(name)]
    if len(heads) != 1 or len(embeddings) != 1 or not _is_tied(checkpoint.config):
        return checkpoint
    head, embedding = (checkpoint.read(name) for name in (*heads, *embeddings))
    is_same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not is_same or not torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
        raise ArtifactError(
            f"{checkpoint.folder}: tensor {heads[0]} differs from {embeddings[0]}, to which "
            f"{CONFIG} ties it; remove it, or set tie_word_embeddings to false there"
        )
    return replace(checkpoint, tensors={n: own for n, own in names.items() if n != heads[0]})


def _is_tied(config: Mapping[str, Any]) -> bool:
    """What config.json says, or leaves to the architecture's default."""
    told = config.get("tie_word_embeddings")
    if told is not None:
        return bool(told)
    from transformers import AutoConfig  # seconds

    try:
        return bool(AutoConfig.for_model(config.get("model_type", "")).tie_word_embeddings)
    except (ValueError, AttributeError):  # unknown to transformers, or a model of several parts
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands there twice")
    return content


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: damaged ({_first_line(error)}); {_RESTORE}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__

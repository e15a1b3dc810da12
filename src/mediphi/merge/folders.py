"""From finished shards to a Hugging Face folder, which appears by one rename."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mediphi.artifacts import room_for, write_atomic
from mediphi.artifacts.files import sync_folder
from mediphi.merge.agreement import dtype_name
from mediphi.merge.checkpoints import CONFIG, INDEX, Checkpoint, read_json
from mediphi.merge.shards import Layout, shard_paths
from mediphi.merge.vocabularies import FILES, GENERATION, stop_ids

STAGING = "folder"
LAST = "config"
"""config.json until all the rest is there: nobody loads a folder without it."""


def publish_folder(
    target: Path,
    *,
    scratch: Path,
    layout: Layout,
    checkpoints: Sequence[Checkpoint],
    dtype: torch.dtype | None,
) -> None:
    """Move the shards into a folder with config, stop ids and tokenizer, and give it its name.

    Config, tokenizer and chat template are those of the first checkpoint.

    Args:
        scratch: holds the shards, on stable storage already; on the file system of `target`.
        dtype: what the config will say; None: what it says now.

    Raises:
        MachineError: the disk is full; the shards are where they were, or `recall` brings them.
    """
    staging = scratch / STAGING
    staging.mkdir()
    with room_for(scratch, 2**20):
        for name, content in _texts(checkpoints, layout).items():
            write_atomic(staging / name, content)
        config = _config(checkpoints[0].config, dtype)
        write_atomic(scratch / LAST, json.dumps(config, indent=2, sort_keys=True) + "\n")
        target.parent.mkdir(parents=True, exist_ok=True)
    for path, name in zip(shard_paths(scratch, layout), layout.file_names(), strict=True):
        path.rename(staging / name)
    sync_folder(staging)
    (scratch / LAST).rename(staging / CONFIG)
    sync_folder(staging)
    staging.rename(target)
    sync_folder(target.parent)
    sync_folder(scratch)


def recall(scratch: Path, *, layout: Layout) -> None:
    """Undo a publication that was killed: the shards go back."""
    staging = scratch / STAGING
    if not staging.is_dir():
        return
    (staging / CONFIG).unlink(missing_ok=True)
    for path, name in zip(shard_paths(scratch, layout), layout.file_names(), strict=True):
        if (staging / name).exists():
            (staging / name).rename(path)
    shutil.rmtree(staging)


def is_published(target: Path, layout: Layout) -> bool:
    """Whether the folder holds shards of this layout, by names and sizes."""
    sizes = zip(layout.file_names(), (shard.size for shard in layout.shards), strict=True)
    files = [(target / name, size) for name, size in sizes]
    return (target / CONFIG).is_file() and all(
        path.is_file() and path.stat().st_size == size for path, size in files
    )


def companions(checkpoints: Sequence[Checkpoint]) -> dict[str, bytes]:
    """Tokenizer, template and generation config with all stop ids, by the names of their files."""
    first = checkpoints[0]
    texts = {n: (first.folder / n).read_bytes() for n in FILES if (first.folder / n).is_file()}
    return texts | {GENERATION: _json(_generation_config(checkpoints))}


def _texts(checkpoints: Sequence[Checkpoint], layout: Layout) -> dict[str, bytes]:
    """Every file beside config and weights, by name."""
    texts = companions(checkpoints)
    if len(layout.shards) > 1:
        files = layout.file_names()
        weight_map = {name: files[slot.shard] for name, slot in layout.slots.items()}
        texts[INDEX] = _json(
            {"metadata": {"total_size": layout.num_bytes}, "weight_map": weight_map}
        )
    return texts


def _generation_config(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    first = checkpoints[0]
    if (first.folder / GENERATION).is_file():
        config = read_json(first.folder / GENERATION)
    else:
        names = ("bos_token_id", "pad_token_id")
        config = {n: first.config[n] for n in names if first.config.get(n) is not None}
    ids = stop_ids(checkpoints)
    return config | ({"eos_token_id": ids} if ids else {})


def _config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The model's code is part of transformers or is not run: `auto_map` names code elsewhere."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    if dtype is None:
        return kept
    key = "torch_dtype" if "torch_dtype" in kept else "dtype"  # renamed in transformers 4.56
    return kept | {key: dtype_name(dtype)}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

"""Whether models can be merged: same architecture, tensors and tokenizer, or one clear line."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mediphi.errors import ArtifactError
from mediphi.merge.checkpoints import DTYPES, Checkpoint
from mediphi.merge.vocabularies import check_tokenizers, check_vocabulary

PRIVATE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_range",
    "name_or_path",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""What config.json may tell differently of models that compute alike."""
PRIVATE_ENDS = ("_dropout", "_pdrop", "_version", "_attn_implementation")
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
ROPE_OUTSIDE = ("original_max_position_embeddings", "partial_rotary_factor")
"""What stands inside or beside the rope's parameters, by version."""
LONGEST = 60
"""Characters of a value that a message shows."""


def check_agreement(checkpoints: Sequence[Checkpoint], *, mixed_dtypes: bool) -> list[str]:
    """Compare all models with the first, by headers and configs; no number is read.

    Args:
        mixed_dtypes: whether a tensor may be stored in another float dtype by another model.

    Returns:
        lines worth telling: other chat templates, of which the first's is taken.

    Raises:
        ArtifactError: naming folder, field or tensor, and what to do.
    """
    first, *others = checkpoints
    notes = []
    check_vocabulary(first)  # the others have the same tokenizer and vocabulary, or are refused
    for other in others:
        _check_configs(first, other)
        _check_names(first, other)
        for name in first.tensors:
            _check_tensor(first, other, name, mixed_dtypes=mixed_dtypes)
        if note := check_tokenizers(first, other):
            notes.append(note)
    return notes


def _check_configs(first: Checkpoint, other: Checkpoint) -> None:
    ours, theirs = _architecture(first.config), _architecture(other.config)
    # What only one of them tells is the other's default: their versions of transformers differ.
    for key in sorted(ours.keys() & theirs.keys(), key=lambda key: (key != "model_type", key)):
        if ours[key] != theirs[key]:
            raise ArtifactError(
                f"{other.folder}: {key}={_shown(theirs[key])} in config.json, "
                f"{_shown(ours[key])} in {first.folder}; only models of one architecture can be "
                "merged"
            )


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in config.items()
        if value is not None and key not in {*PRIVATE, *ROPE} and not key.endswith(PRIVATE_ENDS)
    }
    rope: dict[str, Any] = {"rope_type": "default"}
    if "rope_theta" in config:
        rope["rope_theta"] = config["rope_theta"]
    for place in ("rope_scaling", "rope_parameters"):
        inner = config.get(place)
        if isinstance(inner, dict):
            rope |= {"rope_type" if k == "type" else k: v for k, v in inner.items()}
    outside = {key: rope.pop(key) for key in ROPE_OUTSIDE if rope.get(key) is not None}
    return kept | outside | {f"rope.{key}": value for key, value in rope.items()}


def _check_names(first: Checkpoint, other: Checkpoint) -> None:
    for one, two in ((first, other), (other, first)):
        if lacking := one.tensors.keys() - two.tensors.keys():
            name = next(name for name in one.tensors if name in lacking)
            tied = " (one ties its embeddings, one does not)" if name == "lm_head.weight" else ""
            raise ArtifactError(
                f"{two.folder}: lacks tensor {name}, which {one.folder} has{tied}; only models "
                "with the same tensors can be merged"
            )


def _check_tensor(first: Checkpoint, other: Checkpoint, name: str, *, mixed_dtypes: bool) -> None:
    ours, theirs = first.tensors[name], other.tensors[name]
    if ours.shape != theirs.shape:
        raise ArtifactError(
            f"{other.folder}: tensor {name} has shape {list(theirs.shape)}, {list(ours.shape)} in "
            f"{first.folder}; only models of one size and vocabulary can be merged"
        )
    if ours.dtype == theirs.dtype:
        return
    floats = {ours.dtype, theirs.dtype} <= set(DTYPES.values())
    if floats and mixed_dtypes:
        return
    remedy = (
        "state which the merged model shall have: merge.dtype"
        if floats
        else "only models with the same tensors can be merged"
    )
    raise ArtifactError(
        f"{other.folder}: tensor {name} is {dtype_name(theirs.dtype)}, {dtype_name(ours.dtype)} in "
        f"{first.folder}; {remedy}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json writes it."""
    return str(dtype).removeprefix("torch.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."

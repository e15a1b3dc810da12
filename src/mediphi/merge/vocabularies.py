"""Tokenizers as files: whether two cut text alike, and where generation stops."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mediphi.errors import ArtifactError
from mediphi.merge.checkpoints import Checkpoint, read_json
from mediphi.records import STOP_TOKENS

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""What a tokenizer is read from where there is no tokenizer.json."""
FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    *SLOW_FILES,
)
PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
"""Of tokenizer.json, what decides which ids a text gets."""
FLAGS = ("add_bos_token", "add_eos_token")
"""Of tokenizer_config.json, what some tokenizers add to every text."""


def check_tokenizers(first: Checkpoint, other: Checkpoint) -> str | None:
    """Refuse tokenizers that give a text other ids.

    Returns:
        one line when chat templates differ, which merging can live with; else None.

    Raises:
        ArtifactError: naming folder, part and what to do.
    """
    name = TOKENIZER if _exists(first, TOKENIZER) or _exists(other, TOKENIZER) else None
    names = (name,) if name else SLOW_FILES
    for name in names:
        _check_file(first.folder / name, other.folder / name)
    _check_flags(first.folder, other.folder)
    if _chat_template(first.folder) != _chat_template(other.folder):
        return f"{other.folder}: its chat template is another; the one of {first.folder} is taken"
    return None


def check_vocabulary(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        ArtifactError: naming folder and ids.
    """
    size, ids = checkpoint.config.get("vocab_size"), _tokens(checkpoint.folder).values()
    if isinstance(size, int) and ids and max(ids) >= size:
        raise ArtifactError(
            f"{checkpoint.folder}: the tokenizer has ids up to {max(ids)}, the model a vocabulary "
            f"of {size}; they do not belong together"
        )


def stop_ids(checkpoints: Sequence[Checkpoint]) -> list[int]:
    """Every id that one of the models stops at, and those of Phi's stop tokens, if it has them.

    Raises:
        ArtifactError: a config that holds something else than ids.
    """
    found: dict[int, None] = {}
    for checkpoint in checkpoints:
        generation = checkpoint.folder / GENERATION
        configs = [read_json(generation)] if generation.is_file() else []
        for config in (*configs, checkpoint.config):
            ids = config.get("eos_token_id")
            for one in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not isinstance(one, int):
                    raise ArtifactError(f"{checkpoint.folder}: eos_token_id={ids!r} is no id")
                found[one] = None
    tokens = _tokens(checkpoints[0].folder)
    found |= {tokens[token]: None for token in STOP_TOKENS if token in tokens}
    return list(found)


def _exists(checkpoint: Checkpoint, name: str) -> bool:
    return (checkpoint.folder / name).is_file()


def _check_file(first: Path, other: Path) -> None:
    there = [path.is_file() for path in (first, other)]
    if not any(there):
        return
    if not all(there):
        has, lacks = (first, other) if there[0] else (other, first)
        raise ArtifactError(
            f"{lacks.parent}: no {lacks.name}, which {has.parent} has; if the tokenizers are the "
            "same, copy it"
        )
    if (raw := first.read_bytes()) == (theirs := other.read_bytes()):
        return
    fault = _difference(first, other) if first.name == TOKENIZER else "content"
    if fault or (first.name != TOKENIZER and raw != theirs):
        raise ArtifactError(
            f"{other.parent}: {other.name} differs from that of {first.parent} ({fault}); only "
            "models of one tokenizer can be merged"
        )


def _check_flags(first: Path, other: Path) -> None:
    paths = [folder / TOKENIZER_CONFIG for folder in (first, other)]
    ours, theirs = (read_json(path) if path.is_file() else {} for path in paths)
    for flag in FLAGS:
        if bool(ours.get(flag)) != bool(theirs.get(flag)):
            raise ArtifactError(
                f"{other}: {TOKENIZER_CONFIG} differs from that of {first} ({flag}); only models "
                "of one tokenizer can be merged"
            )


def _difference(first: Path, other: Path) -> str | None:
    """What two tokenizer.json tell differently; None: nothing that matters."""
    ours, theirs = _parts(first), _parts(other)
    for part in PARTS:
        if ours[part] != theirs[part]:
            return part.replace("model", "vocabulary or merges")
    return None


def _parts(path: Path) -> dict[str, Any]:
    content = read_json(path)
    parts = {part: content.get(part) for part in PARTS}
    if isinstance(model := parts["model"], dict):
        merges = model.get("merges") or []
        # Written as "a b" or as ["a", "b"], by version.
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in merges]
        parts["model"] = model | {"merges": pairs}
    if _moves_offsets_only(parts["post_processor"]):
        parts["post_processor"] = None
    return parts


def _moves_offsets_only(processor: Any) -> bool:
    return isinstance(processor, dict) and processor.get("type") == "ByteLevel"


def _tokens(folder: Path) -> dict[str, int]:
    """Ids by token; empty where there is no tokenizer.json."""
    if not (folder / TOKENIZER).is_file():
        return {}
    content = read_json(folder / TOKENIZER)
    try:
        vocab = content["model"]["vocab"]
        ids = (
            dict(vocab)
            if isinstance(vocab, dict)
            else {piece[0]: number for number, piece in enumerate(vocab)}
        )
        return ids | {one["content"]: one["id"] for one in content.get("added_tokens") or []}
    except (KeyError, TypeError, IndexError):
        raise ArtifactError(f"{folder / TOKENIZER}: has no vocabulary; fetch it again") from None


def _chat_template(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace").strip()
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    template = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    return template.strip() if isinstance(template, str) else json.dumps(template)

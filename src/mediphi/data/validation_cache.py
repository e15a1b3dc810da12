"""Validation sets made once: kept in the cache by the content of all that they are made from.

`<cache>/validation/<key>.json` holds the questions and a checksum. A file that is damaged is made
anew, and one that cannot be written is no fault.
"""

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from mediphi.config.validation import FileSet, Validation
from mediphi.data.fingerprint import FileHashes, fingerprint
from mediphi.data.refused_files import refuse_test_files
from mediphi.data.validation_sets import ValidationSet, build_sets
from mediphi.records import MultipleChoice

SETS_VERSION = 1
"""Raise it whenever the same documents or rows give other questions than before."""


def known_sets(validation: Validation, *, seed: int, cache: Path) -> list[ValidationSet]:
    """What `build_sets` would give, out of the cache where it is there.

    Sets of files alone are read as they are: that is quick.

    Raises:
        UserError, DataError: see `build_sets`.
    """
    corpus = validation.corpus
    if corpus is None or not validation.reads_documents:
        return build_sets(validation, seed=seed)
    refuse_test_files(validation)
    path = cache / "validation" / f"{_key(validation, seed, cache)}.json"
    if (known := _read(path)) is not None:
        return known
    sets = build_sets(validation, seed=seed)
    _write(path, sets)
    return sets


def _key(validation: Validation, seed: int, cache: Path) -> str:
    """32 hexadecimal digits of the sources' content, the settings and the code's versions."""
    corpus, hashes = validation.corpus, FileHashes(cache)
    assert corpus is not None
    facts = {
        "version": SETS_VERSION,
        "seed": seed,
        "settings": validation.model_dump(mode="json", exclude={"corpus"}),
        "corpus": fingerprint(corpus, cache=cache),
        "shown": {name: one.licence.may_be_shown for name, one in corpus.sources.items()},
        "files": {
            name: hashes.of(one.path)
            for name, one in validation.sets.items()
            if isinstance(one, FileSet)
        },
    }
    hashes.save()
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> list[ValidationSet] | None:
    """The sets of a file; None where there is none, or it is damaged."""
    try:
        stated, content = json.loads(path.read_bytes())
        if stated != sha256(content.encode()).hexdigest():
            return None
        return [_set(one) for one in json.loads(content)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _set(content: dict[str, Any]) -> ValidationSet:
    parts = {part: tuple(map(_question, content[part])) for part in ("search", "holdout")}
    return ValidationSet(content["name"], fingerprint=content["fingerprint"], **parts)


def _question(content: dict[str, Any]) -> MultipleChoice:
    options: list[str] = content.pop("options")
    return MultipleChoice(options=tuple(options), **content)


def _write(path: Path, sets: Sequence[ValidationSet]) -> None:
    """Staged beside its place and renamed, so a kill leaves nothing that looks finished."""
    content = json.dumps(
        [
            {
                "name": one.name,
                "search": [asdict(question) for question in one.search],
                "holdout": [asdict(question) for question in one.holdout],
                "fingerprint": one.fingerprint,
            }
            for one in sets
        ]
    )
    sealed = json.dumps([sha256(content.encode()).hexdigest(), content])
    staged = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_staged(path)
        try:
            staged.write_text(sealed, encoding="utf-8")
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


def _remove_staged(path: Path) -> None:
    """What processes of this host left that are no more."""
    for file in path.parent.glob(f".*.json.{socket.gethostname()}.*"):
        try:
            os.kill(int(file.name.rpartition(".")[2]), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue

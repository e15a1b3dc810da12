"""A corpus's fingerprint: changes with the data and with how they are read, not with the machine.

Files count by content and name, never by place or date. A hub dataset counts by id and revision:
pin the revision to a commit where the difference matters.
"""

import json
import os
import time
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from mediphi.config.corpus import Corpus, Source, UnavailableSource
from mediphi.data.bad_rows import BadRows, one_line
from mediphi.data.sources import unavailable
from mediphi.data.sources.files import find_files
from mediphi.errors import DataError

READERS_VERSION = 2
"""Raise it whenever a reader, the deduplication or the split gives other documents than before."""

_FORMAT_VERSIONS: dict[str, int] = {"messages": 2, "prompt_completion": 2, "preference": 2}
"""Raised instead where only rows of one format are read differently; without it: the first."""

_SETTINGS = {"on_bad", "max_bad_share", "heldout_fraction", "deduplicate"}
_NO_MATTER = {"licence", "weight", "path"}
_SETTLED_SECONDS = 2.0


def fingerprint(corpus: Corpus, *, cache: Path | None = None) -> str:
    """Hash everything that decides which documents and task outputs a corpus yields.

    Args:
        corpus: the config section.
        cache: folder for known file hashes; a file is read again only when its size or time
            changed.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: a file is missing or unreadable.
        UserError: a source is not to be had.
    """
    hashes = FileHashes(cache)
    settings = corpus.model_dump(mode="json", include=_SETTINGS)
    settings["deduplicate"]["near"] = corpus.drops_near_duplicates
    facts: dict[str, Any] = {"version": READERS_VERSION, **settings}
    facts["sources"] = {
        name: _source(source, name, hashes) for name, source in corpus.sources.items()
    }
    outputs = corpus.task_outputs
    facts["task_outputs"] = {"generator": outputs.generator, "kinds": corpus.task_kinds}
    if outputs.generator == "files" and outputs.path is not None:
        facts["task_outputs"]["files"] = hashes.of(outputs.path)
    hashes.save()
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _source(source: Source, name: str, hashes: "FileHashes") -> dict[str, Any]:
    if isinstance(source, UnavailableSource):
        unavailable.read(source, name=name, bad_rows=BadRows())
    facts = source.model_dump(mode="json", exclude=_NO_MATTER)
    layout = getattr(source, "format", None)
    if layout in _FORMAT_VERSIONS:
        facts["format_version"] = _FORMAT_VERSIONS[layout]
    path = getattr(source, "path", None)
    if path is not None:
        try:
            facts["files"] = hashes.of(path)
        except DataError as error:
            raise DataError(f"{error} (corpus.sources.{name}.path)") from None
    return facts


class FileHashes:
    """SHA-256 of files, remembered in a small JSON file by path, size and time."""

    def __init__(self, folder: Path | None) -> None:
        self._store = folder / "file_hashes.json" if folder is not None else None
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if self._store is not None and self._store.exists():
            self._known = _load(self._store)

    def of(self, path: str) -> list[tuple[str, str]]:
        """(name below `path`, hash) of every file that `path` names, sorted.

        Raises:
            DataError: missing or unreadable.
        """
        root = Path(path).expanduser()
        base = root if root.is_dir() else root.parent
        files = find_files(path, ("",), unique_keys=False)
        return [(os.path.relpath(file.path, base), self._of(file.path)) for file in files]

    def _of(self, path: Path) -> str:
        try:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            key = os.path.realpath(path)
            known = self._known.get(key)
            if known is not None and known[:2] == stamp:
                return known[2]
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(one_line(f"{path}: {error.strerror}")) from None
        # A file written a moment ago may change again within one tick of its clock.
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
            self._known[key] = [*stamp, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt, atomically. A cache that cannot be written is no fault."""
        if self._store is None or not self._changed:
            return
        staged = self._store.with_name(f"{self._store.name}.{os.getpid()}")
        try:
            self._store.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps(self._known))
            staged.replace(self._store)
        except OSError:
            with suppress(OSError):
                staged.unlink()


def _load(store: Path) -> dict[str, list[Any]]:
    """Known hashes; a damaged cache is an empty one."""
    try:
        known = json.loads(store.read_text())
        is_sound = all(len(k) == 3 and isinstance(k[2], str) for k in known.values())
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return known if is_sound else {}

"""Append batches of pieces to the files of a token store, hashing and counting on the way."""

import os
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mediphi.data.encoding import Encoded
from mediphi.data.packing import expand
from mediphi.data.tokens import (
    MAX_NAMES,
    PIECE,
    Count,
    StoredFile,
    StoreKey,
    StoreManifest,
    shard_name,
)
from mediphi.records import PIECE_KINDS

_CELLS = MAX_NAMES * len(PIECE_KINDS)


class Batch(NamedTuple):
    """Whole documents, flattened to pieces. `documents` count from the batch's first document.

    `prefixes` and `suffixes` are the token ids around each piece's text; `labels` are bytes, one
    per name of `LABELS` and document, indices into the store's label names.
    """

    ids: list[str]
    labels: list[bytes]
    texts: list[str]
    prefixes: list[tuple[int, ...]]
    suffixes: list[tuple[int, ...]]
    documents: list[int]
    kinds: list[int]
    sources: list[int]

    @classmethod
    def empty(cls) -> "Batch":
        return cls([], [], [], [], [], [], [], [])


class StoreWriter:
    """Appends batches to the files of a store and counts what it writes."""

    def __init__(self, folder: Path, *, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._num_documents = 0
        self._shards: list[int] = []
        self._table = np.zeros((3, _CELLS), dtype=np.int64)
        self._pieces = _HashedFile(folder / "pieces.bin")
        self._text = _HashedFile(folder / "documents.bin")
        self._ends = _HashedFile(folder / "document_ends.bin")
        self._labels = _HashedFile(folder / "labels.bin")
        self._files = [self._pieces, self._text, self._ends, self._labels]

    def write(self, batch: Batch, encoded: Encoded) -> None:
        """Append whole documents; a piece whose text has no ids and no prefix is left out."""
        kept = (encoded.lengths > 0) | (_lengths(batch.prefixes) > 0)
        prefixes = list(compress(batch.prefixes, kept))
        suffixes = list(compress(batch.suffixes, kept))
        before, after = _lengths(prefixes), _lengths(suffixes)
        lengths = before + encoded.lengths[kept] + after
        ends = np.cumsum(lengths)
        tokens = np.empty(int(lengths.sum()), dtype=self._dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        for starts, sizes, ids in (
            (ends - lengths, before, prefixes),
            (ends - after, after, suffixes),
        ):
            places = expand(starts, sizes)
            tokens[places] = np.fromiter(chain.from_iterable(ids), np.int64, len(places))
            is_text[places] = False
        tokens[is_text] = encoded.ids
        self._append_tokens(tokens)
        pieces = np.empty(len(lengths), dtype=PIECE)
        pieces["length"] = lengths
        pieces["document"] = np.array(batch.documents)[kept] + self._num_documents
        pieces["kind"] = np.array(batch.kinds)[kept]
        pieces["source"] = np.array(batch.sources)[kept]
        self._pieces.append(pieces.tobytes())
        names = [document_id.encode() for document_id in batch.ids]
        name_ends = np.cumsum([len(name) for name in names], dtype="<i8") + self._text.size
        self._text.append(b"".join(names))
        self._ends.append(name_ends.tobytes())
        self._labels.append(b"".join(batch.labels))
        self._num_documents += len(names)
        self._count(pieces, np.array([len(text) for text in batch.texts])[kept])

    def finish(
        self, key: StoreKey, *, sources: tuple[str, ...], labels: dict[str, tuple[str, ...]]
    ) -> StoreManifest:
        """Flush to the disk and describe what was written."""
        for file in self._files:
            file.close(sync=True)
        counts = _counts(self._table, sources)
        return StoreManifest(
            key=key,
            dtype=self._dtype.str,
            sources=sources,
            labels=labels,
            num_documents=self._num_documents,
            num_pieces=sum(count.pieces for count in counts),
            counts=counts,
            shards=tuple(self._shards),
            files=tuple(StoredFile(f.path.name, f.size, f.hash.hexdigest()) for f in self._files),
            versions={name: version(name) for name in ("numpy", "tokenizers")},
        )

    def close(self) -> None:
        """Close all files, finished or not."""
        for file in self._files:
            with suppress(OSError):
                file.close(sync=False)

    def _append_tokens(self, tokens: NDArray[Any]) -> None:
        if not self._shards or self._shards[-1] >= self._shard_tokens:
            self._files.append(_HashedFile(self._folder / shard_name(len(self._shards))))
            self._shards.append(0)
        self._files[-1].append(tokens.tobytes())
        self._shards[-1] += len(tokens)

    def _count(self, pieces: NDArray[np.void], characters: NDArray[np.int64]) -> None:
        cell = pieces["source"].astype(np.int64) * len(PIECE_KINDS) + pieces["kind"]
        for row, column in enumerate([None, pieces["length"], characters]):
            self._table[row] += np.bincount(cell, column, _CELLS).astype(np.int64)


class _HashedFile:
    """A file that is only appended to, with the hash of what went in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.hash = sha256()
        self._stream = path.open("wb", buffering=0)

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]
        self.hash.update(data)
        self.size += len(data)

    def close(self, *, sync: bool) -> None:
        if sync:
            os.fsync(self._stream.fileno())
        self._stream.close()


def _lengths(ids: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))


def _counts(table: NDArray[np.int64], sources: tuple[str, ...]) -> tuple[Count, ...]:
    cells = table.reshape(3, -1, len(PIECE_KINDS))
    return tuple(
        Count(source, kind, *(int(n) for n in cells[:, i, j]))
        for i, source in enumerate(sources)
        for j, kind in enumerate(PIECE_KINDS)
        if cells[0, i, j]
    )

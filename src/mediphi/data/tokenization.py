"""Tokenise a corpus once: documents in, a finished token store out.

Reading and rendering run in a thread, encoding in this process or in workers, writing here. Memory
is bounded by a few batches. The store is built beside its place and renamed, so a killed build
leaves nothing that looks finished.
"""

import errno
import os
import shutil
import socket
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mediphi.data.encoding import Encoded, Encoder, make_encoder, plain_text_json
from mediphi.data.prefetch import ahead
from mediphi.data.render import Piece, Rendered
from mediphi.data.store_writer import Batch, StoreWriter
from mediphi.data.tokens import (
    MANIFEST,
    MAX_NAMES,
    StoreKey,
    StoreManifest,
    TokenStore,
    open_store,
    store_path,
    write_manifest,
)
from mediphi.errors import DataError, MachineError
from mediphi.records import LABELS, PIECE_KINDS

_BATCH_CHARACTERS = 2_000_000
_SHARD_TOKENS = 128 * 2**20
_KIND_IDS = {kind: index for index, kind in enumerate(PIECE_KINDS)}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def build_store(
    documents: Iterable[Rendered],
    *,
    cache: Path,
    tokenizer: Any,
    key: StoreKey,
    num_workers: int = 0,
    shard_tokens: int = _SHARD_TOKENS,
) -> TokenStore:
    """The store of `key`: opened and checked when it exists, else built from `documents`.

    Args:
        documents: read only when the store has to be built. Pieces without text and prefix are
            left out, documents without any piece too.
        tokenizer: `tokenizers.Tokenizer` or a transformers fast tokenizer.
        num_workers: processes that encode; 0 encodes in this one.
        shard_tokens: a shard is closed after the batch that reaches this size.

    Raises:
        ArtifactError: a store of this key exists and is damaged.
        DataError: more than 255 sources or values of a label.
        MachineError: the disk is full.
    """
    path = store_path(cache, key)
    if path.exists():
        return open_store(path, check_hashes=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        writer = _writer(temporary, tokenizer=tokenizer, key=key, shard_tokens=shard_tokens)
        plain_json = plain_text_json(tokenizer)
        manifest = _write(
            documents, writer=writer, plain_json=plain_json, num_workers=num_workers, key=key
        )
        write_manifest(temporary, manifest)
        _publish(temporary, path)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(path) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_store(path)


def _writer(folder: Path, *, tokenizer: Any, key: StoreKey, shard_tokens: int) -> StoreWriter:
    largest = max(*tokenizer.get_vocab().values(), key.eos_id)
    dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
    return StoreWriter(folder, dtype=dtype, shard_tokens=shard_tokens)


def _write(
    documents: Iterable[Rendered],
    *,
    writer: StoreWriter,
    plain_json: str,
    num_workers: int,
    key: StoreKey,
) -> StoreManifest:
    batching = _Batching(key.eos_id)
    encode = _encode_here if num_workers == 0 else partial(_encode_in_workers, num=num_workers)
    batches = encode(batching.batches(documents), plain_json)
    try:
        for batch, encoded in batches:
            writer.write(batch, encoded)
        labels = {name: tuple(values) for name, values in batching.labels.items()}
        return writer.finish(key, sources=tuple(batching.sources), labels=labels)
    finally:
        writer.close()
        batches.close()


class _Batching:
    """Groups documents up to some characters.

    `sources` and `labels` learn the names in order of appearance.
    """

    def __init__(self, eos_id: int) -> None:
        self.sources: dict[str, int] = {}
        self.labels: dict[str, dict[str, int]] = {name: {"": 0} for name in LABELS}
        self._end = (eos_id,)

    def batches(self, documents: Iterable[Rendered]) -> Iterator[Batch]:
        batch, characters = Batch.empty(), 0
        for document in documents:
            kept = [piece for piece in document.pieces if piece.text or piece.prefix]
            if not kept:
                continue
            # The document is the last of its pieces.
            self._add(batch, document, sorted(kept, key=lambda piece: piece.kind == "document"))
            characters += sum(len(piece.text) for piece in kept)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = Batch.empty(), 0
        if batch.ids:
            yield batch

    def _add(self, batch: Batch, document: Rendered, pieces: list[Piece]) -> None:
        source_id = _index(self.sources, document.source, "sources")
        for piece in pieces:
            batch.texts.append(piece.text)
            batch.prefixes.append(piece.prefix)
            batch.suffixes.append(self._end if piece.suffix is None else piece.suffix)
            batch.documents.append(len(batch.ids))
            batch.kinds.append(_KIND_IDS[piece.kind])
            batch.sources.append(source_id)
        values = ((name, document.labels.get(name, "")) for name in LABELS)
        batch.labels.append(bytes(_index(self.labels[n], v, f"values of {n}") for n, v in values))
        batch.ids.append(document.id)


def _index(known: dict[str, int], name: str, what: str) -> int:
    index = known.setdefault(name, len(known))
    if index >= MAX_NAMES:
        raise DataError(f"corpus: more than {MAX_NAMES} {what}; merge some of them")
    return index


def _encode_here(
    batches: Iterable[Batch], plain_json: str
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Reading and splitting in a thread, looking words up here: both mostly without the GIL."""
    encoder = make_encoder(plain_json)
    split = ahead(((batch, encoder.split(batch.texts)) for batch in batches), depth=2)
    try:
        for batch, words in split:
            yield batch, encoder.look_up(words)
    finally:
        split.close()


def _encode_in_workers(
    batches: Iterable[Batch], plain_json: str, *, num: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    read = ahead(batches, depth=2)
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    with (
        closing(read),
        ProcessPoolExecutor(
            num, get_context("spawn"), initializer=_start_worker, initargs=(plain_json,)
        ) as pool,
    ):
        for batch in read:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.texts)))
            if len(waiting) > num:
                done, encoded = waiting.popleft()
                yield done, encoded.result()
        for done, encoded in waiting:
            yield done, encoded.result()


_worker_encoder: Encoder | None = None


def _start_worker(plain_json: str) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    _worker_encoder = make_encoder(plain_json)


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode(texts)


def _publish(temporary: Path, path: Path) -> None:
    """Rename into place; when another builder was first, its store is as good as ours."""
    for name in (MANIFEST, "."):
        _sync(temporary / name)
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove what dead builders of this machine left beside `path`."""
    for left in path.parent.glob(f".*.{socket.gethostname()}.*.*"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _disk_full(path: Path) -> MachineError:
    free = shutil.disk_usage(path.parent).free
    return MachineError(
        f"{path}: disk full while writing the token store ({free:,} bytes free); "
        "free some space or set paths.cache to another disk"
    )

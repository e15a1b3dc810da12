"""The token store: a corpus tokenised once, in memory-mapped shards addressed by content.

`<cache>/tokens/<key>/` holds `tokens-00000.bin` ... (uint16, or uint32 above 65,536 ids),
`pieces.bin` (one `PIECE` row per piece, in token order), `documents.bin` with `document_ends.bin`
(the ids, UTF-8 end to end), `labels.bin` (one byte per document and name of `LABELS`) and
`store.json` (counts, hashes, versions). A document's pieces lie next to each other: task outputs
first and the document last, each ending with EOS; or the parts of a conversation, in order.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mediphi.errors import ArtifactError
from mediphi.records import LABELS, PIECE_KINDS

FORMAT = 2
MANIFEST = "store.json"
MAX_NAMES = 255
PIECE = np.dtype([("length", "<u4"), ("document", "<u4"), ("kind", "u1"), ("source", "u1")])


class StoreKey(NamedTuple):
    """All that decides the content of a store.

    Attributes:
        tokenizer: `encoding.tokenizer_sha256`.
        render: version of the rendering code.
        data: fingerprint of the documents and task outputs.
        split: name of the split.
        eos_id: id that ends every piece of plain text.
    """

    tokenizer: str
    render: str
    data: str
    split: str
    eos_id: int

    @property
    def digest(self) -> str:
        parts = json.dumps([FORMAT, PIECE_KINDS, LABELS, *self], separators=(",", ":"))
        return sha256(parts.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Count:
    """Size of one source and kind."""

    source: str
    kind: str
    pieces: int
    tokens: int
    characters: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoreManifest:
    """What `store.json` says.

    Attributes:
        labels: for each of `LABELS` the values that occur; the first is "" (the row has none).
        shards: tokens per shard file.
    """

    key: StoreKey
    dtype: str
    sources: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    num_documents: int
    num_pieces: int
    counts: tuple[Count, ...]
    shards: tuple[int, ...]
    files: tuple[StoredFile, ...]
    versions: dict[str, str]

    @property
    def num_tokens(self) -> int:
        return sum(self.shards)

    @property
    def num_characters(self) -> int:
        return sum(count.characters for count in self.counts)


class TokenStore:
    """A finished store, opened for reading. Addresses count tokens over all shards."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.shard_starts = np.concatenate([[0], np.cumsum(manifest.shards)]).astype(np.int64)

    @property
    def eos_id(self) -> int:
        return self.manifest.key.eos_id

    @property
    def sources(self) -> tuple[str, ...]:
        return self.manifest.sources

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @cached_property
    def pieces(self) -> NDArray[np.void]:
        """Structured `PIECE` rows `[pieces]`, in token order."""
        return self._map("pieces.bin", PIECE)

    @cached_property
    def piece_starts(self) -> NDArray[np.int64]:
        """Address of every piece, and the end of the last: int64 `[pieces + 1]`."""
        return np.concatenate([[0], np.cumsum(self.pieces["length"], dtype=np.int64)])

    @cached_property
    def piece_kinds(self) -> NDArray[np.uint8]:
        """Index into `PIECE_KINDS` of every piece, uint8 `[pieces]`."""
        return np.ascontiguousarray(self.pieces["kind"])

    @cached_property
    def piece_sources(self) -> NDArray[np.uint8]:
        """Index into `sources` of every piece, uint8 `[pieces]`."""
        return np.ascontiguousarray(self.pieces["source"])

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """Index into `manifest.labels` of every document, uint8 `[documents, LABELS]`."""
        return self._map("labels.bin", np.dtype("u1")).reshape(-1, len(LABELS))

    def gather(self, address: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids at the given addresses, int64, same shape."""
        if len(self._shards) == 1:
            return self._shards[0][address].astype(np.int64)
        ids = np.empty(len(address), dtype=np.int64)
        shard = np.searchsorted(self.shard_starts, address, side="right") - 1
        for index in np.unique(shard):
            here = shard == index
            ids[here] = self._shards[index][address[here] - self.shard_starts[index]]
        return ids

    def documents_per_source(self, rows: NDArray[np.int64] | None = None) -> dict[str, int]:
        """How many documents each of `sources` has; of these `rows` only, where they are given."""
        documents = self.pieces["document"].astype(np.int64)
        is_first = np.diff(documents, prepend=-1) > 0
        if rows is not None:
            is_first &= np.isin(documents, rows)
        counts = np.bincount(self.piece_sources[is_first], minlength=len(self.sources))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def document_id(self, row: int) -> str:
        """Id of the document in this row."""
        start = int(self._document_ends[row - 1]) if row else 0
        return bytes(self._document_text[start : int(self._document_ends[row])]).decode()

    @cached_property
    def _shards(self) -> list[NDArray[Any]]:
        dtype = np.dtype(self.manifest.dtype)
        return [self._map(shard_name(i), dtype) for i in range(len(self.manifest.shards))]

    @cached_property
    def _document_ends(self) -> NDArray[np.int64]:
        return self._map("document_ends.bin", np.dtype("<i8"))

    @cached_property
    def _document_text(self) -> NDArray[np.uint8]:
        return self._map("documents.bin", np.dtype("u1"))

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        path = self.path / name
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")


def shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


def store_path(cache: Path, key: StoreKey) -> Path:
    return cache / "tokens" / key.digest


def open_store(path: Path, *, check_hashes: bool = False) -> TokenStore:
    """Open a finished store; sizes are always checked, hashes on demand (1 to 2 GB/s).

    Raises:
        ArtifactError: a file is missing, truncated, changed or foreign.
    """
    manifest = read_manifest(path)
    for file in manifest.files:
        _check_file(path, file, check_hash=check_hashes)
    return TokenStore(path, manifest)


def read_manifest(path: Path) -> StoreManifest:
    try:
        sealed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        content = sealed["content"]
        if sealed["sha256"] != _sha256(content) or content["format"] != FORMAT:
            raise ValueError("checksum or format differs")
        return StoreManifest(
            key=StoreKey(**content["key"]),
            dtype=content["dtype"],
            sources=tuple(content["sources"]),
            labels={name: tuple(values) for name, values in content["labels"].items()},
            num_documents=content["num_documents"],
            num_pieces=content["num_pieces"],
            counts=tuple(Count(**count) for count in content["counts"]),
            shards=tuple(content["shards"]),
            files=tuple(StoredFile(**file) for file in content["files"]),
            versions=content["versions"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, MANIFEST, f"unreadable ({type(error).__name__})") from error


def write_manifest(path: Path, manifest: StoreManifest) -> None:
    content = {**asdict(manifest), "format": FORMAT, "key": manifest.key._asdict()}
    content["num_tokens"] = manifest.num_tokens
    content["num_characters"] = manifest.num_characters
    content = json.loads(json.dumps(content))
    sealed = {"content": content, "sha256": _sha256(content)}
    (path / MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def damaged(path: Path, name: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path / name}: damaged token store: {why}; delete the folder {path}, it will be rebuilt"
    )


def _check_file(path: Path, file: StoredFile, *, check_hash: bool) -> None:
    try:
        size = (path / file.name).stat().st_size
    except OSError as error:
        raise damaged(path, file.name, "file is missing") from error
    if size != file.bytes:
        raise damaged(path, file.name, f"{size} bytes instead of {file.bytes}")
    if check_hash and _file_sha256(path / file.name) != file.sha256:
        raise damaged(path, file.name, "content changed (sha256 differs)")


def _file_sha256(path: Path) -> str:
    from hashlib import file_digest

    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _sha256(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Text to token ids, each distinct word only once.

In a SentencePiece-like BPE (Llama, Phi-3) no token holds a space after a letter or a newline after
anything. Then no merge crosses such a place, so words can be encoded apart and remembered. The
vocabulary proves it; where it does not, whole texts go through the library.

Text is plain: a control token such as `<|end|>` spelled in a document stays ordinary text.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from mediphi.data.packing import expand

MARK = "▁"
_CROSSING = re.compile(rf"[^{MARK}\0]{MARK}|[^\0]\n")
_NORMALIZERS = [
    {"type": "Prepend", "prepend": MARK},
    {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD_SPLITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in (r"\d|\n", rf"{MARK}*[^{MARK}\d\n]*")
    ],
}
"""The tiny model's pre-tokenizer: it cuts wherever a word or line starts, and more often."""
_MAX_WORDS = 1 << 20
_JOINED_WORDS = 1000


class Encoded(NamedTuple):
    """Ids of several texts end to end.

    Attributes:
        ids: uint32 `[tokens]`.
        lengths: int64 `[texts]`, tokens of each text.
    """

    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]


class Words(NamedTuple):
    """Texts as words.

    Attributes:
        different: each word once, UTF-8.
        index: int32 `[words]`, which of `different`.
        stops: int64 `[texts + 1]`, words before each text.
    """

    different: pa.LargeBinaryArray
    index: NDArray[np.int32]
    stops: NDArray[np.int64]


class Encoder(Protocol):
    """`encode` is `look_up` of `split`; `split` may run ahead in another thread."""

    def split(self, texts: Sequence[str]) -> Any: ...
    def look_up(self, words: Any) -> Encoded: ...
    def encode(self, texts: Sequence[str]) -> Encoded: ...


def plain_text_json(tokenizer: Any) -> str:
    """The tokenizer's own JSON without control tokens, template, truncation and padding.

    Accepts a `tokenizers.Tokenizer` or a transformers fast tokenizer. It decides the ids, so its
    hash is the tokenizer's identity for the token store.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    return _plain_text_json(backend.to_str())


@lru_cache(maxsize=2)
def _plain_text_json(full_json: str) -> str:
    spec = json.loads(full_json)
    spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return json.dumps(spec, sort_keys=True, ensure_ascii=False)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identity of the mapping from plain text to ids."""
    return sha256(plain_text_json(tokenizer).encode()).hexdigest()


def make_encoder(plain_json: str) -> Encoder:
    """The fastest encoder that gives exactly the ids of this tokenizer (`plain_text_json`)."""
    spec = json.loads(plain_json)
    library = Tokenizer.from_str(plain_json)
    if splits_at_words(spec):
        return WordEncoder(library, num_bytes=_bytes_per_id(spec["model"]["vocab"]))
    return TextEncoder(library)


def splits_at_words(spec: dict[str, Any]) -> bool:
    """True when the vocabulary proves that no merge crosses the start of a word or line.

    Args:
        spec: parsed tokenizer JSON.
    """
    model = spec["model"]
    plain_bpe = (
        model["type"] == "BPE"
        and model.get("byte_fallback")
        and not any(
            model.get(name)
            for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and not model.get("ignore_merges")
    )
    normalizer = spec.get("normalizer") or {}
    if not plain_bpe or spec.get("pre_tokenizer") not in (None, _WORD_SPLITS):
        return False
    if normalizer.get("type") != "Sequence" or normalizer.get("normalizers") != _NORMALIZERS:
        return False
    if any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256)):
        return False
    merged = ("".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    return not _CROSSING.search("\0".join(merged).replace(" ", ""))


class TextEncoder:
    """Whole texts through the library, in parallel over cores."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; an empty one has no ids."""
        return self.look_up(self.split(texts))

    def split(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def look_up(self, words: list[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return _flat([encoding.ids for encoding in encodings])


class WordEncoder:
    """Remembers the ids of words; only new ones go through the library.

    About a million words are remembered (some 200 MB), then it starts afresh. New words go through
    the library joined by newlines, because it spends more on a text than on a word; bytes tell
    whose ids are whose, since byte fallback loses none.
    """

    def __init__(self, tokenizer: Tokenizer, *, num_bytes: NDArray[np.int64]) -> None:
        """Takes the tokenizer over; `num_bytes` is the UTF-8 size of each id's text."""
        tokenizer.normalizer = normalizers.Sequence([])  # words come normalised
        self._library = TextEncoder(tokenizer)
        self._num_bytes = num_bytes
        self._forget()

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; an empty one has no ids."""
        return self.look_up(self.split(texts))

    def split(self, texts: Sequence[str]) -> Words:
        return _split(texts)

    def look_up(self, words: Words) -> Encoded:
        if len(self._rows) > _MAX_WORDS:
            self._forget()
        known = map(self._rows.__getitem__, words.different.to_pylist())
        rows = np.fromiter(known, dtype=np.int64, count=len(words.different))
        self._learn()
        rows = rows[words.index]
        lengths = self._lengths[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return Encoded(self._ids[expand(self._starts[rows], lengths)], np.diff(ends[words.stops]))

    def _forget(self) -> None:
        self._rows = _Rows()
        self._ids = np.empty(0, dtype=np.uint32)
        self._starts = np.empty(0, dtype=np.int64)
        self._lengths = np.empty(0, dtype=np.int64)

    def _learn(self) -> None:
        new = [word.decode().replace(" ", MARK) for word in self._rows.take_new()]
        if not new:
            return
        firsts = range(0, len(new), _JOINED_WORDS)
        joined = ["\n".join([*new[first : first + _JOINED_WORDS], ""]) for first in firsts]
        ids = self._library.encode(joined).ids
        word_ends = np.cumsum([len(word.encode()) + 1 for word in new]) - 1
        last = np.searchsorted(np.cumsum(self._num_bytes[ids]), word_ends)
        before = np.append(-2, last[:-1])  # of the word before; its newline follows
        lengths = last - before - 1
        starts = len(self._ids) + before + 2
        self._ids = np.concatenate([self._ids, ids])
        self._starts = np.concatenate([self._starts, starts])
        self._lengths = np.concatenate([self._lengths, lengths])


class _Rows(dict[bytes, int]):
    """Word -> row; a word asked for the first time gets the next row."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[bytes] = []

    def __missing__(self, word: bytes) -> int:
        self._new.append(word)
        row = self[word] = len(self)
        return row

    def take_new(self) -> list[bytes]:
        new, self._new = self._new, []
        return new


def _split(texts: Sequence[str]) -> Words:
    """The words of all texts.

    A word is a run of blanks with what follows up to the next blank or newline, or a newline with
    what follows. The blank that the tokenizer prepends to a text is there, and `MARK` is a blank:
    the tokenizer makes no difference. Works on the bytes of all texts at once, since a Python
    string per word would cost five times as much.
    """
    parts = [(" " + text.replace(MARK, " ")).encode() if text else b"" for text in texts]
    joined = b"".join(parts)
    characters = np.frombuffer(joined, dtype=np.uint8)
    is_start = characters == ord(" ")
    is_start[1:] &= ~is_start[:-1]
    is_start |= characters == ord("\n")
    ends = np.cumsum([0, *map(len, parts)])
    is_start[ends[:-1][np.diff(ends) > 0]] = True
    starts = np.flatnonzero(is_start)
    offsets = pa.py_buffer(np.append(starts, len(joined)))
    words = pa.Array.from_buffers(
        pa.large_binary(), len(starts), [None, offsets, pa.py_buffer(joined)]
    )
    encoded = words.dictionary_encode()
    # Not `to_numpy`, which imports pandas: a third of a second.
    index = np.frombuffer(encoded.indices.buffers()[1], dtype=np.int32, count=len(starts))
    return Words(encoded.dictionary, index, np.searchsorted(starts, ends))


def _bytes_per_id(vocab: dict[str, int]) -> NDArray[np.int64]:
    """UTF-8 bytes of the text that an id stands for, int64 `[ids]`."""
    sizes = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, index in vocab.items():
        sizes[index] = 1 if _BYTE.fullmatch(token) else len(token.encode())
    return sizes


def _flat(ids: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    total = int(lengths.sum())
    return Encoded(np.fromiter(chain.from_iterable(ids), dtype=np.uint32, count=total), lengths)

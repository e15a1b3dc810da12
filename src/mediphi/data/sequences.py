"""How the pieces of a token store become the sequences that a plan packs."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mediphi.data.packing import Ints
from mediphi.data.tokens import TokenStore
from mediphi.errors import DataError
from mediphi.records import PIECE_KINDS, PieceKind

Layout = Literal["text", "chat", "pairs", "shared_pairs"]
"""How pieces become sequences.

`text`: every token but a chunk's first is a target; what is longer than a row is split.
`chat`: tokens of `learnt` kinds are targets; conversations stay whole.
`shared_pairs`: prompt, chosen and rejected, the prompt once.
`pairs`: prompt + chosen and prompt + rejected, two sequences side by side. The same pairs make up a
row as with a shared prompt, so that both layouts train alike; such a row holds more tokens.
What has to stay whole and does not fit into a row is left out and counted.
"""

CHAT_KINDS: tuple[PieceKind, ...] = ("system", "user", "context", "answer")
PAIR_KINDS: tuple[PieceKind, ...] = ("system", "user", "context", "chosen", "rejected")


class Sequences(NamedTuple):
    """One sequence per document: its chosen pieces, next to each other in the store.

    Attributes:
        address: int64 `[sequences]`, first token in the store.
        length: int64 `[sequences]`, tokens.
        document: int64 `[sequences]`, row in the store.
        source: uint8 `[sequences]`, index into the store's sources.
        reach: int64 `[sequences]`, positions that the model sees: less where answers share them.
        num_targets: int64 `[sequences]`, what the loss is divided by: targets, or 1 for a pair.
        parts: int64 `[sequences, 3]`, tokens of prompt, chosen and rejected; no rows without pairs.
    """

    address: Ints
    length: Ints
    document: Ints
    source: NDArray[np.uint8]
    reach: Ints
    num_targets: Ints
    parts: Ints

    def take(self, chosen: Ints | NDArray[np.bool_]) -> "Sequences":
        columns: list[Any] = [field[chosen] if len(field) else field for field in self]
        return Sequences(*columns)


NO_PARTS = np.empty((0, 3), dtype=np.int64)


def find_sequences(
    store: TokenStore,
    kinds: tuple[PieceKind, ...],
    *,
    layout: Layout,
    learnt: tuple[PieceKind, ...] = ("answer",),
) -> Sequences:
    """The chosen pieces of every document that has any.

    Raises:
        DataError: no document has any, or the chosen pieces of a document have others in between.
    """
    chosen = np.flatnonzero(_is_kind(store, kinds))
    if not len(chosen):
        raise DataError(f"{store.path}: no text of kinds {', '.join(kinds)} in the corpus")
    owner = store.pieces["document"][chosen].astype(np.int64)
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    last = np.append(first[1:], len(chosen)) - 1
    if np.any(chosen[last] - chosen[first] != last - first):
        raise DataError(f"{store.path}: kinds {', '.join(kinds)} are not next to each other")
    address = store.piece_starts[chosen[first]]
    length = store.piece_starts[chosen[last] + 1] - address
    plain = Sequences(
        address=address,
        length=length,
        document=owner[first],
        source=store.piece_sources[chosen[first]],
        reach=length,
        num_targets=length - 1,
        parts=NO_PARTS,
    )
    if layout == "chat":
        sizes = np.where(_is_kind(store, learnt), store.pieces["length"], 0)[chosen]
        targets = np.add.reduceat(sizes.astype(np.int64), first)
        # A sequence's first token is nobody's next.
        return plain._replace(num_targets=targets - (sizes[first] > 0))
    if layout == "text":
        return plain
    return _pairs(plain, store, last=chosen[last])


def _pairs(plain: Sequences, store: TokenStore, *, last: Ints) -> Sequences:
    """Both answers are a pair's last two pieces."""
    rejected = store.pieces["length"][last].astype(np.int64)
    chosen = store.pieces["length"][last - 1].astype(np.int64)
    prompt = plain.length - chosen - rejected
    return plain._replace(
        reach=prompt + np.maximum(chosen, rejected),
        num_targets=np.ones_like(prompt),
        parts=np.stack([prompt, chosen, rejected], axis=1),
    )


def _is_kind(store: TokenStore, kinds: tuple[PieceKind, ...]) -> NDArray[np.bool_]:
    return np.isin(store.piece_kinds, [PIECE_KINDS.index(kind) for kind in kinds])

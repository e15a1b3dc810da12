"""The plan of a training phase: which rows of tokens make up each optimizer step.

Everything is decided here, from the store, the settings and the seed. What an optimizer step holds
depends on `global_batch` alone; micro-batch and ranks only share it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mediphi.data.packing import Ints, Packing, expand, pack
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

CHAT_KINDS: tuple[PieceKind, ...] = ("system", "user", "answer")
PAIR_KINDS: tuple[PieceKind, ...] = ("system", "user", "context", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What decides a plan, apart from the store.

    Attributes:
        kinds: pieces to train on. PIT phase 1: all but `document`; phase 2: all; DAPT: `document`.
        layout: how pieces become sequences, see `Layout`.
        learnt: kinds whose tokens are targets, where `layout` is `chat`.
        capacity: tokens of a row.
        global_batch: rows of an optimizer step; a multiple of `micro_batch * world_size`.
        micro_batch: rows of one forward pass of one rank.
        world_size: ranks that share a step.
        epochs: visits of the corpus.
        seed: of the order.
        weights: visits per epoch of each source's documents; 1 where not named. 2: every document
            twice; 0.5: half of them in one epoch, the other half in the next.
        long_above: sequences longer than this never share a micro-batch with shorter ones
            (LongRoPE's `original_max_position_embeddings`); None: no such model.
        max_rows: the plan ends after so many rows.
        max_steps: the plan ends after so many optimizer steps.
    """

    kinds: tuple[PieceKind, ...]
    capacity: int
    global_batch: int
    layout: Layout = "text"
    learnt: tuple[PieceKind, ...] = ("answer",)
    micro_batch: int = 1
    world_size: int = 1
    epochs: int = 1
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    long_above: int | None = None
    max_rows: int | None = None
    max_steps: int | None = None


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


class Chunks(NamedTuple):
    """Runs of tokens of one micro-batch, int64 `[chunks]` each; `parts` as of `Sequences`."""

    address: Ints
    length: Ints
    document: Ints
    parts: Ints


NO_PARTS = np.empty((0, 3), dtype=np.int64)


class Position(NamedTuple):
    """How far a phase has come: epochs (with fraction), documents begun and tokens seen."""

    epoch: float
    documents: int
    tokens: int


class TrainingPlan:
    """Rows of a phase in training order, over all epochs.

    Attributes:
        sequences: what is packed.
        too_long: rows in the store of documents that had to stay whole and do not fit.

    Raises:
        DataError: the store holds no piece of the chosen kinds.
        ValueError: `global_batch` cannot be shared out evenly.
    """

    def __init__(self, store: TokenStore, settings: PlanSettings) -> None:
        self.store = store
        self.settings = settings
        self._pass_rows = settings.micro_batch * settings.world_size
        if settings.global_batch % self._pass_rows:
            raise ValueError(
                f"global_batch {settings.global_batch} is not a multiple of "
                f"micro_batch {settings.micro_batch} x world_size {settings.world_size}"
            )
        self.sequences, self.too_long = _fitting(store, settings)
        epochs = [self._pack_epoch(epoch) for epoch in range(settings.epochs)]
        self.epoch_row_ends = np.cumsum([0, *(epoch.num_rows for epoch in epochs)])
        self._set_rows(epochs)
        if not self.num_rows:
            raise DataError(f"{store.path}: the weights leave no document to train on")

    @property
    def num_rows(self) -> int:
        return len(self._is_long)

    @property
    def num_steps(self) -> int:
        return -(-self.num_rows // self.settings.global_batch)

    @property
    def num_tokens(self) -> int:
        return int(self._token_ends[-1])

    @property
    def num_targets(self) -> int:
        """What the losses of all steps are divided by: targets, or pairs."""
        return int(self._target_ends[-1])

    @property
    def tokens_per_epoch(self) -> float:
        return self.num_tokens / self.position(self.num_steps).epoch

    @property
    def fill(self) -> float:
        """Packing efficiency: share of the rows' capacity that holds tokens."""
        return self.num_tokens / (self.num_rows * self.settings.capacity)

    @cached_property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step and rank, the same for every step and rank.

        One more than `global_batch / (micro_batch * world_size)` when steps mix long and short
        rows, because a micro-batch never does.
        """
        is_long = np.zeros(self.num_steps * self.settings.global_batch, dtype=np.int64)
        is_long[: self.num_rows] = self._is_long
        num_long = is_long.reshape(self.num_steps, -1).sum(axis=1)
        num_rows = np.diff(np.append(self._first_row(np.arange(self.num_steps)), self.num_rows))
        size = self.settings.micro_batch
        groups = -(-num_long // size) - (-(num_rows - num_long) // size)
        needed = -(-int(groups.max()) // self.settings.world_size)
        return max(needed, self.settings.global_batch // self._pass_rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what every optimizer step holds; micro-batch and ranks don't change it."""
        digest = sha256(f"{self.store.manifest.key.digest} {self.settings.global_batch}".encode())
        for array in (self.sequences.address, self._row_ends, self._sequence, self._start):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digest.update(self._length.view(np.uint8).data)
        return digest.hexdigest()[:32]

    def num_global_targets(self, step: int) -> int:
        """Targets, or pairs, of the optimizer step, over all micro-batches and ranks."""
        first, stop = self._step_rows(step)
        return int(self._target_ends[stop] - self._target_ends[first])

    def micro_batch(self, step: int, *, index: int, rank: int) -> Ints:
        """Rows of one forward pass, int64 `[0..micro_batch]`; empty where nothing is left.

        Short rows of the step come first, long ones after them, in groups that never mix.
        """
        rows = np.arange(*self._step_rows(step))
        is_long = self._is_long[rows]
        size = self.settings.micro_batch
        group = index * self.settings.world_size + rank
        for part in (rows[~is_long], rows[is_long]):
            num_groups = -(-len(part) // size)
            if group < num_groups:
                return part[group * size : (group + 1) * size]
            group -= num_groups
        return rows[:0]

    def chunks(self, rows: Ints) -> Chunks:
        """The token runs of these rows, in order."""
        index = expand(self._row_ends[rows], self._row_ends[rows + 1] - self._row_ends[rows])
        sequence = self._sequence[index]
        return Chunks(
            address=self.sequences.address[sequence] + self._start[index],
            length=self._length[index].astype(np.int64),
            document=self.sequences.document[sequence],
            parts=self.sequences.parts[sequence] if len(self.sequences.parts) else NO_PARTS,
        )

    def position(self, step: int) -> Position:
        """Where training stands after so many optimizer steps."""
        row = min(int(self._first_row(np.array(step))), self.num_rows)
        ends = self.epoch_row_ends
        epoch = min(int(np.searchsorted(ends, row, side="right")) - 1, self.settings.epochs - 1)
        done = (row - ends[epoch]) / max(1, ends[epoch + 1] - ends[epoch])
        return Position(
            epoch + float(done), int(self._document_ends[row]), int(self._token_ends[row])
        )

    def _first_row(self, step: Ints) -> Ints:
        return step * self.settings.global_batch

    def _step_rows(self, step: int) -> tuple[int, int]:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan of {self.num_steps}")
        first = step * self.settings.global_batch
        return first, min(first + self.settings.global_batch, self.num_rows)

    def _pack_epoch(self, epoch: int) -> Packing:
        """Rows of one epoch in training order; `sequence` counts the plan's sequences."""
        rng = np.random.default_rng([self.settings.seed, epoch, 1])
        chosen = rng.permutation(self._choose(epoch))
        packing = pack(
            self.sequences.length[chosen],
            capacity=self.settings.capacity,
            long_above=self.settings.long_above,
            reach=self.sequences.reach[chosen],
        )
        order = rng.permutation(packing.num_rows)
        counts = np.diff(packing.row_ends)[order]
        index = expand(packing.row_ends[:-1][order], counts)
        return packing._replace(
            sequence=chosen[packing.sequence[index]],
            start=packing.start[index],
            length=packing.length[index],
            row_ends=np.concatenate([[0], np.cumsum(counts)]),
            is_long=packing.is_long[order],
        )

    def _choose(self, epoch: int) -> Ints:
        """Sequences of an epoch, with repeats.

        Each source is an endless round over one seeded permutation; an epoch takes the next
        `weight * n`. So weight 0.5 sees all documents in two epochs, none twice.
        """
        chosen = []
        for source, name in enumerate(self.store.sources):
            members = np.flatnonzero(self.sequences.source == source)
            if not len(members):
                continue
            rng = np.random.default_rng([self.settings.seed, source, 0])
            round_ = rng.permutation(members)
            wanted = self.settings.weights.get(name, 1.0) * len(members)
            turn = np.arange(round(epoch * wanted), round((epoch + 1) * wanted))
            chosen.append(round_[turn % len(members)])
        return np.concatenate(chosen)

    def _set_rows(self, epochs: list[Packing]) -> None:
        limit = int(self.epoch_row_ends[-1])
        if self.settings.max_rows is not None:
            limit = min(limit, self.settings.max_rows)
        if self.settings.max_steps is not None:
            limit = min(limit, self.settings.max_steps * self.settings.global_batch)
        counts = np.concatenate([np.diff(epoch.row_ends) for epoch in epochs])[:limit]
        self._row_ends = np.concatenate([[0], np.cumsum(counts)])
        kept = int(self._row_ends[-1])
        self._is_long = np.concatenate([epoch.is_long for epoch in epochs])[:limit]
        self._sequence = _joined([epoch.sequence for epoch in epochs], kept)
        self._start = _joined([epoch.start for epoch in epochs], kept)
        self._length = _joined([epoch.length for epoch in epochs], kept)
        tokens = np.concatenate([[0], np.cumsum(self._length, dtype=np.int64)])
        self._token_ends = tokens[self._row_ends]
        if self.settings.layout == "text":
            self._target_ends = self._token_ends - self._row_ends  # all but a chunk's first
        else:
            targets = self.sequences.num_targets[self._sequence]
            self._target_ends = np.concatenate([[0], np.cumsum(targets)])[self._row_ends]
        self._document_ends = np.concatenate([[0], np.cumsum(self._start == 0)])[self._row_ends]


def once_through(store: TokenStore, settings: PlanSettings) -> TrainingPlan:
    """Every sequence of a store once, in rows and layout of `settings`, whatever training takes."""
    rows = settings.micro_batch * settings.world_size
    once = replace(settings, global_batch=rows, epochs=1, seed=0, weights={})
    return TrainingPlan(store, replace(once, max_rows=None, max_steps=None))


def _fitting(store: TokenStore, settings: PlanSettings) -> tuple[Sequences, Ints]:
    """The sequences that can be trained on, and the documents of those that are too long."""
    found = find_sequences(store, settings)
    if settings.layout == "text":
        return found, found.document[:0]
    fits = found.length <= settings.capacity
    if not fits.any():
        raise DataError(
            f"{store.path}: no conversation fits into stage.max_length={settings.capacity} tokens; "
            f"the shortest has {int(found.length.min())}"
        )
    return found.take(fits), found.document[~fits]


def find_sequences(store: TokenStore, settings: PlanSettings) -> Sequences:
    """The chosen pieces of every document that has any.

    Raises:
        DataError: no document has any, or the chosen pieces of a document have others in between.
    """
    kinds = settings.kinds
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
    if settings.layout == "chat":
        learnt = np.where(_is_kind(store, settings.learnt), store.pieces["length"], 0)[chosen]
        targets = np.add.reduceat(learnt.astype(np.int64), first)
        # A sequence's first token is nobody's next.
        return plain._replace(num_targets=targets - (learnt[first] > 0))
    if settings.layout == "text":
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


def _joined(parts: list[Ints], count: int) -> NDArray[np.uint32]:
    """Half the memory: a plan may hold tens of millions of chunks."""
    return np.concatenate([part.astype(np.uint32) for part in parts])[:count]

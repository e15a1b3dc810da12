"""The plan of a training phase: which rows of tokens make up each optimizer step.

Everything is decided here, from the store, the settings and the seed. What an optimizer step holds
depends on `global_batch` alone; micro-batch and ranks only share it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mediphi.data.packing import Ints, Packing, expand, pack
from mediphi.data.sequences import NO_PARTS, Layout, Sequences, find_sequences
from mediphi.data.tokens import TokenStore
from mediphi.errors import DataError
from mediphi.records import PieceKind


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


class Chunks(NamedTuple):
    """Runs of tokens of one micro-batch, int64 `[chunks]` each; `parts` as of `Sequences`."""

    address: Ints
    length: Ints
    document: Ints
    parts: Ints


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
    def max_tokens(self) -> int:
        """Tokens of a micro-batch at most: of full rows, or of the longest that hold prompts twice.

        The capacity counts a prompt once.
        """
        if self.settings.layout != "pairs":
            return self.settings.micro_batch * self.settings.capacity
        prompts = np.concatenate([[0], np.cumsum(self.sequences.parts[self._sequence, 0])])
        row_tokens = np.diff(self._token_ends + prompts[self._row_ends])
        return self.settings.micro_batch * int(row_tokens.max())

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
    found = find_sequences(store, settings.kinds, layout=settings.layout, learnt=settings.learnt)
    if settings.layout == "text":
        return found, found.document[:0]
    fits = found.length <= settings.capacity
    if not fits.any():
        side = "held-out" if store.manifest.key.split == "heldout" else "training"
        noun = "conversation" if settings.layout == "chat" else "pair"
        raise DataError(
            f"no {side} {noun} fits into stage.max_length={settings.capacity} tokens; the shortest "
            f"has {int(found.length.min())}: raise it or shorten the texts"
        )
    return found.take(fits), found.document[~fits]


def _joined(parts: list[Ints], count: int) -> NDArray[np.uint32]:
    """Half the memory: a plan may hold tens of millions of chunks."""
    return np.concatenate([part.astype(np.uint32) for part in parts])[:count]

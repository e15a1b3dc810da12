"""Which of a source's rows `max_documents` keeps. Nothing depends on the order of the rows."""

import math
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from typing import TypeVar

import numpy as np

from mediphi.config.corpus import RowSource, Source
from mediphi.errors import UserError
from mediphi.records import Document, Record

Stratum = tuple[str, ...]
Key = TypeVar("Key", bound=Hashable)


def hash_number(purpose: str, key: str) -> int:
    """A number below 2^64 that depends on nothing but the words."""
    return int.from_bytes(sha256(f"{purpose}\0{key}".encode()).digest()[:8], "big")


def choose(
    ids: Sequence[str],
    max_documents: int,
    *,
    qualities: Sequence[float] | None = None,
    strata: Sequence[Stratum] | None = None,
) -> list[int]:
    """Numbers of the rows to keep, ascending: the best by quality, or the smallest hashes of ids.

    Args:
        ids: of all rows.
        max_documents: how many to keep.
        qualities: a score per row, higher is better, NaN the lowest; ties go by hash.
        strata: what the rows are shared out evenly over, see `fill`; ties of strata go by hash.
    """
    hashes = np.fromiter((hash_number("choose", key) for key in ids), np.uint64, len(ids))
    order = np.argsort(hashes, kind="stable")
    if qualities is not None:
        # NaN sorts behind all numbers.
        order = order[np.argsort(-np.asarray(qualities)[order], kind="stable")]
    if strata is None:
        return sorted(order[:max_documents].tolist())
    members: dict[Stratum, list[int]] = {}
    for number in order.tolist():
        members.setdefault(strata[number], []).append(number)
    by_hash = sorted(members, key=lambda stratum: hash_number("stratum", "\0".join(stratum)))
    quotas = fill({stratum: len(members[stratum]) for stratum in by_hash}, max_documents)
    return sorted(chain.from_iterable(members[key][:quota] for key, quota in quotas.items()))


def fill(sizes: Mapping[Key, int], total: int) -> dict[Key, int]:
    """Share `total` out as evenly as the sizes allow (water-filling, max-min fair).

    What a small stratum cannot take goes to the others in equal parts, the remainder one by one to
    the first of them in the order of `sizes`.
    """
    quotas: dict[Key, int] = {}
    left, waiting = min(total, sum(sizes.values())), dict(sizes)
    while waiting:
        level = left // len(waiting)
        small = {key: size for key, size in waiting.items() if size <= level}
        if not small:
            extra = left - level * len(waiting)
            quotas |= {key: level + (place < extra) for place, key in enumerate(waiting)}
            break
        quotas |= small
        left -= sum(small.values())
        waiting = {key: size for key, size in waiting.items() if key not in small}
    return quotas


class Candidates:
    """What the choice among one source's records needs to know of each, where there is a choice."""

    def __init__(self, name: str, source: Source) -> None:
        """Args: source: its `max_documents`, `choose_by` and `stratify_by` decide."""
        self._key = f"corpus.sources.{name}"
        self._limit = source.max_documents
        self._by_quality = isinstance(source, RowSource) and source.choose_by == "quality"
        self._stratify_by = source.stratify_by if isinstance(source, RowSource) else ()
        self._qualities = array("d")
        self._strata: list[Stratum] = []
        self._known: dict[Stratum, Stratum] = {}

    def add(self, record: Record) -> None:
        """Note a record; they are numbered from 0 as they come."""
        if self._limit is None or isinstance(record, Document):
            return
        if self._by_quality:
            self._qualities.append(math.nan if record.quality is None else record.quality)
        if self._stratify_by:
            stratum = tuple(record.labels.get(name, "") for name in self._stratify_by)
            self._strata.append(self._known.setdefault(stratum, stratum))

    def not_chosen(self, ids: Sequence[str]) -> Iterable[int]:
        """Numbers of the records that go; `ids` are those of all.

        Raises:
            UserError: no record has what the choice goes by; the hash would decide unseen.
        """
        if self._limit is None or len(ids) <= self._limit:
            return ()
        self._refuse_empty_columns()
        kept = choose(
            ids,
            self._limit,
            qualities=self._qualities if self._by_quality else None,
            strata=self._strata if self._stratify_by else None,
        )
        return set(range(len(ids))).difference(kept)

    def _refuse_empty_columns(self) -> None:
        if self._by_quality and all(map(math.isnan, self._qualities)):
            raise UserError(_empty(f"{self._key}.choose_by=quality", "quality", "choose_by=hash"))
        for place, name in enumerate(self._stratify_by):
            if not any(stratum[place] for stratum in self._known):
                key = f"{self._key}.stratify_by=[{','.join(self._stratify_by)}]"
                raise UserError(_empty(key, name, f"a stratify_by without {name}"))


def _empty(key: str, column: str, instead: str) -> str:
    return f"{key}: no row has a value in column {column!r}; add the column, or set {instead}"

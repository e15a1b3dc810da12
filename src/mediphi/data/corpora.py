"""Corpus config -> records: read, chosen, without duplicates, split; counted by source.

Order of decisions: `max_documents` (see `selection`), then duplicates, then the split by hash of
`group_id`, unless the source says which side it is. None of them depends on reading order, on other
sources or on the machine, but that a record gives way to its duplicate in whichever source.
`weight` is the packing plan's business.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from mediphi.config.corpus import Corpus, Source
from mediphi.data import sources
from mediphi.data.bad_rows import BadRows
from mediphi.data.duplicates import DuplicateIndex
from mediphi.data.selection import Candidates, hash_number
from mediphi.data.spool import Spool
from mediphi.errors import DataError, UserError
from mediphi.records import NO_FACTS, Document, Record

Side = Literal["train", "heldout"]
SIDES: tuple[Side, ...] = get_args(Side)

CODE_TABLES = ("icd10cm", "icd9cm")
"""Kinds without near duplicates: sibling codes differ in the one word that matters."""

_DROPPED = 255


@dataclass
class SourceCounts:
    """What became of one source's rows, for the manifest.

    `read` = `not_chosen` + `exact_duplicates` + `near_duplicates` + `train` + `heldout`. What is
    `heldout_*_duplicates` is among the duplicates too.
    """

    read: int = 0
    rejected: int = 0
    not_chosen: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    heldout_exact_duplicates: int = 0
    heldout_near_duplicates: int = 0
    train: int = 0
    heldout: int = 0


def split_side(
    group_id: str, heldout_fraction: float, *, side: Literal["split", "train", "heldout"] = "split"
) -> Side:
    """The side of a group: held out when its hash falls into the first `heldout_fraction`.

    Args:
        group_id: of a record.
        heldout_fraction: share of groups, 0 to 1.
        side: of its source; unless it is `split` the whole source stands there.
    """
    if side != "split":
        return side
    return "heldout" if hash_number("split", group_id) < heldout_fraction * 2**64 else "train"


class CorpusReading:
    """The kept records of a corpus; texts lie in a spool, not in memory.

    Attributes:
        counts: per source, in the config's order.
        is_whole: every row was read, not only the first ones.
    """

    def __init__(self, spool: Spool, *, ids: list[str], sides: bytearray) -> None:
        """Made by `read_documents`; `sides` is 0, 1 or `_DROPPED` per record."""
        self.counts: dict[str, SourceCounts] = {}
        self.is_whole = True
        self._spool = spool
        self._ids = ids
        self._sides = sides

    def records(self, side: Side | None = None) -> Iterator[Record]:
        """Yield the kept records of one side, or of both, in reading order."""
        wanted = SIDES if side is None else (side,)
        for number, at in enumerate(self._sides):
            if at != _DROPPED and SIDES[at] in wanted:
                yield _unpacked(self._spool[number])

    def __len__(self) -> int:
        """Number of kept records."""
        return len(self._sides) - self._sides.count(_DROPPED)

    def __contains__(self, record_id: object) -> bool:
        """Whether a record with this id was read, kept or not."""
        if not isinstance(record_id, str):
            return False
        place = bisect_left(self._ids, record_id)
        return place < len(self._ids) and self._ids[place] == record_id

    def close(self) -> None:
        self._spool.close()

    def __enter__(self) -> "CorpusReading":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_documents(
    corpus: Corpus,
    *,
    quarantine: Path | None = None,
    spool_folder: Path | None = None,
    first: int | None = None,
) -> CorpusReading:
    """Read all sources of a corpus once.

    Memory: about 100 bytes and the id of each record, plus `DuplicateIndex`'s share.

    Args:
        corpus: the config section.
        quarantine: file for the reasons of bad rows, made anew; only under `on_bad: skip`.
        spool_folder: where the unnamed temporary file with the records goes.
        first: read only so many records of each source, to look at them.

    Raises:
        DataError: a bad row or file, too many bad rows, or an id that repeats.
        UserError: a source that is not to be had, no documents at all, or none with the column that
            `choose_by` or `stratify_by` names.
    """
    if quarantine is not None:
        quarantine.unlink(missing_ok=True)
    scan = _Scan(corpus, Spool(spool_folder))
    try:
        for name, source in corpus.sources.items():
            policy = BadRows(corpus.on_bad, max_share=corpus.max_bad_share, quarantine=quarantine)
            with policy as bad_rows:
                scan.read(name, source, bad_rows, first=first)
        reading = scan.judge()
        reading.is_whole = first is None
        return reading
    except BaseException:
        scan.spool.close()
        raise


class _Scan:
    """The one pass over the sources, and the judgement over what it saw."""

    def __init__(self, corpus: Corpus, spool: Spool) -> None:
        self.spool = spool
        self._corpus = corpus
        self._names = list(corpus.sources)
        self._counts = {name: SourceCounts() for name in corpus.sources}
        jaccard = corpus.deduplicate.jaccard if corpus.drops_near_duplicates else None
        self._duplicates = DuplicateIndex(jaccard)
        self._ids: list[str] = []
        self._sides = bytearray()
        self._source_ids = array("H")

    def read(self, name: str, source: Source, bad_rows: BadRows, *, first: int | None) -> None:
        """Spool a source's records, all on their side, and drop what is not chosen."""
        start, source_id = len(self._ids), self._names.index(name)
        candidates = Candidates(name, source)
        for record in islice(sources.read(source, name=name, bad_rows=bad_rows), first):
            self._add(record, source)
            self._source_ids.append(source_id)
            candidates.add(record)
        for number in candidates.not_chosen(self._ids[start:]):
            self._sides[start + number] = _DROPPED
        counts = self._counts[name]
        counts.read = len(self._ids) - start
        counts.rejected = bad_rows.rejected
        counts.not_chosen = self._sides.count(_DROPPED, start)

    def _add(self, record: Record, source: Source) -> None:
        side = split_side(record.group_id, self._corpus.heldout_fraction, side=source.side)
        self._ids.append(record.id)
        self._sides.append(SIDES.index(side))
        self._duplicates.add(record.text, near=source.kind not in CODE_TABLES)
        self.spool.append(_packed(record))

    def judge(self) -> CorpusReading:
        """Drop duplicates, count, and hand over."""
        order = sorted(range(len(self._ids)), key=self._ids.__getitem__)
        ids = [self._ids[number] for number in order]
        self._refuse_repeats(ids)
        live = [number for number in order if self._sides[number] != _DROPPED]
        found = self._duplicates.find(live, lambda number: _unpacked(self.spool[number]).text)
        for number in found.exact:
            counts, is_heldout = self._drop(number)
            counts.exact_duplicates += 1
            counts.heldout_exact_duplicates += is_heldout
        for number in found.near:
            counts, is_heldout = self._drop(number)
            counts.near_duplicates += 1
            counts.heldout_near_duplicates += is_heldout
        for number, side in enumerate(self._sides):
            counts = self._counts[self._names[self._source_ids[number]]]
            counts.train += side == SIDES.index("train")
            counts.heldout += side == SIDES.index("heldout")
        reading = CorpusReading(self.spool, ids=ids, sides=self._sides)
        reading.counts = self._counts
        if not len(reading):
            raise UserError(f"corpus {self._corpus.name!r}: no documents; see corpus.sources")
        return reading

    def _drop(self, number: int) -> tuple[SourceCounts, bool]:
        """Its source's counts, and whether it stood on the held-out side."""
        is_heldout = self._sides[number] == SIDES.index("heldout")
        self._sides[number] = _DROPPED
        return self._counts[self._names[self._source_ids[number]]], is_heldout

    def _refuse_repeats(self, ids: list[str]) -> None:
        for first, second in pairwise(ids):
            if first == second:
                raise DataError(f"corpus {self._corpus.name!r}: two documents have the id {first}")


def _packed(record: Record) -> object:
    """Other records are pickled as they are; a document's facts may be a view."""
    if not isinstance(record, Document):
        return record
    facts = dict(record.facts) if record.facts else None
    head = (record.id, record.group_id, record.source)
    return (*head, record.text, record.title, facts)


def _unpacked(packed: Any) -> Record:
    if not isinstance(packed, tuple):
        return packed
    document_id, group_id, source, text, title, facts = packed
    facts = NO_FACTS if facts is None else facts
    return Document(document_id, group_id, source, text, title, facts)

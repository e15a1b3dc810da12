"""Validation sets: multiple-choice questions for a search, beside others that it never sees.

Which part a question belongs to depends on its document's group alone, so all sets agree and no
document is in both. Nothing depends on the order of documents or rows.
"""

import json
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from mediphi.config.validation import CodeSet, DocumentSet, FileSet, Validation
from mediphi.data.choice_candidates import (
    Candidate,
    candidates,
    code_candidates,
    num_codes,
    stands_in,
    unknown_to,
)
from mediphi.data.choice_files import Row, read_questions
from mediphi.data.corpora import CorpusReading, Side, read_documents
from mediphi.data.refused_files import refuse_test_files
from mediphi.data.selection import hash_number
from mediphi.errors import UserError
from mediphi.records import Document, MultipleChoice

Part = Literal["search", "holdout"]
PARTS: tuple[Part, ...] = get_args(Part)

NEAREST = 12
"""Wrong options are drawn from so many next longer and so many next shorter ones."""
POOL_PER_QUESTION = 20

Questions = tuple[MultipleChoice, ...]
Documents = Callable[[Side], Iterable[Document]]
"""The documents of a side; asked more than once."""


class ValidationSet(NamedTuple):
    """Questions in two parts.

    Attributes:
        name: of the set; the questions' group.
        search: what the search scores.
        holdout: what only the winner is scored on; no document of `search` is in it.
        fingerprint: SHA-256 of all questions.
    """

    name: str
    search: Questions
    holdout: Questions
    fingerprint: str


def build_sets(
    validation: Validation, *, seed: int, spool_folder: Path | None = None
) -> list[ValidationSet]:
    """All sets; the corpus is read where one is made from it.

    Raises:
        UserError: a set has too few questions.
        DataError: a bad row or file.
    """
    corpus = validation.corpus
    if corpus is None or not validation.reads_documents:
        return sets_of(validation, lambda _: (), guarded=set(), seed=seed)
    refuse_test_files(validation)
    guarded = {n for n, source in corpus.sources.items() if not source.licence.may_be_shown}
    with read_documents(corpus, spool_folder=spool_folder) as reading:
        documents = _documents_of(reading)
        return sets_of(validation, documents, guarded=guarded, seed=seed)


def fingerprint_of(sets: Sequence[ValidationSet]) -> str:
    """SHA-256 of all questions of all sets."""
    return sha256(json.dumps([one.fingerprint for one in sets]).encode()).hexdigest()


def sets_of(
    validation: Validation, documents: Documents, *, guarded: set[str], seed: int
) -> list[ValidationSet]:
    """All sets from documents at hand.

    Args:
        documents: of both sides of a corpus.
        guarded: sources whose ids may name patients; a hash stands for them.
        seed: of choice, wrong options and places.

    Raises:
        UserError, DataError: see `build_sets`.
    """
    found = _found(validation, documents)
    sets = []
    for name, one in validation.sets.items():
        maker = _Maker(name, validation, one.num_questions or validation.num_questions, seed)
        if isinstance(one, FileSet):
            parts = maker.from_file(one)
        elif isinstance(one, CodeSet):
            own = _of_sources(documents("train"), one.sources)
            parts = maker.from_candidates(maker.codes(own, one), guarded)
        else:
            parts = maker.from_candidates(found[name], guarded)
        for part, questions in zip(PARTS, parts, strict=True):
            if len(questions) < validation.min_questions:
                raise UserError(
                    f"validation.sets.{name}: {len(questions)} questions in the {part} part, "
                    f"validation.min_questions={validation.min_questions}; give it more, or drop "
                    f"it with ~validation.sets.{name}"
                )
        search, holdout = parts
        sets.append(ValidationSet(name, search, holdout, _fingerprint(parts)))
    return sets


def _found(validation: Validation, documents: Documents) -> dict[str, list[Candidate]]:
    """What held-out documents can be asked, by set; the training texts are read once for all."""
    rules = {n: one for n, one in validation.sets.items() if isinstance(one, DocumentSet)}
    if not rules:
        return {}
    heldout = list(documents("heldout"))
    own = {n: list(candidates(_of_sources(heldout, r.sources), r)) for n, r in rules.items()}
    fresh = iter(unknown_to(documents("train"), [c.right for found in own.values() for c in found]))
    return {name: [c for c in found if next(fresh)] for name, found in own.items()}


def _of_sources(documents: Iterable[Document], sources: Sequence[str]) -> list[Document]:
    return [document for document in documents if document.source in sources]


def _documents_of(reading: CorpusReading) -> Documents:
    def documents(side: Side) -> Iterator[Document]:
        return (record for record in reading.records(side) if isinstance(record, Document))

    return documents


class _Maker(NamedTuple):
    """Makes one set."""

    name: str
    validation: Validation
    num_questions: int
    seed: int

    def from_candidates(self, found: Sequence[Candidate], guarded: set[str]) -> list[Questions]:
        return [
            tuple(self._questions([c for c in found if self._part(c.group_id) == part], guarded))
            for part in PARTS
        ]

    def from_file(self, one: FileSet) -> list[Questions]:
        rows = list(read_questions(one.path))
        parts = []
        for part in PARTS:
            own = [row for row in rows if (row.part or self._part(row.group)) == part]
            chosen = sorted(own, key=lambda row: self._order(row.id))[: self.num_questions]
            hidden = not one.licence.may_be_shown
            parts.append(
                tuple(self._of_row(row, hidden) for row in sorted(chosen, key=lambda row: row.id))
            )
        return parts

    def codes(self, own: Sequence[Document], one: CodeSet) -> list[Candidate]:
        count = num_codes(self.num_questions, self.validation.holdout_share)
        num_options = self.validation.num_options
        found = code_candidates(own, one, count=count, num_options=num_options, seed=self.seed)
        return list(found)

    def _part(self, group: str) -> Part:
        held = hash_number("validation", group) < self.validation.holdout_share * 2**64
        return "holdout" if held else "search"

    def _order(self, key: str) -> int:
        return hash_number(f"{self.seed}/{self.name}", key)

    def _questions(self, found: list[Candidate], guarded: set[str]) -> Iterator[MultipleChoice]:
        """Questions about as many documents as there are, the answer's place and its rank by
        length both balanced, so that neither is a hint."""
        found = sorted(found, key=lambda one: (one.number, self._order(one.id)))
        pools = _pools(found[: POOL_PER_QUESTION * self.num_questions])
        count, ranks = self.validation.num_options, self._balanced("ranks")
        asked = (
            (one, wrong)
            for one, rank in zip(found, ranks, strict=False)
            if (wrong := one.wrong or self._wrong(one, pools[one.source], longer=rank))
        )
        chosen = sorted(islice(asked, self.num_questions), key=lambda pair: pair[0].id)
        for (one, wrong), place in zip(chosen, self._balanced("places"), strict=False):
            assert len(wrong) == count - 1
            hides = one.source in guarded
            yield MultipleChoice(
                id=_hashed(one.id) if hides else one.id,
                prompt=one.prompt,
                options=(*wrong[:place], one.right, *wrong[place:]),
                answer=place,
                group=self.name,
                cluster=_hashed(one.group_id),
            )

    def _wrong(self, one: Candidate, pool: "_Pool", *, longer: int) -> tuple[str, ...]:
        """Right options of other documents, `longer` of them longer than the own; () where there
        are too few."""
        rng = random.Random(f"{self.seed}/wrong/{self.name}/{one.id}")
        count = self.validation.num_options - 1
        at = bisect_left(pool, (len(one.right), one.right), key=lambda o: (len(o.right), o.right))
        above = list(islice(_others(one, pool[at:]), NEAREST))
        below = list(islice(_others(one, reversed(pool[:at])), NEAREST))
        if len(above) + len(below) < count:
            return ()
        longer = min(max(longer, count - len(below)), len(above))
        drawn = [*rng.sample(above, longer), *rng.sample(below, count - longer)]
        rng.shuffle(drawn)
        return tuple(drawn)

    def _balanced(self, what: str) -> Iterator[int]:
        """Numbers of options, each as often as the others in any run of that many."""
        rng = random.Random(f"{self.seed}/{what}/{self.name}")
        while True:
            yield from rng.sample(range(self.validation.num_options), self.validation.num_options)

    def _of_row(self, row: Row, hidden: bool) -> MultipleChoice:
        name, cluster = _hashed(row.id) if hidden else row.id, _hashed(row.group)
        return MultipleChoice(name, row.prompt, row.options, row.answer, self.name, cluster)


_Pool = list[Candidate]


def _pools(found: Iterable[Candidate]) -> dict[str, _Pool]:
    """Candidates by source, shortest right option first, each text once."""
    pools: dict[str, _Pool] = defaultdict(list)
    for one in sorted(found, key=lambda one: (len(one.right), one.right, one.id)):
        pools[one.source].append(one)
    return pools


def _others(one: Candidate, pool: Iterable[Candidate]) -> Iterator[str]:
    """Texts that may stand beside the right option: another document's, each once."""
    taken = {one.right.casefold()}
    for other in pool:
        text = other.right
        if other.group_id == one.group_id or text.casefold() in taken:
            continue
        if not stands_in(text, one.prompt):
            taken.add(text.casefold())
            yield text


def _hashed(key: str) -> str:
    return sha256(key.encode()).hexdigest()[:16]


def _fingerprint(parts: Sequence[Sequence[MultipleChoice]]) -> str:
    rows = [[(q.id, q.prompt, q.options, q.answer) for q in part] for part in parts]
    return sha256(json.dumps(rows).encode()).hexdigest()

"""Corpus config -> token stores and quiz: everything that is done once, before training."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from mediphi.artifacts import write_atomic
from mediphi.backbone import eos_id
from mediphi.config.corpus import Corpus
from mediphi.config.schema import Config
from mediphi.config.stages import Quiz, TextStage
from mediphi.data.bad_rows import BadRows
from mediphi.data.chat import ChatRenderer
from mediphi.data.code_quiz import build_quiz
from mediphi.data.corpora import SIDES, CorpusReading, Side, read_documents
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.fingerprint import fingerprint
from mediphi.data.render import RENDER_VERSION, Rendered, pieces
from mediphi.data.task_outputs import TaskOutputIndex, read_task_outputs
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore, open_store, store_path
from mediphi.errors import UserError
from mediphi.launch import rank
from mediphi.process_group import wait_for_all
from mediphi.records import Document, MultipleChoice, Preference, TaskOutput
from mediphi.synthesize.rules import GENERATOR, generate

PROVEN_FIRST, PROVEN_EVERY = 10_000, 100
"""Conversations that are compared with the chat template: the first ones, then one in so many,
and all behind one that failed. What the template gives costs ten times as much as what we give."""

Write = Callable[[Document], Sequence[TaskOutput]]


class PreparedData(NamedTuple):
    """What training reads.

    Attributes:
        train, heldout: token stores of the two sides.
        questions: the code quiz over training documents, empty where the corpus has no codes or
            the stage asks none.
        counts: per source, what became of its rows.
        fingerprint: of the data.
    """

    train: TokenStore
    heldout: TokenStore
    questions: list[MultipleChoice]
    counts: dict[str, Any]
    fingerprint: str


def prepare(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreparedData:
    """Read, clean, split, tokenise; or open what an earlier run left in the cache.

    Of several processes rank 0 does it and asks the quiz; the others open what it has made.

    Raises:
        UserError: anything wrong with the data, in one line.
    """
    if rank() != 0:
        wait_for_all()
        return _prepare(config, tokenizer, quiz=None)
    quiz = config.stage.quiz if isinstance(config.stage, TextStage) else None
    data = _prepare(config, tokenizer, quiz=quiz)
    if not data.train.num_tokens:
        raise UserError(
            f"corpus {config.corpus.name!r}: nothing to train on, all is held out; see side of "
            "corpus.sources and corpus.heldout_fraction"
        )
    _tell_duplicates([data.counts[name] for name in config.corpus.sources])
    wait_for_all()
    return data


def _prepare(
    config: Config, tokenizer: PreTrainedTokenizerFast, *, quiz: Quiz | None
) -> PreparedData:
    cache = Path(config.paths.cache)
    corpus = config.corpus
    content = fingerprint(corpus, cache=cache)
    render = Renderer(corpus, tokenizer)
    keys: dict[Side, StoreKey] = {
        side: _key(tokenizer, content, side, render=render.version) for side in SIDES
    }
    notes = cache / "corpora" / f"{content[:32]}.counts.json"
    quarantine = cache / "corpora" / f"{content[:32]}.quarantine.txt"
    known = notes.is_file() and all(store_path(cache, key).exists() for key in keys.values())
    if known and quiz is None:
        stores = {s: open_store(store_path(cache, k), check_hashes=True) for s, k in keys.items()}
        counts = render.settled(json.loads(notes.read_text()), stores, quarantine=quarantine)
        return PreparedData(**stores, questions=[], counts=counts, fingerprint=content)
    cache.mkdir(parents=True, exist_ok=True)
    quarantine.parent.mkdir(exist_ok=True)
    with read_documents(corpus, quarantine=quarantine, spool_folder=cache) as reading:
        counts = {name: asdict(count) for name, count in reading.counts.items()}
        render.begin(reading, quarantine=quarantine, counts=counts)
        stores = {
            side: build_store(
                render.rendered(side),
                cache=cache,
                tokenizer=tokenizer,
                key=key,
                num_workers=config.hardware.num_workers,
            )
            for side, key in keys.items()
        }
        questions = _questions(reading, quiz, seed=config.seed)
    write_atomic(notes, json.dumps(counts, indent=1))
    counts = render.settled(counts, stores, quarantine=quarantine)
    return PreparedData(**stores, questions=questions, counts=counts, fingerprint=content)


def _tell_duplicates(counts: list[dict[str, int]]) -> None:
    """One line for each side that lost rows to duplicates."""
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    for side, noun in (("train", "training"), ("heldout", "held-out")):
        exact, near = total["heldout_exact_duplicates"], total["heldout_near_duplicates"]
        if side == "train":
            exact, near = total["exact_duplicates"] - exact, total["near_duplicates"] - near
        if gone := exact + near:
            print(
                f"left out    {gone:,} of {total[side] + gone:,} {noun} rows: "
                f"exact duplicates {exact:,}, near duplicates {near:,}"
            )


def _key(tokenizer: PreTrainedTokenizerFast, content: str, side: Side, *, render: str) -> StoreKey:
    return StoreKey(
        tokenizer=tokenizer_sha256(tokenizer),
        render=render,
        data=content,
        split=side,
        eos_id=eos_id(tokenizer),
    )


class Renderer:
    """Turns a corpus's records into text with its place in the training data."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
        self._corpus = corpus
        self._chat = None if corpus.record_kind == "text" else ChatRenderer(tokenizer)

    @property
    def version(self) -> str:
        """Part of the stores' key: changes when any record is rendered differently."""
        if self._chat is None:
            return f"{RENDER_VERSION} {GENERATOR}"
        return self._chat.version

    def begin(self, reading: CorpusReading, *, quarantine: Path, counts: dict[str, Any]) -> None:
        """Look at what was read: task outputs of documents may come from files."""
        self._reading, self._quarantine = reading, quarantine
        if self._chat is None:
            self._write = _writer(self._corpus, reading, quarantine=quarantine, counts=counts)

    def rendered(self, side: Side | None) -> Iterator[Rendered]:
        """The records of one side, or of both."""
        return self._texts(side) if self._chat is None else self._chats(self._chat, side)

    def settled(
        self, counts: dict[str, Any], stores: Mapping[str, TokenStore], *, quarantine: Path
    ) -> dict[str, Any]:
        """The counts of reading less the conversations that no store has: they are bad rows too.

        Raises:
            DataError: more than `max_bad_share` of a source's rows were bad.
        """
        if self._chat is None:
            return counts
        corpus, settled = self._corpus, deepcopy(counts)
        kept = {side: store.documents_per_source() for side, store in stores.items()}
        for name in corpus.sources:
            count = settled[name]
            for side in SIDES:
                failed = count[side] - kept[side].get(name, 0)
                for key, change in ((side, -failed), ("read", -failed), ("rejected", failed)):
                    count[key] += change
            rows = BadRows(corpus.on_bad, max_share=corpus.max_bad_share, quarantine=quarantine)
            rows.accepted, rows.rejected = count["read"], count["rejected"]
            rows.close()
        return settled

    def _texts(self, side: Side | None) -> Iterator[Rendered]:
        for document in self._reading.records(side):
            assert isinstance(document, Document)
            parts = pieces(document, self._write(document))
            yield Rendered(document.id, document.source, parts)

    def _chats(self, renderer: ChatRenderer, side: Side | None) -> Iterator[Rendered]:
        """Each compared with the model's own chat template, where there are many a sample."""
        with BadRows(self._corpus.on_bad, max_share=1.0, quarantine=self._quarantine) as bad_rows:
            for number, record in enumerate(self._reading.records(side)):
                assert not isinstance(record, Document)
                is_pair = isinstance(record, Preference)
                rendered = renderer.preference(record) if is_pair else renderer.conversation(record)
                if number < PROVEN_FIRST or number % PROVEN_EVERY == 0 or bad_rows.rejected:
                    try:
                        renderer.prove(record, rendered)
                    except ValueError as reason:
                        bad_rows.reject(*record.place, str(reason))
                        continue
                yield rendered


def _writer(
    corpus: Corpus, reading: CorpusReading, *, quarantine: Path, counts: dict[str, Any]
) -> Write:
    """Who writes the task outputs of a document: our rules, or a file somebody made before.

    Rows of such a file are counted in `counts` under its own name.
    """
    if corpus.task_outputs.generator == "rules":
        return lambda document: generate(document, corpus.task_kinds)
    path = str(corpus.task_outputs.path)
    policy = BadRows(corpus.on_bad, max_share=corpus.max_bad_share, quarantine=quarantine)
    with policy as bad_rows:
        known_ids = reading if reading.is_whole else None
        outputs = read_task_outputs(path, bad_rows=bad_rows, known_ids=known_ids)
        wanted = (output for output in outputs if output.kind in corpus.task_kinds)
        index = TaskOutputIndex(wanted, spool_folder=quarantine.parent)
    counts["task_outputs.path"] = {"read": bad_rows.accepted, "rejected": bad_rows.rejected}
    return lambda document: index.of(document.id)


def _questions(reading: CorpusReading, quiz: Quiz | None, *, seed: int) -> list[MultipleChoice]:
    """Closed-book questions over what was trained on; what is held out cannot be known."""
    if quiz is None:
        return []
    documents = (d for d in reading.records("train") if isinstance(d, Document))
    codes = [document for document in documents if "code" in document.facts]
    return build_quiz(codes, quiz=quiz, seed=seed)

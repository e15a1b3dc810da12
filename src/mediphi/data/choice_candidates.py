"""Documents -> what multiple-choice questions are made of: a prompt and its right option."""

import re
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from mediphi.config.stages import Quiz
from mediphi.config.validation import CodeSet, DocumentSet
from mediphi.data.code_quiz import PROMPT, choose_codes
from mediphi.data.duplicates import shingles
from mediphi.records import Document

MIN_OPTION_WORDS = 6
"""Shorter summaries ("None.") are equal by nature and say nothing."""
MIN_TOPIC_LETTERS = 4
KNOWN_SHARE = 0.5
"""Share of an option's runs of five words that may stand in training texts."""
TEXTS_AT_A_TIME = 256

_WORD = re.compile(r"\S+")


class Candidate(NamedTuple):
    """A question without its wrong options.

    Attributes:
        id: unique in its set; begins with the document's.
        group_id: of the document.
        source: of the document.
        number: how many the same document has given before.
        prompt, right: as of a `MultipleChoice`.
        wrong: wrong options, where the rule gives its own; else others' right options are taken.
    """

    id: str
    group_id: str
    source: str
    number: int
    prompt: str
    right: str
    wrong: tuple[str, ...] = ()


def candidates(documents: Iterable[Document], one: DocumentSet) -> Iterator[Candidate]:
    """All questions that the rule of a set finds; none has its answer in its prompt."""
    ask = {
        "continuation": _continuations,
        "summary": _summary,
        "question_answer": _answers,
    }[one.kind]
    for document in documents:
        found = (pair for pair in ask(document, one) if not stands_in(pair[1], pair[0]))
        for number, (prompt, right) in enumerate(found):
            name = f"{document.id}/{number}"
            yield Candidate(name, document.group_id, document.source, number, prompt, right)


def code_candidates(
    documents: Sequence[Document], one: CodeSet, *, count: int, num_options: int, seed: int
) -> Iterator[Candidate]:
    """About `count` codes with their wrong options, chosen as by the quiz of training."""
    quiz = Quiz(num_questions=count, num_options=num_options, difficulties=(one.difficulty,))
    for code, distractors in choose_codes(documents, quiz=quiz, seed=seed)[one.difficulty]:
        yield Candidate(
            id=f"{code.system}/{code.code}/{one.difficulty}",
            group_id=code.group_id,
            source=code.system,
            number=0,
            prompt=PROMPT.format(system=code.system, code=code.code),
            right=code.description,
            wrong=tuple(other.description for other in distractors),
        )


def unknown_to(training: Iterable[Document], options: Sequence[str]) -> list[bool]:
    """Which options stand in no training text, or to at most `KNOWN_SHARE`.

    The split keeps documents apart, but notes repeat phrases, and one set quotes another. Runs of
    five words are compared, as in the search for near duplicates. No option may be empty.
    """
    if not options:
        return []
    hashes, offsets = shingles(options)
    wanted, place = np.unique(hashes, return_inverse=True)
    seen = np.zeros(len(wanted), dtype=bool)
    for texts in _batches(training):
        seen |= np.isin(wanted, shingles(texts)[0])
    bounds = offsets.astype(np.int64)
    shares = np.add.reduceat(seen[place], bounds[:-1], dtype=np.int64) / np.diff(bounds)
    return [bool(share <= KNOWN_SHARE) for share in shares]


def stands_in(option: str, prompt: str) -> bool:
    """Whether an option can be read in the prompt, letter case and blanks aside."""
    return " ".join(option.casefold().split()) in " ".join(prompt.casefold().split())


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    for document in documents:
        texts += [document.text, document.facts.get("summary", "")]
        if len(texts) >= TEXTS_AT_A_TIME:
            yield texts
            texts = []
    if texts:
        yield texts


def _continuations(document: Document, one: DocumentSet) -> Iterator[tuple[str, str]]:
    """Passages that end where a sentence or line ends, with the words that follow there."""
    words = list(_WORD.finditer(document.text))
    starts = _starts(document.text, words)
    first = 0
    while True:
        border = next((s for s in starts if s >= first + one.prompt_words), None)
        if border is None or border + one.option_words > len(words):
            return
        begin = max(first, border - 2 * one.prompt_words)  # where no sentence ends for long
        gap = document.text[words[border - 1].end() : words[border].start()]
        prompt = _between(document.text, words[begin:border])
        option = _between(document.text, words[border : border + one.option_words])
        yield prompt + ("\n" if "\n" in gap else ""), option
        after = border + one.option_words
        first = next((s for s in starts if s >= after), len(words))


def _summary(document: Document, one: DocumentSet) -> Iterator[tuple[str, str]]:
    summary = document.facts.get("summary", "")
    option = _first_words(summary, one.option_words)
    if len(option.split()) >= MIN_OPTION_WORDS:
        yield f"{_first_words(document.text, one.prompt_words)}\nSummary:", option


def _answers(document: Document, one: DocumentSet) -> Iterator[tuple[str, str]]:
    """Of an answer the first words that do not name the topic: it would be found by copying."""
    named = {w for w in _letters(document.title) if len(w) >= MIN_TOPIC_LETTERS}
    taken: set[str] = set()
    for question, answer in document.facts.get("questions", ()):
        words = list(_WORD.finditer(answer))
        for start in _starts(answer, words):
            option = _between(answer, words[start : start + one.option_words])
            if len(option.split()) < MIN_OPTION_WORDS:
                break
            if named.isdisjoint(_letters(option)) and option not in taken:
                taken.add(option)
                yield f"Question: {question}\nAnswer:", option
                break


def _starts(text: str, words: Sequence[re.Match[str]]) -> list[int]:
    """Numbers of the words that open a sentence or a line."""
    return [
        number
        for number, word in enumerate(words)
        if number == 0
        or "\n" in text[words[number - 1].end() : word.start()]
        or (words[number - 1][0][-1] in ".!?" and not word[0][0].islower())
    ]


def _between(text: str, words: Sequence[re.Match[str]]) -> str:
    return text[words[0].start() : words[-1].end()]


def _first_words(text: str, count: int) -> str:
    words = list(_WORD.finditer(text))[:count]
    return _between(text, words) if words else ""


def _letters(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text.casefold()))


def num_codes(num_questions: int, holdout_share: float) -> int:
    """How many codes to choose so that both parts are full though groups fall by hash."""
    return ceil(1.5 * num_questions / min(holdout_share, 1 - holdout_share))

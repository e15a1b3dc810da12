"""Schema of validation sets: the multiple-choice questions that a search of merges is led by."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mediphi.config.corpus import Corpus, FileSource, HubSource, Licence, Source
from mediphi.config.splits import TEST_REFUSED, names_a_test_split
from mediphi.config.strict import BrokenRule, Strict
from mediphi.records import Difficulty


class SetBase(Strict):
    """What every set has."""

    num_questions: PositiveInt | None = None
    """Most questions of each split; null: `validation.num_questions`."""


class CodeSet(SetBase):
    """What does a code mean, asked closed-book as in the quiz of training.

    Over training documents: a meaning that was held out cannot be known.
    """

    kind: Literal["codes"]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sources of the corpus that have codes."""
    difficulty: Difficulty = "medium"
    """How near the wrong answers stand in the code hierarchy."""


class DocumentSet(SetBase):
    """Questions by rule over the held-out documents of named sources.

    `continuation`: which passage goes on from here. `summary`: which summary belongs to this text.
    `question_answer`: which answer belongs to this question; answers do not name the topic.
    """

    kind: Literal["continuation", "summary", "question_answer"]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sources of the corpus; wrong options come from the right one's own source."""
    prompt_words: PositiveInt = 60
    """Least words of a passage to go on from; most words of a text to be summarised."""
    option_words: PositiveInt = 20
    """Words that an option is cut to."""


class FileSet(SetBase):
    """Questions of your own: JSONL rows `{prompt or question, options, answer}`."""

    kind: Literal["file"]
    path: str
    """File, folder or glob; `.jsonl` or `.jsonl.gz`."""
    licence: Licence
    """Required, as of a source."""
    split: Literal["validation", "train", "test"] = "validation"
    """Which part of its data set the file is; test is refused."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.split == "test":
            yield BrokenRule("split", TEST_REFUSED)
        elif names_a_test_split(self.path):
            yield BrokenRule("path", TEST_REFUSED)


Set = Annotated[CodeSet | DocumentSet | FileSet, Field(discriminator="kind")]


class Validation(Strict):
    """The sets, each in two parts that share no document: the search sees one, and the winner's
    gap is measured on the other. A model's fitness is its mean accuracy over the sets."""

    sets: Annotated[dict[str, Set], Field(min_length=1)]
    """Sets by a name of your choice."""
    corpus: Corpus | None = None
    """Texts that sets are made from by rule; null: all sets are files."""
    num_questions: PositiveInt = 100
    """Most questions of a set in each part; the paper's sets have up to 1,200."""
    min_questions: PositiveInt = 20
    """A set with fewer in either part is refused: its accuracy would be noise."""
    num_options: Annotated[int, Field(ge=2, le=10)] = 4
    """Answers to choose from, of sets that are made by rule."""
    holdout_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of document groups whose questions the search never sees."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.corpus is None:  # a whole config must have one: see schema.py
            return
        for name, one in self.sets.items():
            for source in () if isinstance(one, FileSet) else one.sources:
                key = f"sets.{name}.sources"
                if source not in self.corpus.sources:
                    there = ", ".join(self.corpus.sources)
                    yield BrokenRule(key, f"{source} is no source of its corpus, which has {there}")
                elif _is_test(self.corpus.sources[source]):
                    yield BrokenRule(key, f"{source}: {TEST_REFUSED}")
        if self.reads_documents and self.corpus.record_kind != "text":
            yield BrokenRule("sets", "are made from texts; take a corpus of texts, or kind=file")

    @property
    def reads_documents(self) -> bool:
        """Whether any set needs the corpus."""
        return any(not isinstance(one, FileSet) for one in self.sets.values())


def _is_test(source: Source) -> bool:
    if isinstance(source, HubSource):
        return names_a_test_split(source.split) or names_a_test_split(source.subset or "")
    return isinstance(source, FileSource) and names_a_test_split(source.path)

"""What flows between the rooms before tokenisation: plain records, no tensors.

Every record carries a stable `group_id`. Splits hash it, so everything derived from one page, note
or code family stays on one side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

TaskKind = Literal["summary", "question_answering", "entities", "relations"]
"""PIT task kinds of the paper; `summary` won and is the default."""

PieceKind = Literal[
    "document",
    "summary",
    "question_answering",
    "entities",
    "relations",
    "system",
    "user",
    "context",
    "answer",
    "chosen",
    "rejected",
]
"""What a run of tokens is: a document, a task output about it, or a part of a conversation.

`answer` is what SFT learns, `context` an answer that stands in a prompt.
"""

TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
PIECE_KINDS: tuple[PieceKind, ...] = get_args(PieceKind)

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

STOP_TOKENS = ("<|end|>", "<|assistant|>", "<|endoftext|>")
"""Phi-3.5 stops at any of them; a merged or exported model that loses one talks on."""

Label = Literal["task_type", "error_type"]
LABELS: tuple[Label, ...] = get_args(Label)
"""What a row says about itself that metrics are told apart by; empty where it says nothing."""

Difficulty = Literal["easy", "medium", "hard"]
DIFFICULTIES: tuple[Difficulty, ...] = get_args(Difficulty)

NO_FACTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Document:
    """One page, note, abstract or code entry of a corpus.

    Attributes:
        id: unique over all corpora, `<source>/<key>`, for example `icd10cm/A00.0`.
        group_id: documents that share it are never split apart.
        source: name of the source that it came from.
        text: the text a model reads, never empty.
        title: short name of the page, possibly empty.
        facts: the source's structure, where it has one (a code's hierarchy, a page's questions);
            rule-based task outputs are written from it.
    """

    id: str
    group_id: str
    source: str
    text: str
    title: str = ""
    facts: Mapping[str, Any] = field(default_factory=lambda: NO_FACTS)


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Role
    text: str


class Place(NamedTuple):
    """Where a row stands: its file, and the line or row from 1."""

    file: str
    line: int


NOWHERE = Place("", 0)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What SFT trains on.

    Attributes:
        id: unique over all corpora, `<source>/<key>`.
        group_id: conversations that share it are never split apart.
        source: name of the source that it came from.
        turns: at most one `system` turn, first; then `user` and `assistant` in turn, an `assistant`
            last. Texts have no blanks around them; an answer is never empty.
        is_chat: rendered in the model's chat format; otherwise plain text, prompt and completion
            (one `user` turn and one `assistant` turn, blanks kept).
        labels: values of `LABELS` that the row has, and `input_data`, `output_format`.
        quality: score of a judge, higher is better; None: not judged.
        num_prompt_turns: the first so many turns are a prompt: answers among them are not learnt.
        place: file and line that it came from, to name it; decides nothing.
    """

    id: str
    group_id: str
    source: str
    turns: tuple[Turn, ...]
    is_chat: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    quality: float | None = None
    num_prompt_turns: int = 0
    place: Place = field(default=NOWHERE, compare=False)

    @property
    def text(self) -> str:
        """All turns, for finding duplicates."""
        return "\n".join(turn.text for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Preference:
    """What DPO trains on: one prompt, a better and a worse answer.

    Attributes:
        prompt: like `Conversation.turns`, but a `user` turn last.
        chosen, rejected: the two answers, different and not empty.
        id, group_id, source, is_chat, labels, quality, place: as of a `Conversation`.
    """

    id: str
    group_id: str
    source: str
    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    is_chat: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    quality: float | None = None
    place: Place = field(default=NOWHERE, compare=False)

    @property
    def text(self) -> str:
        """Prompt and both answers, for finding duplicates."""
        return "\n".join([*(turn.text for turn in self.prompt), self.chosen, self.rejected])


Record = Document | Conversation | Preference


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What a generator (rules now, an LLM later) wrote about one document.

    Attributes:
        document_id: `Document.id`.
        kind: which PIT task it answers.
        text: plain LM text, not chat.
        generator: who wrote it and in which version, for example `rules/1`.
    """

    document_id: str
    kind: TaskKind
    text: str
    generator: str


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """A question with options, scored by log-likelihood.

    Attributes:
        id: stable name.
        prompt: text before the option; an option is scored as its continuation.
        options: continuations, without a leading space.
        answer: index of the right option.
        group: what results are told apart by: a difficulty, or the name of a set.
        cluster: questions that share it are alike, as those about one document are; None: alike to
            no other. Never a readable name.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    group: str
    cluster: str | None = None

"""How PIT text is put together: task outputs first, then the document they are about.

The order is the method (Jiang et al. 2024, arXiv 2402.12847): a model learns how knowledge is
asked for before it reads the pages. Each piece gets an end-of-sequence token behind it when it is
tokenised; phase 1 trains on the pieces that are not the document, phase 2 on all of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mediphi.records import NO_FACTS, TASK_KINDS, Document, PieceKind, TaskKind, TaskOutput

RENDER_VERSION = "pit/1"
"""Part of every cache key; raise it when the rendered text of any document changes."""

LABELS: dict[TaskKind, str] = {
    "summary": "Summary",
    "question_answering": "Question and answer",
    "entities": "Entities",
    "relations": "Relations",
}

CONTROL = re.compile(
    r"<(?=\|[^|<>\s]{1,40}\|>|/?s>|(?:unk|pad|bos|eos|mask|sep|cls)>|0x[0-9A-Fa-f]{2}>)"
)
"""The `<` of whatever a tokenizer of the Phi, Llama or GPT families takes for a control token."""


class Piece(NamedTuple):
    """A run of text of one kind, with the token ids before and behind it.

    Text holds no control tokens; they are ids. `suffix` None is the end of text.
    """

    kind: PieceKind
    text: str
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] | None = None


class Rendered(NamedTuple):
    """A record as it will be tokenised; `labels` are values of `LABELS`."""

    id: str
    source: str
    pieces: Sequence[Piece]
    labels: Mapping[str, str] = NO_FACTS


def pieces(document: Document, outputs: Iterable[TaskOutput]) -> list[Piece]:
    """Task outputs in the order of `TASK_KINDS` (as given within a kind), then the document.

    An output that names neither the page's title nor its code gets a header of title and kind, or
    nobody could tell what it is about. Empty outputs are left out.

    Raises:
        ValueError: an output is about another document.
    """
    outputs = list(outputs)
    strangers = sorted({o.document_id for o in outputs if o.document_id != document.id})
    if strangers:
        raise ValueError(f"task outputs of {strangers} given for document {document.id}")
    rendered = [
        Piece(output.kind, neutralise(_with_header(document, output)))
        for kind in TASK_KINDS
        for output in outputs
        if output.kind == kind and output.text.strip()
    ]
    return [*rendered, Piece("document", neutralise(document.text.strip()))]


def neutralise(text: str) -> str:
    """Text in which nothing reads as a control token: `<|end|>` becomes `< |end|>`.

    A page that quotes `<|end|>` or `</s>` would otherwise put real control tokens into the
    training data, since tokenizers look for them everywhere. A blank after the `<` is visible,
    reversible by eye, and idempotent.
    """
    return CONTROL.sub("< ", text)


def _with_header(document: Document, output: TaskOutput) -> str:
    text = output.text.strip()
    title = document.title.strip()
    names = filter(None, (title, str(document.facts.get("code", ""))))
    if not title or any(name.casefold() in text.casefold() for name in names):
        return text
    return f"{title}\n{LABELS[output.kind]}:\n{text}"

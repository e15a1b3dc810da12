"""From candidates to rows: what is dropped and why, how many of a task are kept."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from mediphi.data.sources.bundled import normalise
from mediphi.errors import DataError
from scripts.build_mediflow.leakage import ForbiddenTexts
from scripts.build_mediflow.licences import SOURCES
from scripts.build_mediflow.rating import rate
from scripts.build_mediflow.rows import COLUMNS, Candidate, Split

MAX_TOKENS = 2000
"""Of instruction, input and output together."""


@dataclass
class Selection:
    """Rows of both splits, and why the others are not among them.

    Attributes:
        rows: kept candidates by split, ordered by hash.
        dropped: number of dropped candidates by (split, reason).
    """

    rows: dict[Split, list[Candidate]] = field(default_factory=dict)
    dropped: Counter[tuple[Split, str]] = field(default_factory=Counter)


def select(
    candidates: Iterable[Candidate], *, tests: ForbiddenTexts, tokenizer: Tokenizer
) -> Selection:
    """Filter the candidates and keep each task's number of rows.

    In hash order, a row is dropped when its task has its number, when its input came before, when
    it is too long, when it holds text of a test row and, in training, of a held-out row. The next
    one takes its place.

    Raises:
        DataError: see `check`.
    """
    result = Selection()
    by_split: dict[Split, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_split[candidate.split].append(candidate)
    heldout = Filter(result, tests, tokenizer, None)
    result.rows["heldout"] = list(heldout.keep(by_split["heldout"]))
    own = (text for row in result.rows["heldout"] for text in (row.input, row.output))
    inputs = {normalise(row.input) for row in result.rows["heldout"]}
    train = Filter(result, tests, tokenizer, (ForbiddenTexts(own, whole=False), inputs))
    result.rows["train"] = list(train.keep(by_split["train"]))
    check(result, tests)
    return result


@dataclass
class Filter:
    """Keeps rows of one split in hash order until a task has its number."""

    result: Selection
    tests: ForbiddenTexts
    tokenizer: Tokenizer
    heldout: tuple[ForbiddenTexts, set[str]] | None

    def keep(self, candidates: list[Candidate]) -> Iterator[Candidate]:
        kept: Counter[str] = Counter()
        seen: set[tuple[str, str]] = set()
        for row in sorted(candidates, key=lambda row: row.key):
            limit = row.task.max_rows[row.split == "heldout"]
            repeat = (row.task.task_type, normalise(row.input))
            reason = (
                "above the task's number"
                if kept[row.task.name] >= limit
                else "input repeated"
                if repeat in seen
                else self.fault(row)
            )
            if reason:
                self.result.dropped[row.split, reason] += 1
                continue
            seen.add(repeat)
            kept[row.task.name] += 1
            yield row

    def fault(self, row: Candidate) -> str:
        """Why the row cannot be used; empty when it can."""
        text = f"{row.input}\n{row.output}"
        if not row.input or not row.output:
            return "empty"
        if num_tokens(row, self.tokenizer) > MAX_TOKENS:
            return f"above {MAX_TOKENS} tokens"
        if self.tests.equals(row.input) or self.tests.overlaps(text):
            return "text of a test row"
        if self.heldout is not None:
            texts, inputs = self.heldout
            if normalise(row.input) in inputs or texts.overlaps(text):
                return "text of a held-out row"
        return ""


def check(result: Selection, tests: ForbiddenTexts) -> None:
    """The splits share no document and no input, and neither holds text of a test row.

    Raises:
        DataError: one of these does not hold; nothing should be written.
    """
    train, heldout = result.rows["train"], result.rows["heldout"]
    if {row.document for row in train} & {row.document for row in heldout}:
        raise DataError("mediflow: a document feeds both splits; mend how its source is split")
    if {normalise(row.input) for row in train} & {normalise(row.input) for row in heldout}:
        raise DataError("mediflow: an input stands in both splits; mend the filter")
    for row in (*train, *heldout):
        if tests.equals(row.input) or tests.overlaps(f"{row.input}\n{row.output}"):
            raise DataError(f"mediflow: {row.task.name} holds text of a test row; mend the filter")


def num_tokens(row: Candidate, tokenizer: Tokenizer) -> int:
    """Tokens of instruction, input and output."""
    texts = (row.instruction, row.input, row.output)
    return sum(len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False))


def by_file(selection: Selection) -> dict[str, list[Candidate]]:
    """Rows by the stem of their file: `questions_*` for a source that `contains_phi`."""
    files: dict[str, list[Candidate]] = defaultdict(list)
    for split, rows in selection.rows.items():
        for row in rows:
            is_open = not SOURCES[row.task.source].contains_phi
            files[split if is_open else f"questions_{split}"].append(row)
    return files


def published(row: Candidate) -> dict[str, Any]:
    """The row in MediFlow's columns."""
    values = {
        "instruction": row.instruction,
        "input": row.input,
        "output": row.output,
        "task_type": row.task.task_type,
        "input_data": row.input_data,
        "output_format": row.task.output_format,
        "difficulty_level": row.difficulty_level,
        "rejected_output": None,
        "error_type": None,
        **rate(row),
    }
    return {column: values[column] for column in COLUMNS}

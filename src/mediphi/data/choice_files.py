"""Multiple-choice questions from JSONL files: read strictly, every fault with its file and line.

A row is `{"prompt" or "question", "options", "answer"}`, with `id`, `group` and `split` where it
likes. A `prompt` is taken as it is; a `question` becomes `Question: ...` and `Answer:`.
"""

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from mediphi.config.splits import TEST_REFUSED, names_a_test_split
from mediphi.data.bad_rows import BadRows, one_line
from mediphi.data.refused_files import refuse_test_name
from mediphi.data.sources.bundled import content_key
from mediphi.data.sources.checked import checked_key, checked_text, value_of
from mediphi.data.sources.files import find_files
from mediphi.data.sources.jsonl import json_rows
from mediphi.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")
SPLITS = ("search", "holdout", "validation")
"""What `split` of a row may say; validation: either part, by hash."""
MAX_OPTIONS = len(ascii_uppercase)


class Row(NamedTuple):
    """One question.

    Attributes:
        id: unique in its set.
        group: rows that share it stay in one part; by default those with the same prompt.
        part: where the row says so.
        prompt, options, answer: as of a `MultipleChoice`.
    """

    id: str
    group: str
    part: Literal["search", "holdout"] | None
    prompt: str
    options: tuple[str, ...]
    answer: int


def read_questions(path: str) -> Iterator[Row]:
    """The rows of a file, folder or glob.

    Raises:
        DataError: nothing there, a damaged file, a bad row, or one of a test split.
    """
    bad_rows, seen = BadRows("strict"), set[str]()
    refuse_test_name(path)
    for file in find_files(path, SUFFIXES):
        refuse_test_name(file.key, path=file.path)
        for line, content in json_rows(file.path, bad_rows):
            try:
                row = _row(content, key=f"{file.key}:{line}")
                if row.id in seen:
                    raise ValueError("field 'id' repeats the id of an earlier row")
            except ValueError as reason:
                raise DataError(one_line(f"{file.path}:{line}: {reason}")) from None
            seen.add(row.id)
            yield row


def _row(content: Mapping[str, Any], *, key: str) -> Row:
    """Raises: ValueError: the reason, without any text of the row."""
    part = _part(content.get("split"))
    prompt, options = _prompt(content), _options(value_of(content, "options"))
    name = checked_key(content["id"], "field 'id'") if "id" in content else key
    group = content_key(prompt)
    if "group" in content:
        group = checked_key(content["group"], "field 'group'")
    return Row(name, group, part, prompt, options, _answer(value_of(content, "answer"), options))


def _part(split: object) -> Literal["search", "holdout"] | None:
    if isinstance(split, str) and names_a_test_split(split):
        raise ValueError(TEST_REFUSED)
    if split is None or split == "validation":
        return None
    for part in ("search", "holdout"):
        if split == part:
            return part
    raise ValueError(f"field 'split' must be one of {', '.join(SPLITS)}, or left out")


def _prompt(content: Mapping[str, Any]) -> str:
    if ("prompt" in content) == ("question" in content):
        raise ValueError("needs one of the fields 'prompt' and 'question'")
    if "prompt" in content:
        return checked_text(content["prompt"], "field 'prompt'")
    question = checked_text(content["question"], "field 'question'")
    return f"Question: {question.strip()}\nAnswer:"


def _options(options: object) -> tuple[str, ...]:
    if not isinstance(options, list) or not 2 <= len(options) <= MAX_OPTIONS:
        raise ValueError(f"field 'options' must be a list of 2 to {MAX_OPTIONS} strings")
    texts = [checked_text(o, f"option {n}").strip() for n, o in enumerate(options, start=1)]
    if len({text.casefold() for text in texts}) < len(texts):
        raise ValueError("two options are the same, letter case aside")
    return tuple(texts)


def _answer(answer: object, options: Sequence[str]) -> int:
    """Index of the right option, given as index from 0, letter from A, or its text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(options):
            return answer
        raise ValueError(f"field 'answer' is {answer}, options are counted 0 to {len(options) - 1}")
    text = checked_text(answer, "field 'answer'").strip()
    letters = ascii_uppercase[: len(options)]
    meant = {options.index(text)} if text in options else set[int]()
    meant |= {letters.index(text.upper())} if len(text) == 1 and text.upper() in letters else set()
    if len(meant) == 1:
        return meant.pop()
    if meant:
        raise ValueError("field 'answer' is the letter of one option and the text of another")
    raise ValueError(f"field 'answer' is no index, no letter A to {letters[-1]} and no option")

"""JSON lines: one object per line; plain, `.gz`, `.xz` or `.zst`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mediphi.config.corpus import FileSource
from mediphi.data.bad_rows import BadRows
from mediphi.data.sources.files import MAX_TEXT_BYTES, find_files, numbered_lines
from mediphi.data.sources.rows import Rows
from mediphi.records import Record

_PLAIN = (".jsonl", ".ndjson", ".json")
SUFFIXES = tuple(name + end for name in _PLAIN for end in ("", ".gz", ".xz", ".zst"))
_BOM = b"\xef\xbb\xbf"


def read(source: FileSource, *, name: str, bad_rows: BadRows) -> Iterator[Record]:
    """Yield the records of a file, folder or glob.

    Raises:
        DataError: a file is missing or damaged, or a row is bad and the policy is `strict`.
    """
    rows = Rows(source, name, bad_rows)
    for file in find_files(source.path, SUFFIXES):
        for line, row in json_rows(file.path, bad_rows):
            record = rows.record(row, file=file.path, line=line, key=f"{file.key}:{line}")
            if record is not None:
                yield record


def json_rows(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of the good lines; the others go to `bad_rows`.

    Raises:
        DataError: the file is unreadable, damaged or empty, or a line is bad under `strict`.
    """
    number = 0
    for number, line in numbered_lines(path):
        try:
            row = parse(line, is_first=number == 1)
        except ValueError as reason:
            torn = line is not None and not line.endswith(b"\n")
            hint = "; the file ends inside this line" if torn else ""
            bad_rows.reject(path, number, f"{reason}{hint}")
        else:
            yield number, row
    if number == 0:
        bad_rows.reject(path, 1, "the file is empty")


def parse(line: bytes | None, *, is_first: bool = False) -> dict[str, Any]:
    """Parse one line strictly: UTF-8, one object, no key twice, finite numbers.

    Raises:
        ValueError: the reason, without any text of the line.
    """
    if line is None:
        raise ValueError(f"the line has more than {MAX_TEXT_BYTES} bytes")
    line = line.removeprefix(_BOM) if is_first else line
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    _check_bytes(line)
    try:
        row = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.rstrip(': ')} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, expected a JSON object")
    return row


def _check_bytes(line: bytes) -> None:
    if not line.strip():
        raise ValueError("blank line")
    if b"\0" in line:
        raise ValueError("NUL byte in the line (UTF-16?)")
    if b"\r" in line:
        raise ValueError("lone carriage return; line ends must be \\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

"""Checks of single values; a reason never holds the text, which may be clinical."""

from collections.abc import Mapping
from typing import Any

from mediphi.data.sources.files import MAX_TEXT_BYTES


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Return a column's value.

    Raises:
        ValueError: the row has no such column.
    """
    if name not in row:
        raise ValueError(f"field {name!r} is missing")
    return row[name]


def checked_text(value: object, what: str) -> str:
    """Return a usable text.

    Raises:
        ValueError: the reason; it never holds the text.
    """
    if value is None:
        raise ValueError(f"{what} is null")
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, expected a string")
    if "\0" in value:
        raise ValueError(f"{what} holds a NUL character")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair") from None
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{what} has {num_bytes} bytes, at most {MAX_TEXT_BYTES} are allowed")
    if not value.strip("\ufeff \t\r\n\v\f\u200b") or value.isspace():
        raise ValueError(f"{what} is empty")
    return value


def checked_key(value: object, what: str) -> str:
    """Return an id or group name: a string or whole number.

    Raises:
        ValueError: the reason.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_text(value, what)

"""A row of the user's table -> the record that its source's format asks for, or the reason why not.

Parts of a `Document` are columns that the source names; conversations and preferences have the
columns of their format (`chat_rows`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from mediphi.config.corpus import RowFormat
from mediphi.data.bad_rows import BadRows
from mediphi.data.sources import chat_rows
from mediphi.data.sources.bundled import content_key
from mediphi.data.sources.checked import checked_key, checked_text, value_of
from mediphi.records import Conversation, Document, Place, Preference, Record

_LONG_KEY = 80


class Fields(Protocol):
    """The part of a source's config that says how a row is laid out."""

    @property
    def format(self) -> RowFormat: ...
    @property
    def text_field(self) -> str: ...
    @property
    def id_field(self) -> str | None: ...
    @property
    def group_field(self) -> str | None: ...
    @property
    def title_field(self) -> str | None: ...


def columns(fields: Fields, there: Iterable[str]) -> list[str]:
    """The columns that a reader needs, each once; those that a row may lack only where `there`."""
    names: list[str | None]
    if fields.format == "text":
        names = [fields.text_field, fields.id_field, fields.group_field, fields.title_field]
    else:
        needed, optional = chat_rows.COLUMNS[fields.format]
        present = set(there).intersection(optional)
        names = [*needed, fields.id_field, fields.group_field]
        names += [name for name in optional if name in present]
    return list(dict.fromkeys(name for name in names if name is not None))


@dataclass
class Rows:
    """Makes records of one source's rows and sets the bad ones aside.

    A group is named by column and value, without the source: the same patient in two sources stays
    on one side of the split.
    """

    fields: Fields
    name: str
    bad_rows: BadRows
    _seen: set[bytes] = field(default_factory=set)

    def record(
        self, row: Mapping[str, Any], *, file: Path | str, line: int, key: str
    ) -> Record | None:
        """Return the row as a record, or None when it was set aside.

        Args:
            row: column -> value.
            file: named in the reason.
            line: line or row, from 1.
            key: makes the id when the source has no id column.

        Raises:
            DataError: the row is bad and the policy is `strict`.
        """
        try:
            record = self._record(row, key, Place(str(file), line))
        except ValueError as reason:
            self.bad_rows.reject(file, line, str(reason))
            return None
        self.bad_rows.accept()
        return record

    def _record(self, row: Mapping[str, Any], key: str, place: Place) -> Record:
        layout = self.fields.format
        if layout == "text":
            return self._document(row, key)
        parts = chat_rows.parts(row, layout)
        labels, quality = chat_rows.labels(row, layout), chat_rows.quality(row, layout)
        identity = self._identity(row, key, group=chat_rows.group(parts))
        more: dict[str, Any] = {"labels": labels, "quality": quality, "place": place}
        if isinstance(parts, chat_rows.Pair):
            return Preference(*identity, **parts._asdict(), **more)
        return Conversation(*identity, **parts._asdict(), **more)

    def _document(self, row: Mapping[str, Any], key: str) -> Document:
        fields = self.fields
        text = checked_text(value_of(row, fields.text_field), f"field {fields.text_field!r}")
        identity = self._identity(row, key, group=None)
        title = row.get(fields.title_field) if fields.title_field is not None else None
        if title is not None and title != "":
            title = checked_text(title, f"field {fields.title_field!r}")
        return Document(*identity, text, title or "")

    def _identity(
        self, row: Mapping[str, Any], key: str, *, group: str | None
    ) -> tuple[str, str, str]:
        """Id, group and source; `group` is the row's where the source names no column."""
        fields = self.fields
        if fields.id_field is not None:
            key = self._unique_key(row, fields.id_field)
        if fields.group_field is not None:
            value = checked_key(value_of(row, fields.group_field), f"field {fields.group_field!r}")
            if fields.format != "text" and len(value) > _LONG_KEY:
                value = content_key(value)  # an instruction or a document, not a name
            group = f"{fields.group_field}={value}"
        return f"{self.name}/{key}", group or f"{self.name}/{key}", self.name

    def _unique_key(self, row: Mapping[str, Any], name: str) -> str:
        key = checked_key(value_of(row, name), f"field {name!r}")
        digest = blake2b(key.encode(), digest_size=16).digest()
        if digest in self._seen:
            raise ValueError(f"field {name!r} repeats the id of an earlier row")
        self._seen.add(digest)
        return key

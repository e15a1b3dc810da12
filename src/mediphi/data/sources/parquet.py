"""Parquet, streamed page by page; "line" in reasons is the row of the file, from 1."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediphi.config.corpus import FileSource
from mediphi.data.bad_rows import BadRows, one_line
from mediphi.data.sources.files import find_files
from mediphi.data.sources.rows import Fields, Rows, columns
from mediphi.errors import DataError
from mediphi.records import Record

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 256


def read(source: FileSource, *, name: str, bad_rows: BadRows) -> Iterator[Record]:
    """Yield the records of a file, folder or glob.

    Raises:
        DataError: a file is missing or damaged, a column is missing or of another type, or a row
            is bad and the policy is `strict`.
    """
    rows = Rows(source, name, bad_rows)
    for file in find_files(source.path, SUFFIXES):
        yield from arrow_records(_batches(file.path, source), rows, file=file.path, key=file.key)


def _batches(path: Path, fields: Fields) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow
    from pyarrow import parquet

    num_rows = 0
    try:
        with parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=2**16, page_checksum_verification=True
        ) as file:
            check_columns(file.schema_arrow, fields, where=path)
            wanted = columns(fields, file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
                num_rows += batch.num_rows
                yield batch
            if num_rows != file.metadata.num_rows:
                raise ValueError("number of rows")
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        where = one_line(f"{path}:{num_rows + 1}")
        raise DataError(f"{where}: not Parquet, damaged or cut short ({reason})") from None


def check_columns(schema: "pyarrow.Schema", fields: Fields, *, where: Path | str) -> None:
    """Refuse a table without the wanted columns, with numbers as text or bytes anywhere.

    Raises:
        DataError: names the column and the ones there are.
    """
    from pyarrow import types

    keys = (fields.id_field, fields.group_field)
    for name in columns(fields, schema.names):
        if schema.names.count(name) != 1:
            there = ", ".join(schema.names[:20])
            raise DataError(one_line(f"{where}:1: no column {name!r}; there are: {there}"))
        kind = schema.field(name).type
        is_key = name in keys and types.is_integer(kind)
        # A row of another format than text is judged by itself, but bytes would pass as text there.
        is_fine = is_text(kind) if fields.format == "text" or name in keys else not has_bytes(kind)
        if not (is_fine or is_key):
            raise DataError(one_line(f"{where}:1: column {name!r} is {kind}, expected string"))


def is_text(kind: "pyarrow.DataType") -> bool:
    """Whether values of an Arrow type are strings, dictionary-encoded or not."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def has_bytes(kind: "pyarrow.DataType") -> bool:
    """Whether an Arrow type holds binary values at any depth."""
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
    is_bytes = types.is_fixed_size_binary(kind) or any(test(kind) for test in tests)
    parts = [kind.field(i).type for i in range(kind.num_fields)]
    return is_bytes or any(map(has_bytes, parts))


def arrow_records(
    batches: Iterable["pyarrow.RecordBatch"], rows: Rows, *, file: Path | str, key: str
) -> Iterator[Record]:
    """Yield the records of Arrow batches; an empty table is a bad row."""
    line = 0
    for batch in batches:
        fields = list(batch.schema)
        values = [_values(column, where=f"{file}:{line + 1}") for column in batch.columns]
        for row in zip(*values, strict=True):
            line += 1
            try:
                pairs = zip(fields, row, strict=True)
                cells = {field.name: _decoded(cell, field.type) for field, cell in pairs}
            except (ValueError, RecursionError) as error:
                rows.bad_rows.reject(file, line, _reason(error))
                continue
            record = rows.record(cells, file=file, line=line, key=f"{key}:{line}")
            if record is not None:
                yield record
    if line == 0:
        rows.bad_rows.reject(file, 1, "the file has no rows")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start + 1} of a text"
    return "a value of a JSON column is not JSON"


def _values(column: "pyarrow.Array", *, where: str) -> list[Any]:
    """Python values of a column; texts as bytes, since Arrow trusts a file to hold valid UTF-8.

    The offsets are checked first: reading by damaged ones would end the process.
    """
    import pyarrow

    try:
        if isinstance(column, pyarrow.DictionaryArray):
            column.validate(full=True)
            column = column.dictionary_decode()
        column.validate()
        kind = _with_bytes(column.type)
        column = column if kind == column.type else column.cast(kind)
        column.validate(full=True)
        return column.to_pylist()
    except (pyarrow.ArrowException, ValueError, MemoryError) as error:
        raise DataError(one_line(f"{where}: damaged ({type(error).__name__})")) from None


def _with_bytes(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type with bytes in place of strings and JSON, at any depth."""
    import pyarrow
    from pyarrow import types

    if is_text(kind) or _is_json(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([_field_with_bytes(kind.field(i)) for i in range(kind.num_fields)])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return make(_field_with_bytes(kind.value_field))
    return kind


def _field_with_bytes(field: "pyarrow.Field") -> "pyarrow.Field":
    return field.with_type(_with_bytes(field.type))


def _is_json(kind: "pyarrow.DataType") -> bool:
    """Whether it is the type that `datasets` gives a column of values of many types."""
    return getattr(kind, "extension_name", None) == "arrow.json"


def _decoded(cell: Any, kind: "pyarrow.DataType") -> Any:
    """A value made by `_values` with texts as strings.

    Raises:
        ValueError: not UTF-8, or not JSON.
    """
    if isinstance(cell, bytes):
        return json.loads(cell.decode()) if _is_json(kind) else cell.decode()
    if isinstance(cell, dict):
        return {name: _decoded(value, kind.field(name).type) for name, value in cell.items()}
    if isinstance(cell, list) and hasattr(kind, "value_type"):
        return [_decoded(value, kind.value_type) for value in cell]
    return cell

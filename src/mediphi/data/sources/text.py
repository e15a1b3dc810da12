"""Text files: one file is one document, UTF-8."""

from collections.abc import Iterator
from pathlib import Path

from mediphi.config.corpus import FileSource
from mediphi.data.bad_rows import BadRows, one_line
from mediphi.data.sources.checked import checked_text
from mediphi.data.sources.files import MAX_TEXT_BYTES, DataFile, check_regular, find_files
from mediphi.errors import DataError
from mediphi.records import Document

SUFFIXES = (".txt", ".md")


def read(source: FileSource, *, name: str, bad_rows: BadRows) -> Iterator[Document]:
    """Yield one document per file of a file, folder or glob; the title is the file's stem.

    A file that is no usable text is a bad row. `id_field`, `group_field` and `title_field` mean
    nothing here: every file is its own group.

    Raises:
        DataError: a file is missing or unreadable, or bad and the policy is `strict`.
    """
    for file in find_files(source.path, SUFFIXES):
        try:
            text = _text(file.path)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            bad_rows.reject(file.path, line, "invalid UTF-8")
        except ValueError as reason:
            bad_rows.reject(file.path, 1, str(reason))
        else:
            bad_rows.accept()
            yield _document(file, text, name)


def _text(path: Path) -> str:
    try:
        if check_regular(path).st_size > MAX_TEXT_BYTES:
            raise ValueError(f"the file has more than {MAX_TEXT_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(one_line(f"{path}:1: {error.strerror}")) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("is UTF-16, expected UTF-8")
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return checked_text(text, "the file")


def _document(file: DataFile, text: str, name: str) -> Document:
    identity = f"{name}/{file.key}"
    return Document(identity, identity, name, text, Path(file.key).name)

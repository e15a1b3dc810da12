"""A source that is published in no form that a program can load: says what to obtain, and stops."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mediphi.config.corpus import UnavailableSource
from mediphi.data.bad_rows import one_line
from mediphi.errors import UserError
from mediphi.records import Record

if TYPE_CHECKING:
    from mediphi.data.bad_rows import BadRows


def read(source: UnavailableSource, *, name: str, bad_rows: "BadRows") -> Iterator[Record]:
    """Never yields.

    Raises:
        UserError: always, with the sentence that the corpus file gives.
    """
    raise UserError(one_line(f"corpus.sources.{name}: not available here; {source.obtain}"))

"""One small reader per file format: source spec -> records.

A reader module has `read(source, *, name, bad_rows) -> Iterator[Record]`; it is imported only
when a corpus asks for its kind.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from mediphi.config.corpus import Source
from mediphi.records import Record

if TYPE_CHECKING:
    from mediphi.data.bad_rows import BadRows

READERS: dict[str, str] = {
    "icd10cm": "icd10cm",
    "icd9cm": "icd9cm",
    "mtsamples": "mtsamples",
    "mts_dialog": "mts_dialog",
    "aci_bench": "aci_bench",
    "pubmedqa": "pubmedqa",
    "ncbi_disease": "ncbi_disease",
    "medquad": "medquad",
    "wiki_pairs": "wiki_pairs",
    "nstg": "nstg",
    "markdown_pages": "markdown_pages",
    "jsonl": "jsonl",
    "parquet": "parquet",
    "text": "text",
    "dataset_folder": "dataset_folder",
    "hub": "hub",
    "unavailable": "unavailable",
}
"""Source kind -> module of this package."""


def read(source: Source, name: str, bad_rows: "BadRows") -> Iterator[Record]:
    """Records of one source, in a fixed order.

    Args:
        source: its spec.
        name: its key in the corpus; becomes the record's `source` and the prefix of ids.
        bad_rows: what happens to a row that cannot be read.

    Raises:
        UserError: a missing folder or file, or a source that nobody can load.
        DataError: a damaged file, or a bad row where `bad_rows` is strict.
    """
    module = import_module(f"{__name__}.{READERS[source.kind]}")
    return module.read(source, name=name, bad_rows=bad_rows)

"""A folder written by `datasets.save_to_disk`.

Of a `DatasetDict` only the split `train` is read, or the only split there is: the others were held
out by whoever made it. `path` may also name the folder of one split.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mediphi.config.corpus import FileSource
from mediphi.data.bad_rows import BadRows, one_line
from mediphi.data.sources.parquet import BATCH_ROWS, arrow_records, check_columns
from mediphi.data.sources.rows import Rows, columns
from mediphi.errors import DataError
from mediphi.records import Record

if TYPE_CHECKING:
    import datasets
    import pyarrow


def read(source: FileSource, *, name: str, bad_rows: BadRows) -> Iterator[Record]:
    """Yield the records of the folder, memory-mapped.

    Raises:
        DataError: missing, damaged, no split to choose, a column missing or of another type, or a
            row is bad and the policy is `strict`.
    """
    path = Path(source.path).expanduser()
    dataset = _load(path)
    check_columns(dataset.features.arrow_schema, source, where=path)
    wanted = columns(source, dataset.column_names)
    table = dataset.select_columns(wanted).with_format("arrow")
    rows = Rows(source, name, bad_rows)
    yield from arrow_records(_batches(table, path), rows, file=path, key="row")


def _load(path: Path) -> "datasets.Dataset":
    if not path.is_dir():
        raise DataError(one_line(f"{path}: no such folder, expected one from save_to_disk"))
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        # The library raises whatever its JSON, Arrow and file layers raise.
        reason = f"not a folder from save_to_disk, or damaged ({type(error).__name__})"
        raise DataError(one_line(f"{path}:1: {reason}")) from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    if "train" in loaded:
        return loaded["train"]
    splits = ", ".join(sorted(map(str, loaded)))
    raise DataError(one_line(f"{path}: no split 'train'; let path end in one of: {splits}"))


def _batches(dataset: "datasets.Dataset", path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    num_rows = 0
    try:
        for table in dataset.iter(batch_size=BATCH_ROWS):
            for batch in table.to_batches():  # type: ignore[union-attr]  # Arrow format
                num_rows += batch.num_rows
                yield batch
    except (pyarrow.ArrowException, OSError, ValueError, IndexError, MemoryError) as error:
        reason = f"damaged ({type(error).__name__})"
        raise DataError(one_line(f"{path}:{num_rows + 1}: {reason}")) from None

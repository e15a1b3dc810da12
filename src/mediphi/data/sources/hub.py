"""A dataset of the Hugging Face hub, streamed. Code that comes with a dataset is never run."""

from collections.abc import Iterator, Mapping
from typing import Any

from mediphi import hub
from mediphi.config.corpus import HubSource
from mediphi.data.bad_rows import BadRows, one_line
from mediphi.data.sources.rows import Rows, columns
from mediphi.errors import DataError, UserError
from mediphi.records import Record


def read(source: HubSource, *, name: str, bad_rows: BadRows) -> Iterator[Record]:
    """Yield the records of one split, row by row, nothing kept on disk.

    Raises:
        UserError: not found, not allowed or no network; says which local form to use instead.
        DataError: a row is bad and the policy is `strict`, or the stream broke.
    """
    rows = Rows(source, name, bad_rows)
    where = f"hub:{source.repo_id}/{source.split}"
    line = 0
    stream = _open(source, name)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            break
        except Exception as error:
            # Network, parser and decoder errors of many libraries end here.
            reason = f"the stream broke ({type(error).__name__}); start again or use a local copy"
            raise DataError(one_line(f"{where}:{line + 1}: {reason}")) from None
        line += 1
        record = rows.record(row, file=where, line=line, key=f"{source.split}:{line}")
        if record is not None:
            yield record
    if line == 0:
        bad_rows.reject(where, 1, "the split has no rows")


def _open(source: HubSource, name: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    if not hub.reachable(source.repo_id):
        raise UserError(_unavailable(source, name, "no network"))
    try:
        dataset = datasets.load_dataset(
            source.repo_id,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        there = dataset.column_names
        if not there:
            return iter(dataset)
        wanted = columns(source, there)
        missing = [column for column in wanted if column not in there]
        if not missing:
            return iter(dataset.select_columns(wanted))
    except Exception as error:
        # Not found, gated, offline, script-based: dozens of types, one thing to do.
        raise UserError(_unavailable(source, name, type(error).__name__)) from None
    found = ", ".join(there[:20])
    raise UserError(
        one_line(f"corpus.sources.{name}: {source.repo_id} has no column {missing[0]!r}: {found}")
    )


def _unavailable(source: HubSource, name: str, reason: str) -> str:
    part = f" subset {source.subset}" if source.subset else ""
    return one_line(
        f"corpus.sources.{name}: hub dataset {source.repo_id}{part} split {source.split} "
        f"(revision {source.revision}) cannot be loaded ({reason}); check the name, "
        f"login and network, or obtain it elsewhere and set kind to dataset_folder, parquet or "
        f"jsonl with a local path"
    )

"""Files of test splits below what the config names: seen when they are found, not before."""

import json
from importlib import import_module
from pathlib import Path

from mediphi.config.corpus import FileSource
from mediphi.config.splits import TEST_REFUSED, names_a_test_split
from mediphi.config.validation import FileSet, Validation
from mediphi.data.bad_rows import one_line
from mediphi.data.sources import READERS
from mediphi.data.sources.files import find_files
from mediphi.errors import DataError


def refuse_test_name(name: str, *, path: Path | str | None = None) -> None:
    """Refuse what says that it is for testing; a link also by the name of what it leads to.

    Args:
        name: of a file below what the config names, or what it names.
        path: of the file.

    Raises:
        DataError: it does.
    """
    place = Path(path or name)
    leads_to = str(place.resolve()) if place.is_symlink() else name
    if names_a_test_split(name) or names_a_test_split(leads_to):
        raise DataError(one_line(f"{path or name}: {TEST_REFUSED}"))


def refuse_test_files(validation: Validation) -> None:
    """Look through the file sources that sets are made from.

    Raises:
        DataError: a file of a test split is among those that would be read.
    """
    corpus = validation.corpus
    asked = {
        n for one in validation.sets.values() if not isinstance(one, FileSet) for n in one.sources
    }
    for name, source in () if corpus is None else corpus.sources.items():
        if name not in asked or not isinstance(source, FileSource):
            continue
        if source.kind == "dataset_folder":
            _refuse_only_split(Path(source.path).expanduser())
            continue
        reader = import_module(f"mediphi.data.sources.{READERS[source.kind]}")
        for file in find_files(source.path, reader.SUFFIXES, unique_keys=False):
            refuse_test_name(file.key, path=file.path)


def _refuse_only_split(folder: Path) -> None:
    """Of a `DatasetDict` its only split is read, whatever its name."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # one split by itself, or nothing that the reader takes
    if isinstance(splits, list) and len(splits) == 1:
        refuse_test_name(str(splits[0]), path=folder / str(splits[0]))

"""Corpora that validation sets are made from: a test split below a source's path is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mediphi.config.splits import TEST_REFUSED
from mediphi.config.validation import Validation
from mediphi.data.refused_files import refuse_test_files
from mediphi.data.validation_sets import build_sets
from mediphi.errors import DataError

LICENCE = {"id": "test", "origin": "test", "commercial_ok": True}


def asking(path: Path, **keys: Any) -> Validation:
    source = {"kind": "jsonl", "path": str(path), "licence": LICENCE} | keys
    one = {"kind": "continuation", "sources": ["notes"]}
    corpus = {"name": "c", "sources": {"notes": source, "others": source | {"path": "test"}}}
    return Validation.model_validate({"sets": {"s": one}, "corpus": corpus})


@pytest.mark.parametrize(
    "name", ["test.jsonl", "test/a.jsonl", "medqa_test/a.jsonl.gz", "x/test-00000-of-00001.parquet"]
)
def test_a_file_below_a_source_that_is_asked_about_is_looked_at(tmp_path: Path, name: str) -> None:
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    for ask in (refuse_test_files, lambda one: build_sets(one, seed=0)):
        with pytest.raises(DataError) as told:
            ask(asking(tmp_path, kind=kind))
        assert str(told.value) == f"{path}: {TEST_REFUSED}"


def test_what_is_not_read_does_not_count(tmp_path: Path) -> None:
    for name in ("latest.jsonl", "test_what_it_is.txt", "train.jsonl"):
        (tmp_path / name).touch()
    refuse_test_files(asking(tmp_path))  # nor does the source that no set asks about
    (tmp_path / "test_what_it_is.txt").rename(tmp_path / "test_what_it_is.jsonl")
    with pytest.raises(DataError):
        refuse_test_files(asking(tmp_path))


@pytest.mark.parametrize(("splits", "refused"), [(["test"], True), (["train", "test"], False)])
def test_of_a_dataset_folder_the_split_counts_that_is_read(
    tmp_path: Path, splits: list[str], refused: bool
) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    one = asking(tmp_path, kind="dataset_folder")
    if refused:
        with pytest.raises(DataError, match="searching against a test split is refused"):
            refuse_test_files(one)
    else:
        refuse_test_files(one)


def test_a_link_is_known_by_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "medqa_test.jsonl").touch()
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "questions.jsonl").symlink_to(tmp_path / "elsewhere/medqa_test.jsonl")
    with pytest.raises(DataError, match=r"questions\.jsonl: searching against a test split"):
        refuse_test_files(asking(tmp_path / "given"))

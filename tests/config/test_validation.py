"""Validation sets in the config: what is allowed, and that no test split is searched against."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from mediphi.config.corpus import Corpus
from mediphi.config.splits import TEST_REFUSED
from mediphi.config.validation import Validation

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "validation"
FILES = sorted(FOLDER.glob("*.yaml"))
LICENCE = {"id": "test", "origin": "test", "commercial_ok": True}
TEXT = {"kind": "jsonl", "path": "notes.jsonl", "licence": LICENCE}


def plain(path: Path) -> dict[str, Any]:
    """A file without what Hydra adds to it: the corpus."""
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items() if key not in ("defaults", "corpus")}


def read(content: Any) -> Validation:
    return Validation.model_validate_json(json.dumps(content), strict=True)


def corpus(**source: Any) -> Corpus:
    return Corpus.model_validate({"name": "c", "sources": {"notes": {**TEXT, **source}}})


def made(kind: str = "continuation", source: str = "notes") -> Validation:
    return read({"sets": {"s": {"kind": kind, "sources": [source]}}})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_valid_by_itself(path: Path) -> None:
    assert read(plain(path)).sets


def test_the_files_are_those_that_are_promised() -> None:
    assert [path.stem for path in FILES] == ["codes", "files", "search"]


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"split": "test"}, f"split: {TEST_REFUSED}"),
        ({"path": "medqa_test.jsonl"}, f"path: {TEST_REFUSED}"),
        ({"path": "questions/test/part-0.jsonl"}, f"path: {TEST_REFUSED}"),
        ({"path": "/data/medqa_test/*.jsonl"}, f"path: {TEST_REFUSED}"),
    ],
)
def test_a_test_split_is_refused_in_one_line(keys: dict[str, str], fault: str) -> None:
    good = {"kind": "file", "path": "questions.jsonl", "licence": LICENCE}
    assert read({"sets": {"mine": good}})
    with pytest.raises(ValidationError) as told:
        read({"sets": {"mine": good | keys}})
    [error] = told.value.errors()
    assert error["msg"] == fault and "\n" not in fault


@pytest.mark.parametrize(
    ("validation", "source", "fault"),
    [
        (made(source="letters"), {}, "letters is no source of its corpus, which has notes"),
        (made(), {"path": "notes_test.jsonl"}, f"notes: {TEST_REFUSED}"),
        (
            made("codes"),
            {"kind": "hub", "repo_id": "a/b", "split": "test", "path": None},
            f"notes: {TEST_REFUSED}",
        ),
        (
            made("codes"),
            {"kind": "hub", "repo_id": "a/b", "subset": "medqa_test", "path": None},
            f"notes: {TEST_REFUSED}",
        ),
        (made(), {"format": "messages"}, "are made from texts; take a corpus of texts"),
    ],
)
def test_sets_must_go_with_the_corpus(
    validation: Validation, source: dict[str, Any], fault: str
) -> None:
    keys = {key: value for key, value in (TEXT | source).items() if value is not None}
    found = Corpus.model_validate({"name": "c", "sources": {"notes": keys}})
    [rule] = validation.model_copy(update={"corpus": found}).broken_rules()
    assert fault in rule.allowed and rule.key.startswith("sets")


def test_sets_that_go_with_the_corpus_break_no_rule() -> None:
    assert list(made().model_copy(update={"corpus": corpus()}).broken_rules()) == []
    own = read({"sets": {"s": {"kind": "file", "path": "q.jsonl", "licence": LICENCE}}})
    others = corpus(format="messages")
    assert list(own.model_copy(update={"corpus": others}).broken_rules()) == []

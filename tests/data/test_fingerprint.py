import os
from pathlib import Path
from typing import Any

import pytest

from mediphi.config.corpus import Corpus
from mediphi.data import fingerprint as module
from mediphi.data.fingerprint import fingerprint
from mediphi.errors import DataError, UserError

LICENCE = {"id": "CC0-1.0", "origin": "test", "commercial_ok": True}


def corpus(path: Path | str, *, source: dict[str, Any] | None = None, **fields: Any) -> Corpus:
    a = {"kind": "jsonl", "path": str(path), "licence": LICENCE} | (source or {})
    return Corpus.model_validate({"name": "test", "sources": {"a": a}} | fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data/sub/b.jsonl").write_text('{"text": "b"}\n')
    return tmp_path / "data"


def test_it_depends_on_content_not_on_place_or_time(folder: Path) -> None:
    before = fingerprint(corpus(folder))
    moved = folder.rename(folder.with_name("moved"))
    os.utime(moved / "a.jsonl", (1, 1))
    assert fingerprint(corpus(moved)) == before
    assert len(before) == 64


def test_it_changes_with_each_byte_name_and_file(folder: Path) -> None:
    seen = [fingerprint(corpus(folder))]
    (folder / "a.jsonl").write_text('{"text": "A"}\n')
    seen.append(fingerprint(corpus(folder)))
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    seen.append(fingerprint(corpus(folder)))
    (folder / "d.jsonl").write_text("{}")
    seen.append(fingerprint(corpus(folder)))
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"heldout_fraction": 0.1}, True),
        ({"deduplicate": {"near": False}}, True),
        ({"on_bad": "skip"}, True),
        ({"task_kinds": ["entities"]}, True),
        ({"source": {"text_field": "body"}}, True),
        ({"source": {"max_documents": 5}}, True),
        ({"source": {"kind": "text"}}, True),
        ({"source": {"format": "messages"}}, True),
        ({"source": {"side": "heldout"}}, True),
        ({"source": {"weight": 3.0}}, False),
        ({"source": {"licence": LICENCE | {"dua": True}}}, False),
        ({"name": "other"}, False),
    ],
)
def test_it_changes_with_what_decides_the_documents(
    folder: Path, change: dict[str, Any], moves: bool
) -> None:
    assert (fingerprint(corpus(folder, **change)) != fingerprint(corpus(folder))) is moves


def test_what_a_default_means_counts_not_how_it_is_written(folder: Path) -> None:
    for layout, means in (("text", True), ("messages", False), ("mediflow_dpo", False)):
        source = {"format": layout}
        default = fingerprint(corpus(folder, source=source))
        said = [
            fingerprint(corpus(folder, source=source, deduplicate={"near": near}))
            for near in (means, not means)
        ]
        assert said[0] == default != said[1]


@pytest.mark.parametrize("layout", ["messages", "prompt_completion", "preference"])
def test_a_format_that_is_read_differently_moves_its_corpora_only(
    layout: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [corpus(folder, source={"format": name}) for name in (layout, "text", "mediflow")]
    before = [fingerprint(each) for each in wanted]
    monkeypatch.setitem(module._FORMAT_VERSIONS, layout, 3)
    moved = [fingerprint(each) != known for each, known in zip(wanted, before, strict=True)]
    assert moved == [True, False, False]


def test_it_changes_with_how_rows_are_chosen(folder: Path) -> None:
    limit = {"format": "mediflow", "max_documents": 5}
    choices = [{}, {"choose_by": "quality"}, {"stratify_by": ["task_type"]}]
    choices.append({"stratify_by": ["task_type", "output_format"]})
    seen = {fingerprint(corpus(folder, source=limit | choice)) for choice in choices}
    assert len(seen) == len(choices)


def test_precomputed_task_outputs_count_by_content(folder: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs.jsonl"
    seen = set()
    for text in ("one", "two"):
        outputs.write_text(text)
        config = {"generator": "files", "path": str(outputs)}
        seen.add(fingerprint(corpus(folder, task_outputs=config)))
    assert len(seen) == 2


def test_a_hub_source_counts_by_id_and_revision() -> None:
    def of(revision: str) -> str:
        source = {"kind": "hub", "repo_id": "o/n", "revision": revision, "licence": LICENCE}
        return fingerprint(Corpus.model_validate({"name": "t", "sources": {"a": source}}))

    assert of("main") == of("main") != of("abc")


def test_known_files_are_not_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.rglob("*.jsonl"):
        os.utime(path, (1, 1))
    first = fingerprint(corpus(folder), cache=tmp_path / "cache")

    def never(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(module, "file_digest", never)
    assert fingerprint(corpus(folder), cache=tmp_path / "cache") == first
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["file_hashes.json"]


def test_a_changed_file_is_read_again_also_right_after_the_first_time(
    folder: Path, tmp_path: Path
) -> None:
    first = fingerprint(corpus(folder), cache=tmp_path / "cache")
    status = (folder / "a.jsonl").stat()
    (folder / "a.jsonl").write_text('{"text": "z"}\n')
    os.utime(folder / "a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(corpus(folder), cache=tmp_path / "cache") != first


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b'{"a": [1, 2, 3]}'])
def test_a_damaged_cache_is_an_empty_one(folder: Path, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/file_hashes.json").write_bytes(damage)
    assert fingerprint(corpus(folder), cache=tmp_path / "cache") == fingerprint(corpus(folder))


def test_a_missing_path_names_the_config_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: No such file.*corpus\.sources\.a\.path"):
        fingerprint(corpus(tmp_path / "nowhere"))


def test_an_unavailable_source_says_what_to_obtain() -> None:
    source = {"kind": "unavailable", "obtain": "PMC from NLM", "licence": LICENCE}
    with pytest.raises(UserError, match="PMC from NLM"):
        fingerprint(Corpus.model_validate({"name": "t", "sources": {"a": source}}))

"""Conversations and preferences read the same from every kind of source."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet as pq

from mediphi.config.corpus import FileSource, HubSource, Licence
from mediphi.data import sources
from mediphi.data.bad_rows import BadRows
from mediphi.data.sources.chat_rows import COLUMNS
from mediphi.errors import DataError, UserError
from mediphi.records import Conversation, Preference, Record

LICENCE = Licence(id="CC0-1.0", origin="test", commercial_ok=True)
KINDS = ("jsonl", "parquet", "dataset_folder", "hub")


def message(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


U, A, B = message("user", "q"), message("assistant", "a"), message("assistant", "b")
MEDIFLOW: list[dict[str, Any]] = [
    {
        "instruction": f"Do {n}.",
        "input": None if n == 2 else f"Note {n % 2}",
        "output": f"Answer {n}",
        "task_type": None if n == 1 else "summarization",
        "rejected_output": f"Answer {n + 1}",
        "error_type": "brevity",
        "quality": None if n == 0 else n / 2,
        "rationale": [{"score": n}],
    }
    for n in range(4)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "mediflow": MEDIFLOW,
    "mediflow_dpo": MEDIFLOW,
    "messages": [
        {"messages": [message("system", "s"), U, A, U, B], "tools": None},
        {"messages": [U, A | {"tool_calls": None}], "tools": []},
    ],
    "prompt_completion": [{"prompt": "p ", "completion": " c", "n": 1}],
    "preference": [
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": None, "chosen": [U, A], "rejected": [U, B]},
    ],
}


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def written(rows: list[dict[str, Any]], kind: str, folder: Path) -> str:
    """The rows as a source of this kind; its path or repository."""
    if kind == "dataset_folder":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    else:
        folder.mkdir()
        if kind == "parquet":
            pq.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "train.jsonl").write_text(lines)
    return str(folder)


def read(place: str, kind: str, layout: str, **fields: Any) -> list[Record]:
    where = {"repo_id": place} if kind == "hub" else {"path": place}
    model: Any = HubSource if kind == "hub" else FileSource
    source = model(kind=kind, licence=LICENCE, format=layout, **where, **fields)
    return list(sources.read(source, "s", BadRows()))


@pytest.mark.parametrize("layout", ROWS)
def test_every_source_gives_the_same_records(layout: str, tmp_path: Path) -> None:
    found = {
        kind: [
            dataclasses.replace(record, id="", group_id=record.group_id.replace("row", "train"))
            for record in read(written(ROWS[layout], kind, tmp_path / kind), kind, layout)
        ]
        for kind in KINDS
    }
    assert found["jsonl"] == found["parquet"] == found["dataset_folder"] == found["hub"]
    expected = Preference if layout in ("mediflow_dpo", "preference") else Conversation
    assert [type(record) for record in found["jsonl"]] == [expected] * len(ROWS[layout])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_quality_and_group_come_with_the_row(kind: str, tmp_path: Path) -> None:
    place = written(MEDIFLOW, kind, tmp_path / kind)
    found = read(place, kind, "mediflow_dpo")
    assert [(r.quality, r.labels.get("task_type")) for r in found] == [  # type: ignore[union-attr]
        (None, "summarization"),
        (0.5, None),
        (1.0, "summarization"),
        (1.5, "summarization"),
    ]
    groups = [record.group_id for record in found]
    assert groups[1] == groups[3] and len(set(groups)) == 3
    named = read(place, kind, "mediflow", id_field="instruction", group_field="output")
    assert [(r.id, r.group_id) for r in named[:2]] == [
        ("s/Do 0.", "output=Answer 0"),
        ("s/Do 1.", "output=Answer 1"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "column"), [(k, v.needed[-1]) for k, v in COLUMNS.items()])
def test_a_missing_column_is_named(kind: str, layout: str, column: str, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != column} for row in ROWS[layout]]
    place = written(rows, kind, tmp_path / kind)
    with pytest.raises((DataError, UserError), match=column) as caught:
        read(place, kind, layout)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layout", "name", "value"),
    [
        ("mediflow", "quality", "high"),
        ("messages", "tools", [{"name": "search"}]),
        ("preference", "chat_template_kwargs", {"enable_thinking": True}),
        ("prompt_completion", "label", False),
    ],
)
def test_an_optional_column_is_read_where_there_is_one(
    kind: str, layout: str, name: str, value: object, tmp_path: Path
) -> None:
    place = written([ROWS[layout][0] | {name: value}], kind, tmp_path / kind)
    with pytest.raises(DataError, match=f":1: field '{name}' is "):
        read(place, kind, layout)


MIXED = [
    {"messages": [U, A]},
    {"messages": [message("user", [{"type": "text", "text": "q"}]), A]},
]


@pytest.mark.parametrize("kind", ["parquet", "dataset_folder"])
def test_content_stored_as_json_is_not_read_with_its_quotes(kind: str, tmp_path: Path) -> None:
    """`datasets` stores contents of two types as JSON."""
    mixed = datasets.Dataset.from_list(MIXED, on_mixed_types="use_json")
    if kind == "parquet":
        mixed.to_parquet(str(tmp_path / "a.parquet"))
        place = str(tmp_path / "a.parquet")
    else:
        mixed.save_to_disk(tmp_path / "d")
        place = str(tmp_path / "d")
    turns = [r.turns for r in read(place, kind, "messages")]  # type: ignore[union-attr]
    assert turns == [(("user", "q"), ("assistant", "a"))] * 2


@pytest.mark.parametrize("kind", ["jsonl", "hub"])
def test_content_of_two_types_reads_the_same_from_json(kind: str, tmp_path: Path) -> None:
    found = read(written(MIXED, kind, tmp_path / kind), kind, "messages")
    assert [r.turns for r in found] == [(("user", "q"), ("assistant", "a"))] * 2  # type: ignore


def nested_table(content: bytes, kind: pyarrow.DataType) -> pyarrow.Table:
    """Two conversations; the second one's user says `content`, which need not be UTF-8."""
    raw = pyarrow.array([b"q", b"a", content, b"a"])
    texts = pyarrow.Array.from_buffers(kind, 4, raw.buffers())
    roles = pyarrow.array(["user", "assistant"] * 2)
    turns = pyarrow.StructArray.from_arrays([roles, texts], names=["role", "content"])
    return pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 2, 4], turns)})


def test_invalid_utf8_in_a_message_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(nested_table(b"q\xff", pyarrow.string()), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: invalid UTF-8 at byte 2"):
        read(str(path), "parquet", "messages")


def test_bytes_never_pass_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(nested_table(b"q", pyarrow.binary()), path)
    with pytest.raises(DataError, match=r"a\.parquet:1: column 'messages' is list.*binary"):
        read(str(path), "parquet", "messages")


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_damaged_json_value_is_a_bad_row(content: str, tmp_path: Path) -> None:
    column = pyarrow.ExtensionArray.from_storage(
        pyarrow.json_(), pyarrow.array(['[{"role": "user", "content": "q"}]', content])
    )
    pq.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:1: field 'messages' must end with"):
        read(str(tmp_path), "parquet", "messages")
    pq.write_table(pyarrow.table({"messages": column[1:]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:1: a value of a JSON column is not JSON"):
        read(str(tmp_path), "parquet", "messages")

"""Token stores are addressed by all that decides their content, our own rules included."""

import json
from pathlib import Path

import pytest
from composing import composed
from small_models import ASSETS

from mediphi import preparation
from mediphi.backbone import load_tokenizer
from mediphi.config import load
from mediphi.data.corpora import SIDES
from mediphi.errors import DataError
from mediphi.preparation import PreparedData, prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = ({"id": f"n{i}", "text": f"Note {i}. Seen {i * 7} times. " * 3} for i in range(20))
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prepared(folder: Path, *overrides: str) -> PreparedData:
    config = load(
        composed(
            "stage=pit",
            "stage.quiz=null",
            "corpus=local",
            f"corpus.sources.mine.path={folder / 'notes.jsonl'}",
            "corpus.sources.mine.id_field=id",
            "corpus.heldout_fraction=0.3",
            f"paths.cache={folder / 'cache'}",
            *overrides,
        )
    )
    return prepare(config, load_tokenizer(str(ASSETS / "tiny")))


def stores(data: PreparedData) -> set[Path]:
    return {getattr(data, side).path for side in SIDES}


def stamps(data: PreparedData) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for store in stores(data) for p in store.iterdir()}


def test_another_version_of_the_rules_gives_another_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(folder)
    before = stamps(first)
    assert stores(prepared(folder)) == stores(first)  # negative control
    monkeypatch.setattr(preparation, "GENERATOR", preparation.GENERATOR + ".next")
    second = prepared(folder)
    assert stores(second).isdisjoint(stores(first))
    assert second.fingerprint == first.fingerprint  # the data are the same, the rules are not
    monkeypatch.undo()
    assert stores(prepared(folder)) == stores(first)
    assert stamps(first) == before


def test_another_version_of_the_rendering_gives_another_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(folder)
    monkeypatch.setattr(preparation, "RENDER_VERSION", f"{preparation.RENDER_VERSION}.next")
    assert stores(prepared(folder)).isdisjoint(stores(first))


# --- task outputs from files --------------------------------------------------------------------


def write_outputs(folder: Path, *spoilt: str | dict[str, str]) -> list[str]:
    """One summary a document, and rows that are bad, from line 4 on. Returns the overrides."""
    rows = [
        {"document_id": f"mine/n{i}", "kind": "summary", "text": f"Sum {i}.", "generator": "me/1"}
        for i in range(20)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = [row if isinstance(row, str) else json.dumps(rows[0] | row) for row in spoilt]
    (folder / "outputs.jsonl").write_text("\n".join(lines) + "\n")
    path = f"corpus.task_outputs.path={folder / 'outputs.jsonl'}"
    return ["corpus.task_outputs.generator=files", path]


BAD = ('{"document_id": "canary', {"document_id": "mine/canary"}, {"kind": "poem"})


def test_bad_task_outputs_are_set_aside_and_counted_apart_from_the_documents(folder: Path) -> None:
    skip = ["corpus.on_bad=skip", "corpus.max_bad_share=0.2"]
    data = prepared(folder, *write_outputs(folder, *BAD), *skip)
    assert data.counts["task_outputs.path"] == {"read": 20, "rejected": 3}
    assert data.counts["mine"]["read"] == 20 and data.counts["mine"]["rejected"] == 0
    (quarantine,) = (folder / "cache").rglob("*.quarantine.txt")
    lines = quarantine.read_text().splitlines()
    starts = [f"{folder / 'outputs.jsonl'}:{number}: " for number in (4, 5, 6)]
    assert [line[: len(starts[0])] for line in lines] == starts
    assert "canary" not in quarantine.read_text()
    again = prepared(folder, *write_outputs(folder, *BAD), *skip)
    assert again.counts == data.counts and stores(again) == stores(data)


def test_what_is_trained_on_is_what_the_file_says(folder: Path) -> None:
    """A summary for every document, where the rules write none for some."""
    counted = [
        sum(
            count.pieces
            for side in SIDES
            for count in getattr(data, side).manifest.counts
            if count.kind == "summary"
        )
        for data in (prepared(folder), prepared(folder, *write_outputs(folder)))
    ]
    assert counted[0] != counted[1] == 20


@pytest.mark.parametrize(
    ("bad", "reason"), [*zip(BAD, ["not JSON", "names no document", "'kind' is none"], strict=True)]
)
def test_strict_refuses_a_bad_task_output_by_file_and_line(
    bad: str | dict[str, str], reason: str, folder: Path
) -> None:
    with pytest.raises(DataError) as caught:
        prepared(folder, *write_outputs(folder, bad))
    said = str(caught.value)
    assert said.startswith(f"{folder / 'outputs.jsonl'}:4: ") and reason in said
    assert "canary" not in said and "\n" not in said
    assert not list((folder / "cache").glob("tokens/*"))


def test_too_many_bad_task_outputs_are_refused_even_under_skip(folder: Path) -> None:
    with pytest.raises(DataError, match=r"3 of 23 rows are bad .*max_bad_share allows 1\.00%"):
        prepared(folder, *write_outputs(folder, *BAD), "corpus.on_bad=skip")

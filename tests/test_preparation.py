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
from mediphi.errors import DataError, UserError
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


def test_a_corpus_that_is_all_held_out_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="corpus 'local': nothing to train on, all is held out"):
        prepared(folder, "corpus.sources.mine.side=heldout")
    assert prepared(folder, "corpus.sources.mine.side=train").heldout.num_tokens == 0  # control


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


# --- rows that a model's chat template treats in another way -------------------------------------

THINKING = "(message['content'].split('</think>')[-1])"
CHAT = (
    "stage=sft",
    "corpus.sources.mine.format=messages",
    "corpus.deduplicate.near=false",
    "corpus.heldout_fraction=0.3",
)


def chats(folder: Path, *odd: int) -> Path:
    """Twenty conversations; those of the numbers given hold what the template would drop."""
    rows = [
        {
            "key": f"c{number}",
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": f"{'canary</think>' * (number in odd)}{number}."},
            ],
        }
        for number in range(20)
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared_chats(path: Path, *overrides: str, template: str = THINKING) -> PreparedData:
    source = [f"corpus.sources.mine.path={path}", "corpus.sources.mine.id_field=key"]
    places = [f"paths.cache={path.parent / 'cache'}", "corpus=local"]
    tokenizer = load_tokenizer(str(ASSETS / "tiny"))
    given = str(tokenizer.chat_template)
    tokenizer.chat_template = given.replace("message['content']", template)
    return prepare(load(composed(*CHAT, *source, *places, *overrides)), tokenizer)


def test_duplicates_are_told_once_a_side_from_the_cache_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = chats(folder)
    prepared_chats(path, template="message['content']")
    assert "left out" not in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows += [row | {"key": row["key"] + "x"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepared_chats(path, template="message['content']").counts["mine"]
    told = "".join(
        f"left out    {gone} of {2 * gone} {side} rows: "
        f"exact duplicates {gone}, near duplicates 0\n"
        for side, gone in (("training", counts["train"]), ("held-out", counts["heldout"]))
    )
    assert capsys.readouterr().out == told
    prepared_chats(path, template="message['content']")
    assert capsys.readouterr().out == told


SKIP = ("corpus.on_bad=skip", "corpus.max_bad_share=0.2")


def test_rows_that_fail_the_proof_are_set_aside_and_counted(folder: Path) -> None:
    path = chats(folder, 4, 17)
    control = prepared_chats(path, *SKIP, template="message['content']")
    assert control.counts["mine"]["rejected"] == 0 and control.counts["mine"]["read"] == 20
    data = prepared_chats(path, *SKIP)
    counts = data.counts["mine"]
    assert (counts["read"], counts["rejected"]) == (18, 2)
    assert counts["train"] + counts["heldout"] == 18
    for side in SIDES:
        store = getattr(data, side)
        assert store.documents_per_source() == {"mine": counts[side]}
        names = {store.document_id(row) for row in range(counts[side])}
        assert names.isdisjoint({"mine/c4", "mine/c17"})
    (quarantine,) = (folder / "cache").rglob("*.quarantine.txt")
    reason = "the tokenizer's chat template gives other tokens for this row"
    lines = sorted(quarantine.read_text().splitlines())
    assert lines == [f"{path}:18: {reason}", f"{path}:5: {reason}"]
    again = prepared_chats(path, *SKIP)  # from the cache
    assert again.counts == data.counts and stores(again) == stores(data)
    assert stores(control).isdisjoint(stores(data))


def test_strict_refuses_a_row_that_fails_the_proof_by_file_and_line(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared_chats(path := chats(folder, 4))
    assert str(caught.value).startswith(f"{path}:5: the tokenizer's chat template gives other")
    assert "canary" not in str(caught.value)
    assert not list((folder / "cache").glob("tokens/*"))


def test_too_many_rows_that_fail_the_proof_are_refused_every_time(folder: Path) -> None:
    path = chats(folder, *range(5))
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"5 of 20 rows are bad .*max_bad_share allows 20\.00%"):
            prepared_chats(path, *SKIP)


def test_behind_a_row_that_failed_every_row_is_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PROVEN_FIRST", 0)
    monkeypatch.setattr(preparation, "PROVEN_EVERY", 7)
    whole = ("corpus.heldout_fraction=0", "corpus.on_bad=skip", "corpus.max_bad_share=0.5")
    by_sample = prepared_chats(chats(folder, 1, 2, 3), *whole)
    assert by_sample.counts["mine"]["rejected"] == 0  # none of 0, 7 and 14
    after_one = prepared_chats(chats(folder, 1, 7, 8, 9, 10), *whole)
    assert after_one.counts["mine"]["rejected"] == 4

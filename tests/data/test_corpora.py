import json
import random
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mediphi.config.corpus import Corpus, Deduplicate, FileSource, Licence, UnavailableSource
from mediphi.data import corpora
from mediphi.data.corpora import read_documents, split_side
from mediphi.data.duplicates import normalised, shingle_set, similarity
from mediphi.data.sources.bundled import content_key
from mediphi.errors import DataError, UserError
from mediphi.records import Conversation, Document, Preference, Turn

ASSETS = Path(__file__).resolve().parents[2] / "assets"
LICENCE = Licence(id="CC0-1.0", origin="test", commercial_ok=True)
DEFAULT_CATEGORIES = "755b16b7b4c94552ae80d2f8aff6895ffcdb18d54e384d6ea4b8f2b251a4ee03"
"""SHA-256 of side and id of each category that the default run reads."""
VOCABULARY = [f"word{i}" for i in range(500)]


def random_rows(seed: int, num_rows: int = 120, num_groups: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "id": f"{seed}-{i:04}",
            "patient": f"p{rng.randrange(num_groups)}",
            "text": " ".join(rng.choices(VOCABULARY, k=40)),
        }
        for i in range(num_rows)
    ]


def source(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> FileSource:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"id_field": "id", "group_field": "patient"}
    return FileSource(kind="jsonl", path=str(folder), licence=LICENCE, **(names | fields))


def corpus(sources: dict[str, Any], **fields: Any) -> Corpus:
    return Corpus(name="test", sources=sources, **({"heldout_fraction": 0.3} | fields))


def sides(wanted: Corpus) -> dict[str, str]:
    with read_documents(wanted) as reading:
        return {d.id: side for side in corpora.SIDES for d in reading.records(side)}


def test_every_row_comes_back_on_one_side(tmp_path: Path) -> None:
    rows = random_rows(1)
    with read_documents(corpus({"a": source(tmp_path, rows)})) as reading:
        train, heldout = ([*reading.records(side)] for side in corpora.SIDES)
        everything = list(reading.records())
    assert sorted(d.text for d in train + heldout) == sorted(row["text"] for row in rows)
    assert Counter(d.id for d in everything) == Counter(d.id for d in train + heldout)
    assert everything[0] == Document(
        "a/1-0000", "patient=" + rows[0]["patient"], "a", rows[0]["text"]
    )
    assert len(reading) == len(rows) == reading.counts["a"].read
    assert (len(train), len(heldout)) == (reading.counts["a"].train, reading.counts["a"].heldout)
    assert min(len(train), len(heldout)) > 10


def test_no_group_stands_on_two_sides_even_over_sources(tmp_path: Path) -> None:
    wanted = corpus(
        {"a": source(tmp_path / "a", random_rows(1)), "b": source(tmp_path / "b", random_rows(2))}
    )
    with read_documents(wanted) as reading:
        groups = [{d.group_id for d in reading.records(side)} for side in corpora.SIDES]
        seen_in = {d.source for d in reading.records() if d.group_id == "patient=p3"}
    assert not groups[0] & groups[1]
    assert all(groups)
    assert seen_in == {"a", "b"}  # the claim is about groups that really span sources


def test_a_split_by_row_would_tear_groups_apart(tmp_path: Path) -> None:
    """Negative control of the test above."""
    reading = read_documents(corpus({"a": source(tmp_path, random_rows(1), group_field=None)}))
    patients = {f"a/{row['id']}": row["patient"] for row in random_rows(1)}
    groups = [{patients[d.id] for d in reading.records(side)} for side in corpora.SIDES]
    assert groups[0] & groups[1]
    reading.close()


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.randoms(use_true_random=False))
def test_row_order_changes_neither_split_nor_choice(tmp_path: Path, rng: random.Random) -> None:
    rows = random_rows(1)
    rows += [row | {"id": row["id"] + "x", "patient": "q"} for row in rows[:20]]
    expected = sides(corpus({"a": source(tmp_path / "a", rows, max_documents=90)}))
    shuffled = rng.sample(rows, len(rows))
    assert sides(corpus({"a": source(tmp_path / "b", shuffled, max_documents=90)})) == expected


def test_another_source_moves_no_document(tmp_path: Path) -> None:
    a, b = source(tmp_path / "a", random_rows(1)), source(tmp_path / "b", random_rows(2))
    alone, together = sides(corpus({"a": a})), sides(corpus({"b": b, "a": a}))
    assert {i: side for i, side in together.items() if i.startswith("a/")} == alone


def test_a_larger_fraction_only_adds_to_the_held_out(tmp_path: Path) -> None:
    a = source(tmp_path, random_rows(1), group_field=None)
    held = [
        {i for i, side in sides(corpus({"a": a}, heldout_fraction=f)).items() if side == "heldout"}
        for f in (0.0, 0.1, 0.3, 0.5)
    ]
    assert held[0] == set()
    assert held[0] < held[1] < held[2] < held[3]


def test_the_split_is_the_same_on_every_machine() -> None:
    assert [g for g in range(100) if split_side(f"icd10cm/{g}", 0.05) == "heldout"] == [
        19,
        23,
        32,
        85,
        97,
    ]
    held_out = sum(split_side(str(i), 0.02) == "heldout" for i in range(20_000))
    assert 320 <= held_out <= 480  # four standard deviations around 400


def planted(tmp_path: Path) -> tuple[Corpus, int, int]:
    """Rows, then the same texts again, exactly and nearly, in other groups and another source."""
    rows = random_rows(1, 200)
    exact = [row | {"id": f"e{i}", "patient": f"e{i}"} for i, row in enumerate(rows[:50])]
    exact = [row | {"text": row["text"].upper() + " "} for row in exact]
    near = [
        row | {"id": f"n{i}", "patient": f"n{i}", "text": row["text"] + " added"}
        for i, row in enumerate(rows[50:120])
    ]
    sources = {"a": source(tmp_path / "a", rows), "b": source(tmp_path / "b", exact + near)}
    return corpus(sources, heldout_fraction=0.5), len(exact), len(near)


def test_planted_duplicates_are_removed_and_counted(tmp_path: Path) -> None:
    wanted, num_exact, num_near = planted(tmp_path)
    counts = read_documents(wanted).counts
    assert counts["b"].exact_duplicates == num_exact
    assert counts["b"].near_duplicates >= 0.95 * num_near
    assert (counts["a"].exact_duplicates, counts["a"].near_duplicates) == (0, 0)
    for count in counts.values():
        gone = count.not_chosen + count.exact_duplicates + count.near_duplicates
        assert count.read == gone + count.train + count.heldout


def test_no_text_stands_on_both_sides(tmp_path: Path) -> None:
    wanted, _, _ = planted(tmp_path)
    with read_documents(wanted) as reading:
        train, heldout = ([*reading.records(side)] for side in corpora.SIDES)
    assert not {normalised(d.text) for d in train} & {normalised(d.text) for d in heldout}
    held = [shingle_set(d.text) for d in heldout]
    closest = max(similarity(shingle_set(d.text), other) for d in train for other in held)
    assert closest < 0.8


def test_without_deduplication_texts_would_stand_on_both_sides(tmp_path: Path) -> None:
    """Negative control of the test above: near duplicates leak when they are allowed to stay."""
    wanted, _, num_near = planted(tmp_path)
    wanted = wanted.model_copy(update={"deduplicate": Deduplicate(near=False)})
    found = sides(wanted)
    pairs = [(f"a/1-{50 + i:04}", f"b/n{i}") for i in range(num_near)]
    assert any(found[one] != found[two] for one, two in pairs)


@pytest.mark.parametrize(("kind", "num_kept"), [("icd10cm", 2), ("jsonl", 1)])
def test_code_pages_are_never_near_duplicates(
    kind: str, num_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = " ".join(VOCABULARY)
    pages = [Document(f"a/{i}", "a/T25", "a", f"T25.{i} {page}") for i in range(2)]

    def read(*_: object, **__: object) -> Iterator[Document]:
        return iter(pages)

    monkeypatch.setattr(corpora.sources, "read", read)
    table = {"a": {"kind": kind, "path": str(tmp_path), "licence": LICENCE}}
    assert len(read_documents(corpus(table))) == num_kept


def test_a_share_is_chosen_by_hash_and_grows(tmp_path: Path) -> None:
    rows = random_rows(1)
    kept = [
        set(sides(corpus({"a": source(tmp_path, rows, max_documents=n)}))) for n in (10, 50, 500)
    ]
    assert [len(k) for k in kept] == [10, 50, 120]
    assert kept[0] < kept[1] < kept[2]
    assert kept[0] != {f"a/{row['id']}" for row in rows[:10]}


def conversation(number: int, **changes: Any) -> dict[str, Any]:
    row = {"instruction": f"Do {number}.", "input": f"Note {number}", "output": f"Answer {number}"}
    row |= {"id": number, "task_type": "ab"[number % 2], "quality": number / 2}
    return row | changes


def conversations(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> FileSource:
    return source(folder, rows, group_field=None, **({"format": "mediflow"} | fields))


def test_conversations_and_preferences_come_back_as_they_are(tmp_path: Path) -> None:
    row = conversation(0, rejected_output="Worse", error_type="brevity")
    group = "input=" + content_key("Note 0")
    prompt = (Turn("system", "Do 0."), Turn("user", "Note 0"))
    labels = {"task_type": "a"}
    found = [
        list(read_documents(corpus({"a": conversations(tmp_path, [row], format=f)})).records())
        for f in ("mediflow", "mediflow_dpo")
    ]
    turns = (*prompt, Turn("assistant", "Answer 0"))
    assert found[0] == [Conversation("a/0", group, "a", turns, labels=labels, quality=0.0)]
    labels |= {"error_type": "brevity"}
    pair = Preference("a/0", group, "a", prompt, "Answer 0", "Worse", labels=labels, quality=0.0)
    assert found[1] == [pair]


def test_conversations_about_one_text_stand_on_one_side(tmp_path: Path) -> None:
    rows = [conversation(n, input=f"Note {n % 25}") for n in range(100)]
    found = sides(corpus({"a": conversations(tmp_path, rows)}, deduplicate={"near": False}))
    assert len(found) == 100 and set(found.values()) == set(corpora.SIDES)
    assert all(found[f"a/{n}"] == found[f"a/{n % 25}"] for n in range(100))


def chat(number: int, system: str) -> dict[str, Any]:
    texts = (("system", system), ("user", f"Question {number}?"), ("assistant", f"It is {number}."))
    return {"id": number, "messages": [{"role": role, "content": text} for role, text in texts]}


def test_chats_that_share_a_system_prompt_all_stay(tmp_path: Path) -> None:
    rows = [chat(number, " ".join(VOCABULARY[:120])) for number in range(300)]
    chats = conversations(tmp_path, rows, format="messages")
    assert len(read_documents(corpus({"a": chats}))) == 300
    asked_for = read_documents(corpus({"a": chats}, deduplicate={"near": True}))
    assert len(asked_for) == 1 and asked_for.counts["a"].near_duplicates == 299


def test_pairs_of_one_prompt_all_stay_and_on_one_side(tmp_path: Path) -> None:
    prompts = [" ".join(VOCABULARY[n : n + 120]) for n in range(60)]
    rows = [
        {"id": f"{n}-{i}", "prompt": prompt, "chosen": f"Good {i}", "rejected": f"Bad {i}"}
        for n, prompt in enumerate(prompts)
        for i in range(4)
    ]
    pairs = conversations(tmp_path, rows, format="preference")
    found = sides(corpus({"a": pairs}))
    assert len(found) == 240 and set(found.values()) == set(corpora.SIDES)
    assert all(found[f"a/{n}-{i}"] == found[f"a/{n}-0"] for n in range(60) for i in range(4))
    by_row = sides(corpus({"a": pairs.model_copy(update={"group_field": "id"})}))
    assert any(by_row[f"a/{n}-{i}"] != by_row[f"a/{n}-0"] for n in range(60) for i in range(4))


def test_duplicates_are_counted_by_side(tmp_path: Path) -> None:
    rows = [chat(number, "Be brief.") for number in range(40)]
    rows += [row | {"id": f"{row['id']}x"} for row in rows]
    with read_documents(corpus({"a": conversations(tmp_path, rows, format="messages")})) as reading:
        counts = reading.counts["a"]
    gone = counts.exact_duplicates - counts.heldout_exact_duplicates
    assert (gone, counts.heldout_exact_duplicates) == (counts.train, counts.heldout)
    assert counts.train > 0 and counts.heldout > 0


def test_a_repeated_conversation_is_a_duplicate_and_another_answer_is_not(tmp_path: Path) -> None:
    rows = [conversation(0), conversation(0, id=1), conversation(0, id=2, output="Other")]
    wanted = corpus({"a": conversations(tmp_path, rows)}, deduplicate={"near": False})
    reading = read_documents(wanted)
    assert [record.id for record in reading.records()] == ["a/0", "a/2"]
    assert reading.counts["a"].exact_duplicates == 1


def test_a_source_may_stand_on_one_side_as_a_whole(tmp_path: Path) -> None:
    rows = [conversation(n) for n in range(40)]
    near: dict[str, Any] = {"deduplicate": {"near": False}}
    for side in corpora.SIDES:
        found = sides(corpus({"a": conversations(tmp_path / side, rows, side=side)}, **near))
        assert found == {f"a/{n}": side for n in range(40)}
    split = sides(corpus({"a": conversations(tmp_path / "split", rows)}, **near))
    assert set(split.values()) == set(corpora.SIDES)


def test_the_best_are_kept_and_the_unjudged_go_first(tmp_path: Path) -> None:
    rows = [conversation(n, quality=None if n < 5 else n % 10) for n in range(40)]
    wanted = conversations(tmp_path, rows, choose_by="quality", max_documents=20)
    reading = read_documents(corpus({"a": wanted}, deduplicate={"near": False}))
    assert Counter(record.quality for record in reading.records()) == dict.fromkeys(
        (9.0, 8.0, 7.0, 6.0, 5.0), 4
    )
    assert (reading.counts["a"].read, reading.counts["a"].not_chosen) == (40, 20)


@pytest.mark.parametrize(
    ("options", "column", "told"),
    [
        ({"choose_by": "quality"}, "quality", "choose_by=quality: "),
        ({"stratify_by": ("output_format",)}, "output_format", "stratify_by=[output_format]: "),
        (
            {"stratify_by": ("task_type", "output_format")},
            "output_format",
            "stratify_by=[task_type,output_format]: ",
        ),
    ],
)
def test_a_choice_by_a_column_that_no_row_has_is_refused_and_one_that_some_have_is_not(
    tmp_path: Path, options: dict[str, Any], column: str, told: str
) -> None:
    rows = [{k: v for k, v in conversation(n).items() if k != column} for n in range(40)]

    def reading(folder: str, rows: list[dict[str, Any]], **more: Any) -> corpora.CorpusReading:
        wanted = conversations(tmp_path / folder, rows, **options, **more)
        return read_documents(corpus({"a": wanted}, deduplicate={"near": False}))

    with pytest.raises(UserError) as caught:
        reading("none", rows, max_documents=20)
    said = str(caught.value)
    assert said.startswith(f"corpus.sources.a.{told}no row has a value in column '{column}'; ")
    assert caught.value.exit_code == 2 and "\n" not in said
    value = {"quality": 3.0, "output_format": "json"}[column]
    assert reading(
        "one", [*rows, rows[0] | {"id": 99, "input": "x", column: value}], max_documents=20
    )
    assert reading("all", rows, max_documents=40).counts["a"].not_chosen == 0


@pytest.mark.parametrize("choose_by", ["hash", "quality"])
def test_rows_are_shared_out_over_strata_whatever_their_order(
    tmp_path: Path, choose_by: str
) -> None:
    rows = [conversation(n, task_type="rare" if n < 3 else "abc"[n % 3]) for n in range(60)]
    near: dict[str, Any] = {"deduplicate": {"near": False}}
    options = {"choose_by": choose_by, "max_documents": 33, "stratify_by": ("task_type",)}
    first = sides(corpus({"a": conversations(tmp_path / "a", rows, **options)}, **near))
    random.Random(3).shuffle(rows)
    assert first == sides(corpus({"a": conversations(tmp_path / "b", rows, **options)}, **near))
    kinds = Counter(row["task_type"] for row in rows if f"a/{row['id']}" in first)
    assert kinds == {"rare": 3, "a": 10, "b": 10, "c": 10}


def test_the_default_corpus_keeps_its_400_categories() -> None:
    table = {
        "kind": "icd10cm",
        "path": str(ASSETS / "corpora" / "icd10cm_2021"),
        "levels": ["category"],
        "max_documents": 400,
        "licence": LICENCE,
    }
    with read_documents(Corpus(name="medcode", sources={"icd10cm": table})) as reading:
        found = [f"{side} {d.id}" for side in corpora.SIDES for d in reading.records(side)]
    assert len(found) == 400
    assert sha256("\n".join(found).encode()).hexdigest() == DEFAULT_CATEGORIES


def test_facts_survive_the_spool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = Document("a/1", "a/1", "a", "text", "title", {"ancestors": [["A", "b"]], "n": None})
    monkeypatch.setattr(corpora.sources, "read", lambda *_, **__: iter([page]))
    table = {"a": {"kind": "text", "path": str(tmp_path), "licence": LICENCE}}
    assert list(read_documents(corpus(table)).records()) == [page]


def test_reading_knows_dropped_documents_too(tmp_path: Path) -> None:
    with read_documents(
        corpus({"a": source(tmp_path, random_rows(1), max_documents=3)})
    ) as reading:
        assert all(f"a/{row['id']}" in reading for row in random_rows(1))
        assert "a/none" not in reading
        assert 5 not in reading


def test_bad_rows_are_counted_and_quarantined_anew(tmp_path: Path) -> None:
    rows = [*random_rows(1), {"id": "z", "patient": "p", "text": None}]
    wanted = corpus({"a": source(tmp_path / "a", rows)}, on_bad="skip")
    quarantine = tmp_path / "bad.txt"
    for _ in range(2):
        reading = read_documents(wanted, quarantine=quarantine)
        assert reading.counts["a"].rejected == 1
        assert len(quarantine.read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:121: field 'text' is null"):
        read_documents(wanted.model_copy(update={"on_bad": "strict"}))
    with pytest.raises(DataError, match=r"1 of 121 rows are bad"):
        read_documents(wanted.model_copy(update={"max_bad_share": 0.001}))


def test_one_id_in_two_documents_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = [Document("x/1", "x/1", "a", text) for text in ("one", "two")]
    monkeypatch.setattr(corpora.sources, "read", lambda *_, **__: iter(pages))
    table = {"a": {"kind": "text", "path": str(tmp_path), "licence": LICENCE}}
    with pytest.raises(DataError, match="two documents have the id x/1"):
        read_documents(corpus(table))


def test_a_corpus_without_documents_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpora.sources, "read", lambda *_, **__: iter(()))
    table = {"a": {"kind": "text", "path": str(tmp_path), "licence": LICENCE}}
    with pytest.raises(UserError, match="corpus 'test': no documents"):
        read_documents(corpus(table))


def test_an_unavailable_source_says_so() -> None:
    table = {"a": UnavailableSource(kind="unavailable", licence=LICENCE, obtain="PMC from NLM")}
    with pytest.raises(UserError, match="PMC from NLM"):
        read_documents(corpus(table))

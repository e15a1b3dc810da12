"""Rows of conversations and preferences, judged by what TRL makes of the same rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_models import ASSETS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mediphi.config.corpus import FileSource, Licence
from mediphi.data import sources
from mediphi.data.bad_rows import BadRows
from mediphi.data.sources.chat_rows import Dialogue, Pair, group, parts, split_at_common_prompt
from mediphi.data.sources.rows import Rows
from mediphi.errors import DataError
from mediphi.records import Conversation, Document, Preference, Record, Turn

LICENCE = Licence(id="CC0-1.0", origin="test", commercial_ok=True)
SECRET = "canary-patient"
MEDIFLOW = {
    "instruction": "Summarise the note.\n",
    "input": "  Cough for a week. ",
    "output": "\nA cough.",
    "task_type": "summarization",
    "input_data": "Clinical Note",
    "output_format": "plain_text",
    "difficulty_level": "low",
    "rejected_output": None,
    "error_type": None,
    "quality": 3.25,
    "alignment": 4.0,
}
MEDIFLOW_DPO = MEDIFLOW | {"rejected_output": "A cold.", "error_type": "factual inaccuracy"}
PROMPT = (Turn("system", "Summarise the note."), Turn("user", "Cough for a week."))

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
chat_texts = texts.map(str.strip).filter(lambda text: text.strip("\ufeff\u200b \t\r\n\v\f"))
plain_texts = texts.filter(lambda text: not text.isspace() and text.strip("\ufeff\u200b \n\t"))


def message(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


def told(*turns: Turn) -> list[dict[str, str]]:
    return [message(role, text) for role, text in turns]


@st.composite
def prompts(draw: st.DrawFn, max_rounds: int = 2) -> list[dict[str, Any]]:
    """A system message or none, some rounds, and a question."""
    system = [message("system", draw(chat_texts))] if draw(st.booleans()) else []
    rounds = [
        message(role, draw(chat_texts))
        for _ in range(draw(st.integers(0, max_rounds)))
        for role in ("user", "assistant")
    ]
    return [*system, *rounds, message("user", draw(chat_texts))]


answers = chat_texts.map(lambda text: [message("assistant", text)])


@st.composite
def completions(draw: st.DrawFn) -> list[dict[str, Any]]:
    """An answer, then some rounds."""
    rounds = [*draw(prompts()), *draw(answers)] if draw(st.booleans()) else []
    return [*draw(answers), *(m for m in rounds if m["role"] != "system")]


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    pytest.importorskip("trl")
    from trl import data_utils

    return data_utils


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


def rendered(tokenizer: PreTrainedTokenizerBase, *turns: Turn) -> str:
    return tokenizer.apply_chat_template(told(*turns), tokenize=False)  # type: ignore[return-value]


@settings(deadline=None)
@given(prompts(), answers)
def test_messages_render_as_trl_renders_them(
    trl: ModuleType, tokenizer: PreTrainedTokenizerBase, prompt: list, answer: list
) -> None:
    row = {"messages": prompt + answer}
    found = parts(row, "messages")
    assert isinstance(found, Dialogue)
    assert found.is_chat is trl.is_conversational(row)
    assert told(*found.turns) == row["messages"]
    assert rendered(tokenizer, *found.turns) == trl.apply_chat_template(row, tokenizer)["text"]


@settings(deadline=None)
@given(prompts(), completions())
def test_prompt_and_completion_render_as_trl_renders_them(
    trl: ModuleType, tokenizer: PreTrainedTokenizerBase, prompt: list, completion: list
) -> None:
    row = {"prompt": prompt, "completion": completion}
    found = parts(row, "prompt_completion")
    assert isinstance(found, Dialogue)
    assert found.is_chat is trl.is_conversational(row) is True
    assert told(*found.turns[: found.num_prompt_turns]) == prompt
    expected = trl.apply_chat_template(row, tokenizer)
    assert rendered(tokenizer, *found.turns) == expected["prompt"] + expected["completion"]


@settings(deadline=None)
@given(plain_texts, plain_texts)
def test_plain_prompt_and_completion_are_kept_exactly(
    trl: ModuleType, prompt: str, completion: str
) -> None:
    row = {"prompt": prompt, "completion": completion}
    found = parts(row, "prompt_completion")
    assert found == Dialogue((Turn("user", prompt), Turn("assistant", completion)), is_chat=False)
    assert found.is_chat is trl.is_conversational(row)


@settings(deadline=None)
@given(prompts(), answers, answers)
def test_an_explicit_and_an_implicit_prompt_are_what_trl_finds(
    trl: ModuleType, prompt: list, chosen: list, rejected: list
) -> None:
    assume(chosen != rejected)
    explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    implicit = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    both = implicit | {"prompt": prompt[-1]["content"]}
    for row in (explicit, implicit, both):
        found = parts(row, "preference")
        assert isinstance(found, Pair)
        expected = trl.maybe_extract_prompt(row)
        assert found.is_chat is trl.is_conversational(row | {"prompt": expected["prompt"]})
        assert told(*found.prompt) == expected["prompt"] == prompt
        assert [message("assistant", found.chosen)] == expected["chosen"]
        assert [message("assistant", found.rejected)] == expected["rejected"]


@settings(deadline=None)
@given(plain_texts, plain_texts, plain_texts)
def test_plain_preferences_are_kept_exactly(
    trl: ModuleType, prompt: str, chosen: str, rejected: str
) -> None:
    assume(chosen != rejected)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    found = parts(row, "preference")
    assert found == Pair((Turn("user", prompt),), chosen, rejected, is_chat=False)
    assert trl.maybe_extract_prompt(row) == row


words = st.lists(st.sampled_from(["blue", "black", "sky", "is", "a", "b", "Q:", "-"]), min_size=1)


@settings(deadline=None)
@given(words, words, words)
def test_plain_texts_that_differ_at_a_word_split_where_trl_splits_them(
    trl: ModuleType, prompt: list[str], chosen: list[str], rejected: list[str]
) -> None:
    assume(chosen[0][0] != rejected[0][0])
    row = {"chosen": " ".join(prompt + chosen), "rejected": " ".join(prompt + rejected)}
    expected = trl.extract_prompt(row)
    assert split_at_common_prompt(**row) == tuple(expected.values())
    assert expected["prompt"] == " ".join(prompt)


@settings(deadline=None)
@given(texts, plain_texts, plain_texts)
def test_a_split_loses_nothing_and_cuts_no_word(
    trl: ModuleType, prompt: str, chosen: str, rejected: str
) -> None:
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    try:
        found, better, worse = split_at_common_prompt(**row)
    except ValueError:
        return
    assert (found + better, found + worse) == tuple(row.values())
    assert found.strip() and better.strip() and worse.strip()
    assert not found[-1].isalnum() or not (better[0].isalnum() or worse[0].isalnum())
    if row["chosen"] != row["rejected"]:
        assert trl.extract_prompt(row)["prompt"].startswith(found)


@pytest.mark.parametrize(
    ("chosen", "rejected", "ours", "theirs"),
    [
        ("It is blue", "It is black", ("It is", " blue", " black"), ("It is bl", "ue", "ack")),
        ("It is", "It is not", ("It", " is", " is not"), ("It i", "s", "s not")),
        ("Q\nred", "Q\nblue", ("Q\n", "red", "blue"), ("Q\n", "red", "blue")),
    ],
)
def test_where_trl_would_cut_a_word_we_go_back_to_its_start(
    trl: ModuleType, chosen: str, rejected: str, ours: tuple, theirs: tuple
) -> None:
    assert split_at_common_prompt(chosen, rejected) == ours
    row = {"chosen": chosen, "rejected": rejected}
    assert tuple(trl.extract_prompt(row).values()) == theirs


def record(row: Mapping[str, Any], layout: str, **fields: Any) -> Record:
    source = FileSource(kind="jsonl", path="-", licence=LICENCE, format=layout, **fields)  # type: ignore
    found = Rows(source, "s", BadRows()).record(row, file="f", line=1, key="f:1")
    assert found is not None
    return found


LABELS = {
    "task_type": "summarization",
    "input_data": "Clinical Note",
    "output_format": "plain_text",
    "difficulty_level": "low",
}


def test_a_mediflow_row_is_a_conversation() -> None:
    assert record(MEDIFLOW, "mediflow") == Conversation(
        "s/f:1",
        group(parts(MEDIFLOW, "mediflow")),
        "s",
        (*PROMPT, Turn("assistant", "A cough.")),
        labels=LABELS,
        quality=3.25,
    )


def test_a_mediflow_pair_is_a_preference() -> None:
    found = record(MEDIFLOW_DPO, "mediflow_dpo")
    labels = LABELS | {"error_type": "factual inaccuracy"}
    assert found == Preference(
        "s/f:1",
        group(parts(MEDIFLOW, "mediflow")),
        "s",
        PROMPT,
        "A cough.",
        "A cold.",
        labels=labels,
        quality=3.25,
    )


@pytest.mark.parametrize("empty", [None, "", "  \n"])
@pytest.mark.parametrize("layout", ["mediflow", "mediflow_dpo"])
def test_an_instruction_without_a_document_is_the_users_turn(layout: str, empty: object) -> None:
    found = record(MEDIFLOW_DPO | {"input": empty}, layout)
    prompt = found.prompt if isinstance(found, Preference) else found.turns[:-1]  # type: ignore
    assert prompt == (Turn("user", "Summarise the note."),)


def test_labels_and_quality_may_be_absent_or_null() -> None:
    row = {name: MEDIFLOW[name] for name in ("instruction", "input", "output")}
    for more in ({}, {"task_type": None, "output_format": "", "quality": None}):
        found = record(row | more, "mediflow")
        assert isinstance(found, Conversation)
        assert (found.labels, found.quality) == ({}, None)
    assert record(row | {"quality": 3}, "mediflow").quality == 3.0  # type: ignore[union-attr]


def test_rows_about_one_text_are_one_group() -> None:
    def group_of(**changes: object) -> str:
        return record(MEDIFLOW_DPO | changes, "mediflow").group_id

    assert group_of(instruction="Other", output="B") == group_of(input="cough FOR a\nweek!")
    assert group_of(input="Cough for a month.") != group_of()
    assert group_of(input=None) == group_of(input="", output="B") != group_of()
    assert group_of(input=None) != group_of(input=None, instruction="Other")
    assert record(MEDIFLOW_DPO, "mediflow_dpo").group_id == group_of()


ROWS = {
    "messages": {"messages": told(*PROMPT, Turn("assistant", "A cough."))},
    "prompt_completion": {"prompt": "Cough", "completion": " is bad"},
    "preference": {"chosen": "It is a cough", "rejected": "It is a cold"},
    "mediflow": MEDIFLOW,
    "mediflow_dpo": MEDIFLOW_DPO,
}


@pytest.mark.parametrize("layout", ROWS)
def test_columns_give_id_and_group_in_every_format(layout: str) -> None:
    row = ROWS[layout] | {"key": 7, "patient": "p"}
    found = record(row, layout, id_field="key", group_field="patient")
    assert (found.id, found.group_id, found.source) == ("s/7", "patient=p", "s")


def test_rows_that_answer_one_prompt_are_one_group_in_every_format() -> None:
    def about(text: str, answer: str, system: str) -> set[str]:
        asked = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        said, worse = ([{"role": "assistant", "content": a}] for a in (answer, "Nothing."))
        rows = [
            ("messages", {"messages": asked + said}),
            ("prompt_completion", {"prompt": text, "completion": answer}),
            ("prompt_completion", {"prompt": asked, "completion": said}),
            ("prompt_completion", {"prompt": asked, "completion": said + asked[1:] + said}),
            ("preference", {"prompt": text, "chosen": answer, "rejected": "Nothing."}),
            ("preference", {"prompt": asked, "chosen": said, "rejected": worse}),
            ("preference", {"chosen": asked + said, "rejected": asked + worse}),
            ("mediflow", {"instruction": system, "input": text, "output": answer}),
        ]
        return {record(row, layout).group_id for layout, row in rows}

    one = about("Cough for a week.", "A cold.", "Be brief.")
    assert len(one) == 1 and one == about("cough FOR a\nweek", "A flu.", "Be kind.")
    assert one != about("Cough for a month.", "A cold.", "Be brief.")


def test_a_longer_conversation_is_another_group() -> None:
    turns = told(*PROMPT, Turn("assistant", "A cough."))
    more = turns + told(Turn("user", "Since when?"), Turn("assistant", "A week."))
    short, long = (record({"messages": m}, "messages").group_id for m in (turns, more))
    assert short != long


def test_a_long_group_is_named_by_its_words() -> None:
    rows = [MEDIFLOW | {"instruction": text} for text in ("go " * 40, "Go\n" * 40, "no " * 40)]
    names = [record(row, "mediflow", group_field="instruction").group_id for row in rows]
    assert names[0] == names[1] != names[2]
    assert max(map(len, names)) < 40


def test_content_may_come_in_parts() -> None:
    content = [{"type": "text", "text": " A "}, {"type": "text", "text": "cough. ", "image": None}]
    found = parts({"messages": [message("user", content), message("assistant", "B")]}, "messages")
    assert found == Dialogue((Turn("user", "A cough."), Turn("assistant", "B")))


@pytest.mark.parametrize("content", ["", None, " \n", []])
def test_an_empty_system_message_is_left_out_as_the_template_does(
    tokenizer: PreTrainedTokenizerBase, content: object
) -> None:
    turns = (Turn("user", "A"), Turn("assistant", "B"))
    found = parts({"messages": [message("system", content), *told(*turns)]}, "messages")
    assert found == Dialogue(turns)
    assert rendered(tokenizer, Turn("system", ""), *turns) == rendered(tokenizer, *turns)


@pytest.mark.parametrize("void", [None, [], {}, "", "[]", {"enable_thinking": None}])
def test_columns_and_keys_without_a_value_change_nothing(void: object) -> None:
    row = {"messages": [message("user", "A"), message("assistant", "B") | {"tool_calls": void}]}
    assert parts(row | {"tools": void, "chat_template_kwargs": void}, "messages") == Dialogue(
        (Turn("user", "A"), Turn("assistant", "B"))
    )


U, A = message("user", "q"), message("assistant", SECRET)
S = message("system", SECRET)
B = message("assistant", "other")
BAD_ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no_output": ("mediflow", {"instruction": "a", "input": "b"}, "field 'output' is missing"),
    "no_input": ("mediflow", {"instruction": "a", "output": "b"}, "field 'input' is missing"),
    "null_instruction": ("mediflow", MEDIFLOW | {"instruction": None}, "'instruction' is null"),
    "empty_output": ("mediflow", MEDIFLOW | {"output": " \n"}, "field 'output' is empty"),
    "numeric_input": ("mediflow", MEDIFLOW | {"input": 5}, "field 'input' is int, expected a str"),
    "nul_in_input": ("mediflow", MEDIFLOW | {"input": f"{SECRET}\0"}, "'input' holds a NUL"),
    "half_surrogate": ("mediflow", MEDIFLOW | {"output": f"{SECRET}\ud800"}, "surrogate pair"),
    "label_is_list": ("mediflow", MEDIFLOW | {"task_type": [SECRET]}, "'task_type' is list"),
    "quality_is_text": ("mediflow", MEDIFLOW | {"quality": SECRET}, "'quality' is str, expected a"),
    "quality_is_bool": ("mediflow", MEDIFLOW | {"quality": True}, "'quality' is bool"),
    "quality_is_inf": ("mediflow", MEDIFLOW | {"quality": 1e999}, "'quality' is not finite"),
    "quality_is_huge": ("mediflow", MEDIFLOW | {"quality": 10**400}, "'quality' is not finite"),
    "no_rejected": ("mediflow_dpo", MEDIFLOW, "field 'rejected_output' is null"),
    "same_answers": ("mediflow_dpo", MEDIFLOW | {"rejected_output": "A cough. "}, "are the same"),
    "no_messages": (
        "messages",
        {"conversations": [U, A]},
        "is missing, format=messages needs messages",
    ),
    "null_messages": ("messages", {"messages": None}, "'messages' is null, expected a list"),
    "text_messages": ("messages", {"messages": SECRET}, "'messages' is str, expected a list"),
    "empty_messages": ("messages", {"messages": []}, "field 'messages' is empty"),
    "message_is_text": ("messages", {"messages": [SECRET]}, "message 1 of field 'messages' is str"),
    "only_a_system": ("messages", {"messages": [S]}, "must end with a message of the assistant"),
    "only_a_void_system": ("messages", {"messages": [message("system", "")]}, "must end with"),
    "user_last": ("messages", {"messages": [U, A, U]}, "must end with a message of the assistant"),
    "two_users": ("messages", {"messages": [U, U, A]}, "has user where assistant is due"),
    "two_answers": ("messages", {"messages": [U, A, A]}, "has assistant where user is due"),
    "answer_first": ("messages", {"messages": [A, U, A]}, "has assistant where user is due"),
    "late_system": ("messages", {"messages": [U, S, A]}, "has system where assistant is due"),
    "two_systems": ("messages", {"messages": [S, S, U, A]}, "has system where user is due"),
    "other_role": ("messages", {"messages": [U, message(SECRET, "a")]}, "has none of the roles"),
    "tool_role": ("messages", {"messages": [U, message("tool", "a"), A]}, "has none of the roles"),
    "no_role": ("messages", {"messages": [{"from": "user", "value": SECRET}]}, "has none of the"),
    "no_content": ("messages", {"messages": [{"role": "user"}, A]}, "message 1 .* is null"),
    "empty_user": ("messages", {"messages": [message("user", " "), A]}, "message 1 .* is empty"),
    "empty_answer": ("messages", {"messages": [U, message("assistant", "")]}, "message 2 .* empty"),
    "no_parts": ("messages", {"messages": [message("user", []), A]}, "message 1 .* is empty"),
    "numeric": ("messages", {"messages": [message("user", 5), A]}, "message 1 .* is int"),
    "numeric_system": ("messages", {"messages": [message("system", 0), U, A]}, "1 .* is int"),
    "nul": ("messages", {"messages": [message("user", f"{SECRET}\0"), A]}, "holds a NUL"),
    "image": ("messages", {"messages": [message("user", [{"type": "image"}]), A]}, "that is no te"),
    "bare_part": ("messages", {"messages": [message("user", [SECRET]), A]}, "that is no text"),
    "void_part": ("messages", {"messages": [message("user", [{"type": "text"}]), A]}, "without a"),
    "rich_part": (
        "messages",
        {"messages": [message("user", [{"type": "text", "text": "a", "image": SECRET}]), A]},
        "has more than type and text",
    ),
    "tool_calls": (
        "messages",
        {"messages": [U, A | {"tool_calls": [1]}]},
        "more than role and con",
    ),
    "thinking": ("messages", {"messages": [U, A | {"thinking": SECRET}]}, "more than role and con"),
    "tools": ("messages", {"messages": [U, A], "tools": [{"name": "a"}]}, "'tools' is not empty"),
    "template_arguments": (
        "messages",
        {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}},
        "'chat_template_kwargs' is not empty",
    ),
    "images": ("preference", {"chosen": "a", "rejected": "b", "images": ["x"]}, "'images' is not"),
    "mixed": ("prompt_completion", {"prompt": SECRET, "completion": [A]}, "'prompt' is str"),
    "mixed_too": (
        "prompt_completion",
        {"prompt": [U], "completion": SECRET},
        "'completion' is str",
    ),
    "blank": ("prompt_completion", {"prompt": "q", "completion": " "}, "'completion' is empty"),
    "worse": ("prompt_completion", {"prompt": "q", "completion": "a", "label": False}, "is false"),
    "two": ("prompt_completion", {"prompt": [U], "completion": [A, U]}, "must end with a message"),
    "of_user": ("prompt_completion", {"prompt": [U], "completion": [U]}, "has user where assistan"),
    "of_system": ("prompt_completion", {"prompt": [U], "completion": [S, A]}, "has system where a"),
    "void": (
        "prompt_completion",
        {"prompt": [U], "completion": [message("system", ""), A]},
        "'completion' has system where assistant is due",
    ),
    "no_completion": ("prompt_completion", {"prompt": [U], "completion": []}, "is empty"),
    "answered": ("prompt_completion", {"prompt": [U, A], "completion": [A]}, "must end with a mes"),
    "same_text": ("preference", {"prompt": "q", "chosen": SECRET, "rejected": SECRET}, "the same"),
    "same_whole": ("preference", {"chosen": "a b c", "rejected": "a b c"}, "are the same"),
    "same_chat": ("preference", {"prompt": [U], "chosen": [A], "rejected": [A]}, "are the same"),
    "no_prompt": ("preference", {"chosen": SECRET, "rejected": "b"}, "no common beginning"),
    "one_word": ("preference", {"chosen": "blue", "rejected": "black"}, "no common beginning"),
    "empty_prompt": (
        "preference",
        {"prompt": [], "chosen": [A], "rejected": [B]},
        "'prompt' is em",
    ),
    "no_rejection": ("preference", {"prompt": "q", "chosen": "a"}, "field 'rejected' is missing"),
    "half_chat": ("preference", {"prompt": "q", "chosen": [U, A], "rejected": "b"}, "is str"),
    "list_text": (
        "preference",
        {"prompt": [U], "chosen": "a", "rejected": "b"},
        "'prompt' is l",
    ),
    "whole": ("preference", {"prompt": [U], "chosen": [U, A], "rejected": [B]}, "has 2 messages"),
    "early": ("preference", {"chosen": [U, A, U, A], "rejected": [U, B, U, A]}, "differ before"),
    "lengths": ("preference", {"chosen": [U, A, U, A], "rejected": [U, B]}, "differ before"),
    "bare_answers": ("preference", {"chosen": [A], "rejected": [B]}, "where user is due"),
    "stranger": (
        "preference",
        {"prompt": SECRET, "chosen": [U, A], "rejected": [U, B]},
        "'prompt' is no message of the user",
    ),
}


def read(path: Path, layout: str, bad_rows: BadRows) -> list[Record]:
    source = FileSource(kind="jsonl", path=str(path), licence=LICENCE, format=layout)  # type: ignore
    return list(sources.read(source, "s", bad_rows))


def without_infinity(row: dict[str, Any]) -> str:
    return json.dumps(row).replace("Infinity", "1e999")


@pytest.mark.parametrize(("layout", "row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_or_set_aside(
    layout: str, row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path, quarantine = tmp_path / "a.jsonl", tmp_path / "bad.txt"
    good = json.dumps(ROWS[layout])
    path.write_text(f"{good}\n{without_infinity(row)}\n{good}\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{reason}") as caught:
        read(path, layout, BadRows())
    with BadRows("skip", max_share=0.5, quarantine=quarantine) as bad_rows:
        found = read(path, layout, bad_rows)
    assert [r.id for r in found] == ["s/a:1", "s/a:3"]
    assert quarantine.read_text() == f"{caught.value}\n"
    assert str(caught.value).isprintable()
    assert SECRET not in str(caught.value)


def test_a_turn_above_the_text_limit_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediphi.data.sources.checked.MAX_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match=r"message 2 .* has 11 bytes, at most 10 are allowed"):
        parts({"messages": [U, message("assistant", "x" * 11)]}, "messages")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.sampled_from(list(ROWS)), st.data())
def test_any_row_becomes_a_sound_record_or_a_reason(layout: str, data: st.DataObject) -> None:
    row = ROWS[layout] | data.draw(
        st.dictionaries(st.sampled_from(list(ROWS[layout])), json_values)
    )
    try:
        found = record(row, layout)
    except DataError as reason:
        assert str(reason).startswith("f:1: ")
        return
    assert not isinstance(found, Document)
    turns = found.turns if isinstance(found, Conversation) else found.prompt
    spoken = [turn.role for turn in turns if turn.role != "system"]
    assert spoken == ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2)
    assert [turn.role for turn in turns].count("system") <= (turns[0].role == "system")
    assert turns[-1].role == ("assistant" if isinstance(found, Conversation) else "user")
    assert all(turn.text.strip() for turn in turns)


def test_reading_a_row_does_not_change_it() -> None:
    for layout, row in ROWS.items():
        before = json.dumps(row)
        assert parts(row, layout)  # type: ignore[arg-type]
        assert json.dumps(row) == before

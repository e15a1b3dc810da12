"""Chat rendering against the real tokenizer's own template, on every bundled row."""

import json
import lzma
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mediphi.batches import IGNORE, TokenBatch
from mediphi.data.chat import ChatRenderer
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import PlanSettings, TrainingPlan
from mediphi.data.render import neutralise
from mediphi.data.sequences import CHAT_KINDS
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey
from mediphi.errors import DataError, UserError
from mediphi.records import Conversation, Preference, Turn

ASSETS = Path(__file__).parents[2] / "assets"
FILES = {"train": 2500, "heldout": 400, "questions_train": 200, "questions_heldout": 20}
"""With the number of rows that are there at least."""
SETS = {f"{folder}/{f}": n for folder in ("mediflow", "mediflow_dpo") for f, n in FILES.items()}
TALK = (
    Turn("system", "You are  a nurse."),
    Turn("user", "Fever of 39 °C?\n\n  Since when"),
    Turn("assistant", "Two days.\nRest <|end|> and drink."),
    Turn("user", "And then"),
    Turn("assistant", "▁See a doctor 漢"),
)


BOTH = ("phi35_mini", "tiny")


@pytest.fixture(scope="module", params=BOTH)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS / "models" / request.param)


def rows(name: str) -> Iterator[dict[str, Any]]:
    with lzma.open(ASSETS / f"corpora/{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    return Turn("system", row["instruction"].strip()), Turn("user", row["input"].strip())


def conversation(row: dict[str, Any], number: int = 0) -> Conversation:
    answer = Turn("assistant", row["output"].strip())
    return Conversation(f"a/{number}", "g", "a", (*turns(row), answer))


def talk(*said: Turn, is_chat: bool = True) -> Conversation:
    return Conversation("a/1", "g", "a", said, is_chat=is_chat)


@pytest.mark.parametrize("name", SETS)
def test_every_bundled_row_is_what_the_chat_template_gives(
    tokenizer: PreTrainedTokenizerFast, name: str
):
    renderer = ChatRenderer(tokenizer)
    count = 0
    for row in rows(name):
        if "dpo" in name:
            sides = (row["output"].strip(), row["rejected_output"].strip())
            pair = Preference("a/1", "g", "a", turns(row), *sides)
            renderer.prove(pair, renderer.preference(pair))
        else:
            renderer.prove(conversation(row), renderer.conversation(conversation(row)))
        count += 1
    assert count >= SETS[name]


def test_many_turns_blanks_bytes_and_forged_tokens(tokenizer: PreTrainedTokenizerFast):
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.conversation(talk(*TALK))
    renderer.prove(talk(*TALK), rendered)
    answers = [piece for piece in rendered.pieces if piece.kind == "answer"]
    decoded = [tokenizer.decode(renderer.ids([piece])) for piece in answers]
    assert decoded == ["Two days.\nRest < |end|> and drink.<|end|>", " See a doctor 漢<|end|>"]


def test_a_conversation_without_a_system_turn(tokenizer: PreTrainedTokenizerFast):
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.conversation(talk(*TALK[1:3]))
    renderer.prove(talk(*TALK[1:3]), rendered)
    assert [piece.kind for piece in rendered.pieces] == ["user", "answer"]


def test_the_prompt_ends_where_generation_begins(tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": t.role, "content": neutralise(t.text)} for t in TALK[:4]]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ChatRenderer(tokenizer).prompt_ids(TALK[:4]) == expected


def test_the_templates_own_assistant_mask_is_empty(tokenizer: PreTrainedTokenizerFast):
    """Why spans are built here and not asked for."""
    messages = [{"role": t.role, "content": t.text} for t in TALK[:3]]
    out: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert not any(out["assistant_masks"])


def with_template(
    tokenizer: PreTrainedTokenizerFast, folder: Path, old: str, new: str
) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    other = AutoTokenizer.from_pretrained(folder)
    assert old in other.chat_template
    other.chat_template = other.chat_template.replace(old, new)
    return other


@pytest.mark.parametrize("answer", ["<|assistant|>Answer:", "{{ raise_exception('no answers') }}"])
def test_another_template_is_refused_before_any_row_is_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, answer: str
):
    other = with_template(tokenizer, tmp_path, "<|assistant|>", answer)
    with pytest.raises(UserError, match=r"chat template gives other tokens .* take a model whose"):
        ChatRenderer(other)


THINKING = "message['content'].split('</think>')[-1]"
REFUSING = "('</think>' in message['content'] and raise_exception('no')) or message['content']"


@pytest.mark.parametrize(
    ("text", "reason"), [(THINKING, "gives other tokens for this row"), (REFUSING, "refuses this")]
)
def test_a_row_that_the_template_treats_apart_is_told_without_its_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str, reason: str
):
    """As templates of thinking models do: what stands before `</think>` is dropped."""
    other = with_template(tokenizer, tmp_path, "message['content']", f"({text})")
    renderer = ChatRenderer(other)
    renderer.prove(talk(*TALK), renderer.conversation(talk(*TALK)))
    odd = talk(TALK[1], Turn("assistant", "canary</think> Yes."))
    with pytest.raises(ValueError, match=reason) as caught:
        renderer.prove(odd, renderer.conversation(odd))
    assert "canary" not in str(caught.value)
    assert renderer.version != ChatRenderer(tokenizer).version  # other rows may be set aside


def test_a_span_that_is_not_the_answer_is_refused(tokenizer: PreTrainedTokenizerFast):
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.conversation(talk(*TALK[:3]))
    first, second, answer = rendered.pieces
    ids = renderer.ids([answer])
    cut = answer._replace(text="", prefix=tuple(ids[1:-1]))  # one token is context now
    shifted = second._replace(suffix=(*(second.suffix or ()), ids[0]))
    wrong = rendered._replace(pieces=[first, shifted, cut])
    with pytest.raises(ValueError, match="an answer do not decode to the answer"):
        renderer.prove(talk(*TALK[:3]), wrong)


def test_plain_prompt_and_completion_are_tokenised_together(tokenizer: PreTrainedTokenizerFast):
    renderer = ChatRenderer(tokenizer)
    said = (Turn("user", "The heart is a mus"), Turn("assistant", "cle, of course."))
    rendered = renderer.conversation(talk(*said, is_chat=False))
    whole = tokenizer("The heart is a muscle, of course.", add_special_tokens=False)["input_ids"]
    assert renderer.ids(rendered.pieces) == [*whole, tokenizer.eos_token_id]
    alone = tokenizer("The heart is a mus", add_special_tokens=False)["input_ids"]
    context = renderer.ids(rendered.pieces[:1])
    assert context == alone[: len(context)] and len(context) >= len(alone) - 2


WORDS = [
    "The heart",
    " is a mus",
    "cle",
    "\n\n",
    " ",
    "39 °C",
    "▁x",
    "<|end|>",
    "漢字",
    "🫀",
    "é",
    ",",
]


@cache
def chat_renderer(name: str) -> ChatRenderer:
    return ChatRenderer(AutoTokenizer.from_pretrained(ASSETS / "models" / name))


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=3, max_size=12), st.integers(1, 11))
def test_every_plain_row_is_proven_wherever_the_prompt_ends(words: list[str], cut: int):
    said = "".join(words[:cut]).strip(), "".join(words[cut:]).rstrip()
    assume(said[0] and said[1].strip())
    for renderer in map(chat_renderer, BOTH):
        row = talk(Turn("user", said[0]), Turn("assistant", said[1]), is_chat=False)
        rendered = renderer.conversation(row)
        renderer.prove(row, rendered)
        assert [piece.kind for piece in rendered.pieces] == ["user", "answer"]
        assert rendered.pieces[1].prefix, "nothing of the completion is learnt"
        pair = Preference("a/1", "g", "a", row.turns[:1], said[1], f"Not {said[1]}", is_chat=False)
        renderer.prove(pair, renderer.preference(pair))


@pytest.mark.parametrize("fault", ["moved", "lost"])
def test_a_plain_span_that_is_not_the_completion_is_refused(
    tokenizer: PreTrainedTokenizerFast, fault: str
):
    """Two of its tokens are context, or one is nowhere."""
    renderer = ChatRenderer(tokenizer)
    row = talk(Turn("user", "The heart is"), Turn("assistant", " a large muscle."), is_chat=False)
    rendered = renderer.conversation(row)
    context, answer = rendered.pieces
    ids = (*context.prefix, *answer.prefix)
    at = len(context.prefix) + 2
    pieces = [context._replace(prefix=ids[:at]), answer._replace(prefix=ids[at:])]
    if fault == "lost":
        pieces = [context, answer._replace(prefix=answer.prefix[1:])]
    with pytest.raises(ValueError, match="do not decode to them"):
        renderer.prove(row, rendered._replace(pieces=pieces))


@pytest.mark.parametrize("learnt", [("answer",), CHAT_KINDS])
def test_what_is_learnt_decodes_to_the_answers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, learnt: Any
):
    renderer = ChatRenderer(tokenizer)
    chosen = [row for number, row in enumerate(rows("mediflow/heldout")) if number % 7 == 0][:40]
    records = [conversation(row, number) for number, row in enumerate(chosen)]
    records += [
        Conversation(f"a/talk {given}", "g", "a", TALK, num_prompt_turns=given)
        for given in (0, 2, 4)
    ]
    key = StoreKey(tokenizer_sha256(tokenizer), renderer.version, "rows", "train", 32000)
    store = build_store(
        map(renderer.conversation, records), cache=tmp_path, tokenizer=tokenizer, key=key
    )
    plan_settings = PlanSettings(
        kinds=CHAT_KINDS, capacity=4096, global_batch=1, layout="chat", learnt=learnt
    )
    plan = TrainingPlan(store, plan_settings)
    seen, targets = set(), 0
    for batch in PackedLoader(plan):
        assert isinstance(batch, TokenBatch)
        targets += int((batch.target_ids != IGNORE).sum())
        ends = batch.cu_seqlens.tolist()
        for start, end, row in zip(ends, ends[1:], batch.document_index.tolist(), strict=False):
            said, given = records[row].turns, records[row].num_prompt_turns
            answers = [t for t in said[given:] if t.role == "assistant"]
            wanted = answers if learnt == ("answer",) else said
            ids = batch.target_ids[0, start:end]
            learnt_ids = ids[ids != IGNORE].tolist()
            text = tokenizer.decode(learnt_ids, skip_special_tokens=True)
            expected = "".join(neutralise(t.text).replace("▁", " ") for t in wanted)
            assert "".join(text.split()) == "".join(expected.split())
            assert learnt_ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == len(wanted)
            assert (ids != IGNORE).sum() == (
                end - start - 1 if len(learnt) > 1 else len(learnt_ids)
            )
            seen.add(row)
    assert len(seen) == len(records)
    assert targets == sum(plan.num_global_targets(step) for step in range(plan.num_steps))


@pytest.mark.parametrize(("side", "told"), [("train", "training"), ("heldout", "held-out")])
def test_what_does_not_fit_is_left_out_and_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, side: Any, told: str
):
    renderer = ChatRenderer(tokenizer)
    long = Conversation("a/long", "g", "a", (Turn("user", "heart " * 300), TALK[2]))
    records = [talk(*TALK[1:3]), long]
    key = StoreKey(tokenizer_sha256(tokenizer), renderer.version, "long", side, 32000)
    store = build_store(
        map(renderer.conversation, records), cache=tmp_path, tokenizer=tokenizer, key=key
    )
    plan_settings = PlanSettings(kinds=CHAT_KINDS, capacity=128, global_batch=1, layout="chat")
    plan = TrainingPlan(store, plan_settings)
    assert [store.document_id(row) for row in plan.too_long.tolist()] == ["a/long"]
    assert store.documents_per_source(plan.too_long) == {"a": 1}
    assert store.documents_per_source() == {"a": 2}
    assert np.unique(plan.chunks(np.arange(plan.num_rows)).document).tolist() == [0]
    with pytest.raises(
        DataError, match=rf"^no {told} conversation fits into stage\.max_length=16 tokens"
    ):
        TrainingPlan(store, PlanSettings(CHAT_KINDS, 16, 1, layout="chat"))

"""Held-out conversations become exactly the prompts that the chat template would give."""

from pathlib import Path
from typing import Any

import pytest
from small_models import ASSETS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mediphi.data.chat import ChatRenderer
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.heldout_prompts import HeldoutPrompt, heldout_prompts, long_references
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore
from mediphi.records import Conversation, Turn

TASKS = ("summarization", "", "classification")


def conversation(number: int) -> Conversation:
    turns = [Turn("system", "Be brief.")] if number % 2 else []
    if number % 5 == 0:
        turns += [Turn("user", f"Hello <|end|> {number}"), Turn("assistant", "Good morning.")]
    turns.append(Turn("user", f"Fever of {38 + number} °C?\n\nSince when" + " when" * number))
    turns.append(Turn("assistant", f"Since {number} days,\n and a ▁rash."))
    labels = {"task_type": TASKS[number % 3]} if TASKS[number % 3] else {}
    return Conversation(f"a/{number}", f"{number}", "ab"[number % 2], tuple(turns), labels=labels)


RECORDS = {record.id: record for record in map(conversation, range(30))}


@pytest.fixture(scope="module", params=["phi35_mini", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS / request.param)


def stored(
    cache: Path, tokenizer: PreTrainedTokenizerFast, records: list[Conversation]
) -> TokenStore:
    renderer = ChatRenderer(tokenizer)
    key = StoreKey(tokenizer_sha256(tokenizer), renderer.version, f"{len(records)}", "heldout", 1)
    rendered = map(renderer.conversation, records)
    return build_store(rendered, cache=cache, tokenizer=tokenizer, key=key)


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> TokenStore:
    return stored(tmp_path_factory.mktemp("cache"), tokenizer, list(RECORDS.values()))


def drawn(
    store: TokenStore, tokenizer: PreTrainedTokenizerFast, **changes: int
) -> list[HeldoutPrompt]:
    numbers = {"per_task": 30, "max_prompt_tokens": 4096, "seed": 0, **changes}
    return heldout_prompts(store, tokenizer, **numbers)


def template_ids(tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...]) -> list[int]:
    messages = [{"role": t.role, "content": t.text.replace("<|end", "< |end")} for t in turns]
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_prompt_is_the_templates_and_its_reference_the_last_answer(
    store: TokenStore, tokenizer: PreTrainedTokenizerFast
):
    prompts = drawn(store, tokenizer)
    assert sorted(prompt.id for prompt in prompts) == sorted(RECORDS)
    for prompt in prompts:
        record = RECORDS[prompt.id]
        *before, last = record.turns
        assert prompt.prompt_ids == template_ids(tokenizer, tuple(before))
        assert prompt.reference == last.text.replace("▁", " ")
        assert prompt.source == record.source
        assert prompt.task_type == record.labels.get("task_type", "")


def test_as_many_of_every_task_type_are_drawn_and_the_seed_says_which(
    store: TokenStore, tokenizer: PreTrainedTokenizerFast
):
    first = drawn(store, tokenizer, per_task=4)
    tasks = [prompt.task_type for prompt in first]
    assert tasks == [""] * 4 + ["classification"] * 4 + ["summarization"] * 4
    assert len({prompt.id for prompt in first}) == 12
    assert drawn(store, tokenizer, per_task=4) == first
    assert drawn(store, tokenizer, per_task=4, seed=1) != first


def test_a_larger_draw_begins_with_the_smaller_one(
    store: TokenStore, tokenizer: PreTrainedTokenizerFast
):
    few, many = ({p.id for p in drawn(store, tokenizer, per_task=n)} for n in (2, 5))
    assert few < many and len(few) == 6 and len(many) == 15


def test_prompts_that_are_too_long_are_left_out(
    store: TokenStore, tokenizer: PreTrainedTokenizerFast
):
    lengths = {p.id: len(p.prompt_ids) for p in drawn(store, tokenizer)}
    limit = sorted(lengths.values())[15]
    kept = drawn(store, tokenizer, max_prompt_tokens=limit)
    assert {p.id for p in kept} == {name for name, size in lengths.items() if size <= limit}
    assert drawn(store, tokenizer, max_prompt_tokens=1) == []


def test_references_that_an_answer_cannot_reach_are_not_asked_for_and_counted(
    store: TokenStore, tokenizer: PreTrainedTokenizerFast
):
    def tokens(prompt: HeldoutPrompt) -> int:
        text = RECORDS[prompt.id].turns[-1].text
        whole = template_ids(tokenizer, RECORDS[prompt.id].turns[:-1])
        said = [*RECORDS[prompt.id].turns[:-1], Turn("assistant", text)]
        closed = template_ids(tokenizer, tuple(said))
        opened = tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
        return len(closed) - len(opened) - len(whole)

    every = {p.id: p for p in drawn(store, tokenizer)}
    limit = sorted(map(tokens, every.values()))[15]
    kept = {p.id for p in drawn(store, tokenizer, max_answer_tokens=limit)}
    assert kept == {name for name, prompt in every.items() if tokens(prompt) <= limit}
    told = long_references(store, max_prompt_tokens=4096, max_answer_tokens=limit)
    assert sum(few for few, _ in told.values()) == len(every) - len(kept)
    none = long_references(store, max_prompt_tokens=4096, max_answer_tokens=1)
    assert none == {task: (10, 10) for task in sorted(TASKS)}
    assert drawn(store, tokenizer, max_answer_tokens=1) == []


def test_plain_text_ends_its_prompt_where_the_completion_begins(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    said = (Turn("user", "The heart is"), Turn("assistant", " a muscle."))
    store = stored(tmp_path, tokenizer, [Conversation("a/1", "g", "a", said, is_chat=False)])
    (prompt,) = drawn(store, tokenizer)
    assert tokenizer.decode(prompt.prompt_ids) == "The heart is"
    assert prompt.reference == "a muscle."


def test_without_conversations_there_is_no_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    assert drawn(stored(tmp_path, tokenizer, []), tokenizer) == []

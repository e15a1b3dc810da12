"""Held-out conversations as prompts to be answered, straight from the token store."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from mediphi.data.packing import Ints
from mediphi.data.sequences import CHAT_KINDS, Sequences, find_sequences
from mediphi.data.tokens import TokenStore
from mediphi.records import LABELS, PIECE_KINDS


class HeldoutPrompt(NamedTuple):
    """A conversation up to its last answer.

    Attributes:
        id, source: as of the conversation.
        task_type: "" where the row names none.
        prompt_ids: up to `<|assistant|>`.
        reference: the text of the last answer.
    """

    id: str
    source: str
    task_type: str
    prompt_ids: list[int]
    reference: str


class _Candidates(NamedTuple):
    """Conversations that end with an answer behind a prompt that is short enough."""

    found: Sequences
    answers: Ints
    tasks: Ints


def heldout_prompts(
    store: TokenStore,
    tokenizer: PreTrainedTokenizerFast,
    *,
    per_task: int,
    max_prompt_tokens: int,
    seed: int,
    max_answer_tokens: int | None = None,
) -> list[HeldoutPrompt]:
    """Up to `per_task` prompts of every task type, drawn by `seed`; in the order of task types.

    Args:
        max_answer_tokens: of the reference with its end token; None: any.
    """
    if not store.num_tokens:
        return []
    found, answers, tasks = _candidates(store, max_prompt_tokens)
    fits = answers <= (max_answer_tokens or np.inf)
    by_task: dict[int, list[HeldoutPrompt]] = defaultdict(list)
    for place in np.random.default_rng([seed, 2]).permutation(np.flatnonzero(fits)).tolist():
        task = int(tasks[place])
        if len(by_task[task]) == per_task:
            continue
        start, length, answer = (int(x[place]) for x in (found.address, found.length, answers))
        ids = store.gather(np.arange(start, start + length)).tolist()
        prompt = HeldoutPrompt(
            id=store.document_id(int(found.document[place])),
            source=store.sources[found.source[place]],
            task_type=store.manifest.labels["task_type"][task],
            prompt_ids=ids[:-answer],
            reference=str(tokenizer.decode(ids[-answer:], skip_special_tokens=True)).strip(),
        )
        by_task[task].append(prompt)
    groups = sorted(by_task.values(), key=lambda prompts: prompts[0].task_type)
    return [prompt for prompts in groups for prompt in prompts]


def long_references(
    store: TokenStore, *, max_prompt_tokens: int, max_answer_tokens: int
) -> dict[str, tuple[int, int]]:
    """Task type -> how many of its prompts have a longer reference, and of how many."""
    if not store.num_tokens:
        return {}
    _, answers, tasks = _candidates(store, max_prompt_tokens)
    names = store.manifest.labels["task_type"]
    asked = np.bincount(tasks, minlength=len(names)).tolist()
    long = np.bincount(tasks[answers > max_answer_tokens], minlength=len(names)).tolist()
    return {n: (few, all_) for n, few, all_ in sorted(zip(names, long, asked, strict=True)) if few}


def _candidates(store: TokenStore, max_prompt_tokens: int) -> _Candidates:
    found = find_sequences(store, CHAT_KINDS, layout="chat")
    last = np.searchsorted(store.piece_starts, found.address + found.length) - 1
    answers = store.pieces["length"][last].astype(np.int64)
    fits = (found.length - answers <= max_prompt_tokens) & (
        store.piece_kinds[last] == PIECE_KINDS.index("answer")
    )
    tasks = store.labels[found.document, LABELS.index("task_type")].astype(np.int64)
    return _Candidates(found.take(fits), answers[fits], tasks[fits])

"""Supervised fine-tuning: the loss of packed conversations is transformers' own with labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_small_folder
from small_training import assert_same_gradients, gradients, make_module
from torch import Tensor

from mediphi.backbone import load_tokenizer
from mediphi.batches import IGNORE, TokenBatch
from mediphi.data.chat import ChatRenderer
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import PlanSettings
from mediphi.data.sequences import CHAT_KINDS
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore
from mediphi.modules.language_model import LanguageModelModule
from mediphi.records import Conversation, PieceKind, Turn

TOPICS = ("a dry cough", "chest pain", "amoxicillin", "the left knee", "an HbA1c of 9 %", "Lyme")
ANSWER: tuple[PieceKind, ...] = ("answer",)


def said(number: int) -> tuple[Turn, ...]:
    """One to three answers, with and without a system turn, of unequal lengths."""
    topic = TOPICS[number % len(TOPICS)]
    turns = [Turn("system", "You are a nurse.")] if number % 2 else []
    for turn in range(1 + number % 3):
        turns.append(Turn("user", f"Tell me about {topic}, " + "please " * (1 + number % 5)))
        turns.append(
            Turn("assistant", f"Part {turn} on {topic}. " + "See a doctor. " * (number % 4))
        )
    return tuple(Turn(role, text.strip()) for role, text in turns)


CONVERSATIONS = [Conversation(f"a/{n}", f"{n}", "a", said(n)) for n in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small", initializer_range=0.2)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    tokenizer = load_tokenizer(str(folder))
    renderer = ChatRenderer(tokenizer)
    rendered = [
        renderer.conversation(record)._replace(labels={"task_type": f"task {n % 2}"})
        for n, record in enumerate(CONVERSATIONS)
    ]
    key = StoreKey(tokenizer_sha256(tokenizer), renderer.version, "talk", "train", 4085)
    cache = tmp_path_factory.mktemp("cache")
    return build_store(rendered, cache=cache, tokenizer=tokenizer, key=key)


def setting(
    folder: Path,
    store: TokenStore,
    *,
    learnt: tuple[PieceKind, ...] = ANSWER,
    capacity: int = 400,
    **changes: Any,
) -> tuple[LanguageModelModule, list[TokenBatch]]:
    """A module and all micro-batches of one optimizer step over all conversations."""
    settings = PlanSettings(CHAT_KINDS, capacity, global_batch=64, layout="chat", learnt=learnt)
    data = PackedDataModule(store, heldout=None, settings=settings)
    module = make_module(folder, data, **changes)
    module.configure_model()
    batches: Any = list(PackedLoader(data.train_plan, group_names=data.group_names))
    return module, [batch for batch in batches if batch.document_index[0] >= 0]


def labelled(folder: Path, *, learnt: tuple[PieceKind, ...]) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of each conversation by the tokenizer's own chat template alone."""
    tokenizer = load_tokenizer(str(folder))

    def ids_of(turns: tuple[Turn, ...], *, prompts: bool = False) -> list[int]:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompts
        )
        text = text.removesuffix(tokenizer.eos_token)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found = []
    for record in CONVERSATIONS:
        ids = ids_of(record.turns)
        labels = list(ids) if learnt != ANSWER else [IGNORE] * len(ids)
        for place, turn in enumerate(record.turns):
            if turn.role == "assistant":
                start = len(ids_of(record.turns[:place], prompts=True))
                end = len(ids_of(record.turns[: place + 1]))
                labels[start:end] = ids[start:end]
        found.append((torch.tensor([ids]), torch.tensor([labels])))
    return found


def theirs(
    module: LanguageModelModule, rows: list[tuple[Tensor, Tensor]]
) -> tuple[float, dict[str, Tensor], int, int]:
    """Loss and gradients of one batch of unpacked rows; targets, and those ranked first."""
    model: Any = module.backbone
    model.set_attn_implementation("eager")
    model.zero_grad()
    targets = sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in rows)
    total, right = 0.0, 0
    for ids, labels in rows:
        out = model(input_ids=ids, labels=labels, num_items_in_batch=targets, use_cache=False)
        out.loss.backward()
        total += out.loss.item()
        right += int((out.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
    model.set_attn_implementation("mediphi_sdpa")
    return total, gradients(model), targets, right


def ours(module: LanguageModelModule, batches: list[TokenBatch]) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    total = 0.0
    for index, batch in enumerate(batches):
        loss = module.training_step(batch, index) / module.splits
        loss.backward()
        total += loss.item()
    return total, gradients(module.backbone)


@pytest.mark.parametrize("learnt", [ANSWER, CHAT_KINDS])
def test_loss_gradients_and_accuracy_are_transformers_own_on_unpacked_rows(
    folder: Path, store: TokenStore, learnt: tuple[PieceKind, ...]
):
    """`learnt` is `stage.train_on_prompt`. The mean is over tokens, not over conversations."""
    module, batches = setting(folder, store, learnt=learnt)
    got, grads = ours(module, batches)
    assert len(batches) < len(CONVERSATIONS)
    means = module.train_meter.means("train")
    want, expected, targets, right = theirs(module, labelled(folder, learnt=learnt))
    assert {batch.num_global_targets for batch in batches} == {targets}
    assert got == pytest.approx(want, rel=1e-6) == means["train/loss"]
    assert_same_gradients(grads, expected)
    assert means["train/accuracy"] == right / targets


def test_training_on_prompts_is_another_loss(folder: Path, store: TokenStore):
    """The control of the comparison above."""
    losses = [ours(*setting(folder, store, learnt=learnt))[0] for learnt in (ANSWER, CHAT_KINDS)]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_the_mean_of_conversations_would_be_another_loss(folder: Path, store: TokenStore):
    """The control: what a loss per row, averaged, gives."""
    module, batches = setting(folder, store)
    got, _ = ours(module, batches)
    model: Any = module.backbone
    model.set_attn_implementation("eager")
    rows = labelled(folder, learnt=ANSWER)
    means = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in rows]
    assert abs(sum(means) / len(means) - got) > 1e-3


def test_packed_loss_and_gradients_equal_separate_ones(folder: Path, store: TokenStore):
    """Every conversation in a row of its own, and several in one."""
    longest = max(int(ids.shape[1]) for ids, _ in labelled(folder, learnt=ANSWER))
    (alone, apart), (module, batches) = (
        setting(folder, store, capacity=size) for size in (longest, 4000)
    )
    assert len(batches) == 1 < len(apart)
    (want, expected), (got, grads) = ours(alone, apart), ours(module, batches)
    assert got == pytest.approx(want, rel=1e-6)
    assert_same_gradients(grads, expected)


def test_tasks_and_kinds_have_their_own_metrics(folder: Path, store: TokenStore):
    module, batches = setting(folder, store, learnt=CHAT_KINDS)
    ours(module, batches)
    means = module.train_meter.means("train")
    named = {key for key in means if key.startswith("train/accuracy/")}
    groups = {"kind/system", "kind/user", "kind/answer", "source/a", "task/task 0", "task/task 1"}
    assert named == {f"train/accuracy/{group}" for group in groups}


def test_neftune_noise_is_in_training_alone(folder: Path, store: TokenStore):
    quiet, batches = setting(folder, store)
    noisy, _ = setting(folder, store, neftune_alpha=5.0)
    plain, _ = ours(quiet, batches)
    first, second = (ours(noisy, batches)[0] for _ in range(2))
    assert first != second and abs(first - plain) > 1e-4
    noisy.eval()
    for batch in batches:
        noisy.validation_step(batch, 0)
    heldout = noisy.heldout_meter.means("heldout")
    assert heldout["heldout/loss"] == pytest.approx(plain, rel=1e-6)

"""What is learnt of rows of prompt and completion is what TRL's SFTTrainer learns of them.

Ours: reader, renderer, token store, packing plan, loader. Theirs: their own tokenisation and masks.
"""

from pathlib import Path
from typing import Any

import pytest
from small_models import write_small_folder
from small_training import spec_of

from mediphi.backbone import build_model, load_tokenizer
from mediphi.batches import IGNORE, TokenBatch
from mediphi.config.corpus import FileSource, Licence
from mediphi.data.bad_rows import BadRows
from mediphi.data.chat import ChatRenderer
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import PlanSettings, TrainingPlan
from mediphi.data.sequences import CHAT_KINDS
from mediphi.data.sources.rows import Rows
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey
from mediphi.records import Conversation

# TRL 1.16 uses names that transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"
)

S = {"role": "system", "content": "Answer as a nurse would."}
U, V = ({"role": "user", "content": text} for text in ("Chest pain.", "For an hour;\n\n left arm."))
A, B = ({"role": "assistant", "content": text} for text in ("Since when?", "Call an ambulance."))
ROWS = {
    "one answer": ([U], [A]),
    "with a system turn": ([S, U], [B]),
    "an answer in the prompt": ([S, U, A, V], [B]),
    "two answers in the prompt": ([U, A, V, B, U], [A]),
    "a completion of three messages": ([S, U], [A, V, B]),
    "answers on both sides": ([U, A, V], [B, U, A]),
}
Labels = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Labels]:
    """Ids and labels as TRL trains on them, without the end of text that the template adds."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = load_tokenizer(str(folder))
    ending = "{% else %}{{ eos_token }}"
    assert ending in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(ending, "")
    args = trl.SFTConfig(
        str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS.values()]
    trainer = trl.SFTTrainer(
        build_model(spec_of(folder)),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert trainer.completion_only_loss and not args.assistant_only_loss
    found: Any = trainer.train_dataset
    return {n: (row["input_ids"], row["labels"]) for n, row in zip(ROWS, found, strict=True)}


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Labels]:
    tokenizer = load_tokenizer(str(folder))
    renderer = ChatRenderer(tokenizer)
    licence = Licence(id="CC0-1.0", origin="test", commercial_ok=True)
    fields = FileSource(kind="jsonl", path="-", licence=licence, format="prompt_completion")
    rows = Rows(fields, "a", BadRows())
    records = [
        rows.record({"prompt": prompt, "completion": completion}, file="f", line=n, key=name)
        for n, (name, (prompt, completion)) in enumerate(ROWS.items(), start=1)
    ]
    rendered = [renderer.conversation(r) for r in records if isinstance(r, Conversation)]
    key = StoreKey(tokenizer_sha256(tokenizer), renderer.version, "rows", "train", 4085)
    cache = tmp_path_factory.mktemp("cache")
    store = build_store(rendered, cache=cache, tokenizer=tokenizer, key=key)
    settings = PlanSettings(CHAT_KINDS, 256, 1, layout="chat", learnt=("answer",))
    found: dict[str, Labels] = {}
    for batch in PackedLoader(TrainingPlan(store, settings)):
        assert isinstance(batch, TokenBatch)
        ids, targets = batch.input_ids[0].tolist(), batch.target_ids[0].tolist()
        ends = batch.cu_seqlens.tolist()
        for start, end, row in zip(ends, ends[1:], batch.document_index.tolist(), strict=False):
            labels = [IGNORE, *targets[start : end - 1]]
            found[store.document_id(row).removeprefix("a/")] = (ids[start:end], labels)
    return found


@pytest.mark.parametrize("name", [name for name, (_, said) in ROWS.items() if len(said) == 1])
def test_one_answer_is_learnt_and_answers_before_it_are_not_as_in_trl(
    theirs: dict[str, Labels], ours: dict[str, Labels], name: str
) -> None:
    assert ours[name] == theirs[name]
    assert 0 < sum(label != IGNORE for label in ours[name][1]) < len(ours[name][1]) / 2


@pytest.mark.parametrize("name", [name for name, (_, said) in ROWS.items() if len(said) > 1])
def test_of_a_longer_completion_only_the_users_turns_are_not_learnt_that_trl_learns(
    theirs: dict[str, Labels], ours: dict[str, Labels], name: str, folder: Path
) -> None:
    (ids, labels), (their_ids, their_labels) = ours[name], theirs[name]
    assert ids == their_ids
    spared = [place for place in range(len(ids)) if labels[place] != their_labels[place]]
    assert all(labels[place] == IGNORE for place in spared)
    tokenizer = load_tokenizer(str(folder))
    said = ROWS[name][1]
    assert tokenizer.decode([ids[place] for place in spared]) == "".join(
        f"<|user|> {turn['content']}<|end|><|assistant|>" for turn in said[1::2]
    )
    learnt = tokenizer.decode([label for label in labels if label != IGNORE])
    assert learnt == "".join(f" {turn['content']}<|end|>" for turn in said[::2]).lstrip()

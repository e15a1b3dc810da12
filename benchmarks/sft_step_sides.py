"""The sides of `sft_step.py`: our trainer, TRL's, and the process that runs one of them."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import train_step_sides
import trainers
from sides import TINY, Meter, Train, serve
from train_step_sides import CAPACITY

PACKED = {
    "per_device_train_batch_size": 1,
    "packing": True,
    "packing_strategy": "bfd_split",
}
SIDES: dict[str, dict[str, Any]] = {
    "ours": {},
    "trl default": {"per_device_train_batch_size": 8},
    "trl by length": {
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    },
    "trl packed": PACKED,
    "trl packed, head as on a GPU": PACKED,
}
ABOUT = {
    "trl default": "SFTTrainer's padding collator, 8 conversations a forward pass",
    "trl by length": "as trl default, conversations of like length together",
    "trl packed": "packing=bfd_split, one row a forward pass; conversations are kept apart by a "
    "mask over the flattened row, so several rows at a time would cost more",
    "trl packed, head as on a GPU": "as trl packed, patched: logits of answers alone, as TRL "
    "computes them where Triton runs",
}


class Row(NamedTuple):
    """A conversation of one answer, its ids, and how many of them come before the answer."""

    turns: list[list[str]]
    labels: dict[str, str]
    ids: list[int]
    num_prompt: int

    @property
    def target_ids(self) -> list[int]:
        """The answer's ids in their places, -100 elsewhere."""
        return [-100] * self.num_prompt + self.ids[self.num_prompt :]


class Task(NamedTuple):
    """What a worker trains: initial weights and conversations."""

    model: str
    train: list[Row]
    heldout: list[Row]
    steps: int
    precision: str

    @classmethod
    def of(cls, model: str, train: Any, heldout: Any, *rest: Any) -> "Task":
        """From JSON."""
        return cls(model, [Row(*row) for row in train], [Row(*row) for row in heldout], *rest)

    @property
    def lengths(self) -> list[int]:
        return [len(row.ids) for row in self.train]

    @property
    def num_targets(self) -> int:
        return sum(len(row.ids) - row.num_prompt for row in self.train)


# ---------------------------------------------------------------------------------- ours
def packed_data(task: Task, folder: Path) -> Any:
    """Token store and plan: the task's optimizer steps, two micro-batches each."""
    import numpy as np

    from mediphi.backbone import eos_id, load_tokenizer
    from mediphi.data.chat import ChatRenderer
    from mediphi.data.datamodule import PackedDataModule
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings
    from mediphi.data.sequences import CHAT_KINDS
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey
    from mediphi.records import Conversation, Turn

    tokenizer = load_tokenizer(str(TINY))
    renderer = ChatRenderer(tokenizer)
    rendered = (
        renderer.conversation(
            Conversation(
                f"c/{i}",
                f"{i}",
                "c",
                tuple(Turn(*turn) for turn in row.turns),  # type: ignore[arg-type]
                labels=row.labels,
            )
        )
        for i, row in enumerate(task.train)
    )
    data, sha = f"{len(task.train)} conversations", tokenizer_sha256(tokenizer)
    key = StoreKey(sha, renderer.version, data, "train", eos_id(tokenizer))
    store = build_store(rendered, cache=folder, tokenizer=tokenizer, key=key)
    ids = store.gather(np.arange(store.num_tokens)).tolist()
    assert ids == [i for row in task.train for i in row.ids], "ours: other token ids"
    settings = PlanSettings(CHAT_KINDS, CAPACITY, global_batch=1, layout="chat")
    settings = trainers.packed_plan(store, settings, steps=task.steps)
    packed = PackedDataModule(store, heldout=None, settings=settings)
    assert packed.train_plan.num_targets == task.num_targets, "ours: another number of targets"
    return packed


def make_ours(task: Task, folder: Path) -> Train:
    make_module = partial(trainers.language_model_module, task.model)
    return trainers.make_ours(make_module, packed_data(task, folder), precision=task.precision)


# ---------------------------------------------------------------------------------- TRL
def peer_trainer(task: Task, folder: Path, *, side: str, meter: Meter) -> Any:
    """An SFTTrainer on prompts and completions, whose loss is of completions only."""
    import datasets

    trainers.head_as_on_gpu("head as on a GPU" in side)
    rows = datasets.Dataset.from_list([messages(row) for row in task.train])
    trainer = train_step_sides.sft_trainer(
        task, folder, own=SIDES[side], meter=meter, train_dataset=rows
    )
    expected = sorted((row.ids, row.target_ids) for row in task.train)
    assert prepared(trainer.train_dataset) == expected, f"{side}: other token ids or targets"
    return trainer


def messages(row: Row) -> dict[str, Any]:
    """A row of TRL's conversational prompt-completion format."""
    said = [{"role": role, "content": text} for role, text in row.turns]
    return {"prompt": said[:-1], "completion": said[-1:]}


def prepared(dataset: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of all conversations, sorted, whatever rows they are packed into."""
    found = []
    for row in dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            own = slice(start, start + length)
            found.append((row["input_ids"][own], row["labels"][own]))
            start += length
    return sorted(found)


def make_peer(task: Task, folder: Path, *, side: str) -> Train:
    trainers.quiet_peers()

    def work(meter: Meter) -> Any:
        trainer = peer_trainer(task, folder, side=side, meter=meter)
        trainer.train()
        return trainer.model

    return work


# ---------------------------------------------------------------------------------- reference
def one_by_one(model: Any, rows: list[Row]) -> Any:
    """Mean loss of the answers' tokens, each conversation alone through the model."""
    import torch
    import torch.nn.functional as F

    total = torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(row.target_ids[1:])
        total = total + F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / sum(len(row.ids) - row.num_prompt for row in rows)


def heldout_loss(model: Any, task: Task) -> float:
    """In float32, by the same code for all sides."""
    import torch

    plain = trainers.peer_model(task.model)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float(one_by_one(plain.eval(), task.heldout))


def make(task: Task, side: str, folder: Path) -> Train:
    return make_ours(task, folder) if side == "ours" else make_peer(task, folder, side=side)


if __name__ == "__main__":
    own = Task.of(*json.loads(Path(sys.argv[2]).read_text()))
    serve(partial(make, own, sys.argv[1]), partial(heldout_loss, task=own))

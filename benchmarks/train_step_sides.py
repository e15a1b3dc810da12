"""The sides of `train_step.py`: our trainer, TRL's, and the process that runs one of them."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trainers
from sides import TINY, Meter, Train, serve

CAPACITY = 512
SIDES: dict[str, dict[str, Any]] = {
    "ours": {},
    "trl default": {"per_device_train_batch_size": 8},
    "trl by length": {
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    },
    "trl packed": {
        "per_device_train_batch_size": 1,
        "packing": True,
        "packing_strategy": "bfd_split",
    },
}
ABOUT = {
    "ours": "packed rows, documents apart",
    "trl default": "SFTTrainer's padding collator, 8 documents a forward pass",
    "trl by length": "as trl default, documents of like length together",
    "trl packed": "packing=bfd_split, one row a forward pass; documents are kept apart by a mask "
    "over the flattened row, so several rows at a time would cost more",
}


class Task(NamedTuple):
    """What a worker trains: initial weights, documents as text and as ids with their EOS."""

    model: str
    texts: list[str]
    train: list[list[int]]
    heldout: list[list[int]]
    steps: int
    precision: str

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.train]


# ---------------------------------------------------------------------------------- ours
def packed_data(task: Task, folder: Path) -> Any:
    """Token store and plan: the task's optimizer steps, two micro-batches each."""
    import numpy as np
    from tokenizers import Tokenizer

    from mediphi.data.datamodule import PackedDataModule
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings
    from mediphi.data.render import Piece, Rendered
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    data = f"{len(task.texts)} documents"
    key = StoreKey(tokenizer_sha256(tokenizer), "benchmark", data, "train", task.train[0][-1])
    documents = (
        Rendered(f"d/{i}", "d", [Piece("document", text)]) for i, text in enumerate(task.texts)
    )
    store = build_store(documents, cache=folder, tokenizer=tokenizer, key=key)
    same = [i for ids in task.train for i in ids] == store.gather(
        np.arange(store.num_tokens)
    ).tolist()
    assert same, "the two sides have different token ids"
    settings = PlanSettings(kinds=("document",), capacity=CAPACITY, global_batch=1)
    settings = trainers.packed_plan(store, settings, steps=task.steps)
    return PackedDataModule(store, heldout=None, settings=settings)


def make_ours(task: Task, folder: Path) -> Train:
    """The wiring of a training phase, without checkpoints, logs and export."""
    make_module = partial(trainers.language_model_module, task.model)
    return trainers.make_ours(make_module, packed_data(task, folder), precision=task.precision)


# ---------------------------------------------------------------------------------- TRL
def sft_trainer(
    task: Any, folder: Path, *, own: dict[str, Any], meter: Meter, train_dataset: Any
) -> Any:
    """An SFTTrainer with what all sides share, and the side's own settings.

    Args:
        task: has `model`, `steps`, `precision` and, in `lengths`, the tokens of every row.
    """
    from trl import SFTConfig, SFTTrainer

    # TRL's packing leaves some room: 3 % more rows a step, or a last step would be left over.
    filled = int(1.03 * sum(task.lengths) / CAPACITY) + 1
    rows = filled if "packing" in own else len(task.lengths)
    arguments = SFTConfig(
        gradient_accumulation_steps=-(-rows // (task.steps * own["per_device_train_batch_size"])),
        max_length=CAPACITY,
        **trainers.peer_arguments(folder, precision=task.precision),
        **own,
    )
    return trainers.counting(SFTTrainer, meter)(
        model=trainers.peer_model(task.model),
        args=arguments,
        train_dataset=train_dataset,
        processing_class=trainers.peer_tokenizer(),
        callbacks=[trainers.peer_clock(meter)],
    )


def peer_trainer(task: Task, folder: Path, *, side: str, meter: Meter) -> Any:
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": task.train})
    return sft_trainer(task, folder, own=SIDES[side], meter=meter, train_dataset=rows)


def make_peer(task: Task, folder: Path, *, side: str) -> Train:
    trainers.quiet_peers()

    def work(meter: Meter) -> Any:
        trainer = peer_trainer(task, folder, side=side, meter=meter)
        trainer.train()
        return trainer.model

    return work


# ---------------------------------------------------------------------------------- workers
def one_by_one(model: Any, documents: list[list[int]]) -> Any:
    """Token-mean loss, each document alone through the model: the reference."""
    import torch
    import torch.nn.functional as F

    total = torch.zeros(())
    for ids in documents:
        row = torch.tensor([ids])
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, row[0, 1:], reduction="sum")
    return total / sum(len(ids) - 1 for ids in documents)


def heldout_loss(model: Any, task: Task) -> float:
    """In float32, by the same code for all sides."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float(one_by_one(plain.eval(), task.heldout))


def make(task: Task, side: str, folder: Path) -> Train:
    return make_ours(task, folder) if side == "ours" else make_peer(task, folder, side=side)


if __name__ == "__main__":
    own = Task(*json.loads(Path(sys.argv[2]).read_text()))
    serve(partial(make, own, sys.argv[1]), partial(heldout_loss, task=own))

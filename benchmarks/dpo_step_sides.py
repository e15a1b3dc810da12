"""The sides of `dpo_step.py`: our DpoModule, TRL's DPOTrainer, and the process that runs one."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trainers
from sides import TINY, Meter, Train, serve

CAPACITY, BETA = 2048, 0.1
PRECOMPUTED = {"precompute_ref_log_probs": True}
SIDES: dict[str, dict[str, Any]] = {
    "ours": {},
    "trl online": {},
    "trl precomputed": PRECOMPUTED,
    "trl precomputed, head as on a GPU": PRECOMPUTED,
}
ABOUT = {
    "trl online": "TRL's default: the reference model is asked beside every step; 8 pairs a "
    "forward pass, padded",
    "trl precomputed": "precompute_ref_log_probs; 8 pairs a forward pass, those of like length "
    "together within an optimizer step",
    "trl precomputed, head as on a GPU": "as trl precomputed, patched: logits of answers alone, as "
    "TRL computes them where Triton runs",
}


class Pair(NamedTuple):
    """A preference row, its labels, and the ids of prompt, chosen and rejected answer."""

    prompt: list[list[str]]
    chosen: str
    rejected: str
    labels: dict[str, str]
    parts: list[list[int]]

    @property
    def longest(self) -> int:
        prompt, chosen, rejected = map(len, self.parts)
        return prompt + max(chosen, rejected)


class Task(NamedTuple):
    """What a worker trains: initial weights, and the pairs of each optimizer step."""

    model: str
    train: list[list[Pair]]
    heldout: list[Pair]
    precision: str

    @classmethod
    def of(cls, model: str, train: Any, heldout: Any, precision: str) -> "Task":
        """From JSON."""
        steps = [[Pair(*pair) for pair in step] for step in train]
        return cls(model, steps, [Pair(*pair) for pair in heldout], precision)

    @property
    def pairs(self) -> list[Pair]:
        return [pair for step in self.train for pair in step]


# ---------------------------------------------------------------------------------- ours
class StepLoader:
    """The batches of several plans, each of which is one optimizer step."""

    def __init__(self, plans: list[Any], references: list[Any] | None = None) -> None:
        from mediphi.data.groups import group_names
        from mediphi.data.loader import PackedLoader

        self.names = group_names([plan.store for plan in plans])
        logps = references or [None] * len(plans)
        self.loaders = [
            PackedLoader(plan, group_names=self.names, reference=own)
            for plan, own in zip(plans, logps, strict=True)
        ]

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from loader


def step_plans(task: Task, folder: Path) -> list[Any]:
    """A store and a plan for each optimizer step: it holds what TRL's holds.

    Packing a whole corpus puts as many pairs into a step as fit into its rows; the rows of one
    step are packed as ever.
    """
    return [step_plan(step, folder, name=f"step {i}") for i, step in enumerate(task.train)]


def step_plan(pairs: list[Pair], folder: Path, *, name: str) -> Any:
    import numpy as np

    from mediphi.backbone import eos_id, load_tokenizer
    from mediphi.data.chat import ChatRenderer
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings, TrainingPlan
    from mediphi.data.sequences import PAIR_KINDS
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey
    from mediphi.records import Preference, Turn

    tokenizer = load_tokenizer(str(TINY))
    renderer = ChatRenderer(tokenizer)
    rendered = (
        renderer.preference(
            Preference(
                f"p/{i}",
                f"{i}",
                "p",
                tuple(Turn(*turn) for turn in pair.prompt),  # type: ignore[arg-type]
                pair.chosen,
                pair.rejected,
                labels=pair.labels,
            )
        )
        for i, pair in enumerate(pairs)
    )
    sha = tokenizer_sha256(tokenizer)
    key = StoreKey(sha, renderer.version, f"{name} {len(pairs)}", "train", eos_id(tokenizer))
    store = build_store(rendered, cache=folder, tokenizer=tokenizer, key=key)
    ids = store.gather(np.arange(store.num_tokens)).tolist()
    assert ids == [i for p in pairs for part in p.parts for i in part], "ours: other token ids"
    settings = PlanSettings(PAIR_KINDS, CAPACITY, global_batch=1, layout="shared_pairs")
    return TrainingPlan(store, trainers.packed_plan(store, settings, steps=1))


def dpo_module(task: Task, loader: StepLoader, *, uses_reference: bool = True) -> Any:
    from mediphi.modules.dpo import DpoModule, Objective

    steps, names = len(task.train), loader.names
    return DpoModule(
        objective=Objective(beta=BETA, uses_reference=uses_reference),
        group_names={
            "source": names["source"],
            "error": names["error_type"],
            "task": names["task_type"],
        },
        **trainers.our_options(task.model, num_steps=steps, splits=len(loader) // steps),
    )


def reference_pass(task: Task, plans: list[Any], meter: Meter) -> list[Any]:
    """Log-probabilities under the initial weights, float32 `[pairs, 2]` for each plan."""
    import lightning as L
    import numpy as np

    class Clock(L.Callback):
        def on_predict_start(self, *_: Any) -> None:
            meter.start()

        def on_predict_end(self, *_: Any) -> None:
            meter.stop()

    loader = StepLoader(plans)
    module = dpo_module(task, loader, uses_reference=False)
    trainer = trainers.our_trainer(task.precision, loop={}, callbacks=[Clock()])
    scored = iter(trainer.predict(module, loader))
    found = []
    for own in loader.loaders:
        logps = np.full((own.plan.num_targets, 2), np.nan, dtype=np.float32)
        for batch in (next(scored) for _ in range(len(own))):
            logps[batch.document_index.numpy()] = batch.logps.numpy()
        found.append(logps)
    return found


def make_ours(task: Task, folder: Path) -> Train:
    plans = step_plans(task, folder)

    def work(meter: Meter) -> Any:
        reference = meter.apart()
        loader = StepLoader(plans, reference_pass(task, plans, reference))
        meter.take_reference(reference)
        module = dpo_module(task, loader)
        model = trainers.fit(module, loader, precision=task.precision, meter=meter)
        meter.tokens = meter.positions = sum(plan.num_tokens for plan in plans)
        meter.pairs = sum(plan.num_targets for plan in plans)
        return model

    return work


# ---------------------------------------------------------------------------------- TRL
def peer_trainer(task: Task, folder: Path, *, side: str, meter: Meter) -> Any:
    """A DPOTrainer on the same pairs in the same steps; it precomputes when it is made."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    trainers.head_as_on_gpu("head as on a GPU" in side)
    per_pass = min(8, len(task.train[0]) // 2)

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            reference = meter.apart()
            reference.start()
            found = super()._precompute_ref_logps(*args, **options)
            reference.stop()
            meter.take_reference(reference)
            return found

    steps = [
        sorted(step, key=lambda pair: pair.longest) if SIDES[side] else step for step in task.train
    ]
    pairs = [pair for step in steps for pair in step]
    arguments = DPOConfig(
        gradient_accumulation_steps=len(steps[0]) // per_pass,
        train_sampling_strategy="sequential",
        max_length=CAPACITY,
        beta=BETA,
        per_device_train_batch_size=per_pass,
        **trainers.peer_arguments(folder, precision=task.precision),
        **SIDES[side],
    )
    trainer = trainers.counting(Timed, meter)(
        model=trainers.peer_model(task.model),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([messages(pair) for pair in pairs]),
        processing_class=trainers.peer_tokenizer(),
        callbacks=[trainers.peer_clock(meter)],
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [[row[name] for name in names] for row in trainer.train_dataset]
    assert ids == [pair.parts for pair in pairs], f"{side}: other token ids"
    return trainer


def messages(pair: Pair) -> dict[str, Any]:
    """A row of TRL's conversational preference format."""
    prompt = [{"role": role, "content": text} for role, text in pair.prompt]
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    said = {k: [{"role": "assistant", "content": text}] for k, text in answers.items()}
    return {"prompt": prompt, **said}


def make_peer(task: Task, folder: Path, *, side: str) -> Train:
    trainers.quiet_peers()

    def work(meter: Meter) -> Any:
        trainer = peer_trainer(task, folder, side=side, meter=meter)
        trainer.train()
        meter.pairs = len(task.pairs)
        return trainer.model

    return work


# ---------------------------------------------------------------------------------- reference
def answer_logps(model: Any, pair: Pair) -> tuple[Any, Any]:
    """Log-probabilities of both answers, each sequence alone through the model."""
    import torch

    prompt, *answers = pair.parts
    found = []
    for answer in answers:
        row = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logps = logits.log_softmax(-1)
        found.append(logps.gather(1, row[0, len(prompt) :, None]).sum())
    return found[0], found[1]


def one_by_one(model: Any, pair: Pair, reference: tuple[Any, Any]) -> Any:
    """DPO's loss of a pair (Rafailov et al. 2023, eq. 7)."""
    import torch.nn.functional as F

    chosen, rejected = answer_logps(model, pair)
    return -F.logsigmoid(BETA * ((chosen - reference[0]) - (rejected - reference[1])))


def heldout_losses(task: Task) -> Callable[[Any], float]:
    """Mean over held-out pairs in float32, by the same code for all sides."""
    import torch

    plain = trainers.peer_model(task.model).eval()
    with torch.no_grad():
        references = [answer_logps(plain, pair) for pair in task.heldout]

    @torch.no_grad()
    def loss(model: Any) -> float:
        plain.load_state_dict(model.state_dict())
        losses = [one_by_one(plain, *both) for both in zip(task.heldout, references, strict=True)]
        return float(torch.stack(losses).mean())

    return loss


def make(task: Task, side: str, folder: Path) -> Train:
    return make_ours(task, folder) if side == "ours" else make_peer(task, folder, side=side)


if __name__ == "__main__":
    own = Task.of(*json.loads(Path(sys.argv[2]).read_text()))
    serve(partial(make, own, sys.argv[1]), heldout_losses(own))

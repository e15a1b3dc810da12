"""The whole way from preference rows to loss and gradients is that of TRL's DPOTrainer.

Ours: renderer, token store, packing plan, DpoModule. Theirs: their tokenisation, padding and loss,
with log-probabilities of the reference computed once, too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import write_small_folder
from small_training import (
    assert_same_gradients,
    gradients,
    logps_by_row,
    make_dpo_module,
    nudge,
    pair_settings,
    spec_of,
)
from torch import Tensor

from mediphi.backbone import build_model, load_tokenizer
from mediphi.data.chat import ChatRenderer
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.loader import PackedLoader
from mediphi.data.sequences import Layout
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore
from mediphi.modules.dpo import DpoModule, Objective
from mediphi.records import Preference, Turn

# TRL 1.16 uses names that transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"
)

SYSTEM = Turn("system", "Answer as a nurse would.")
PAIRS = [
    ((SYSTEM, Turn("user", "A dry cough since?")), "Monday, no fever.", "Then"),
    ((Turn("user", "Aspirin"),), "100 mg once a day.", "It is a drug of unknown dose, in short."),
    ((SYSTEM, Turn("user", "The knee is\n\n swollen")), "Rest, ice.", "A joint of the leg."),
    (
        (
            Turn("user", "Chest pain."),
            Turn("assistant", "Since when?"),
            Turn("user", "For an hour; the left arm, too."),
        ),
        "Call an ambulance now.",
        "Wait until tomorrow and see the cardiologist.",
    ),
    ((SYSTEM, Turn("user", "Amoxicillin and a rash")), "Stop it, see a doctor.", "[]"),
]
VARIANTS = {  # TRL's loss_type: ours
    "sigmoid": Objective(beta=0.3),
    "hinge": Objective("hinge", beta=0.02),
    "sigmoid_norm": Objective(beta=0.3, length_normalised=True),
    "ipo": Objective("ipo", beta=0.3, length_normalised=True),
    "robust": Objective("robust", beta=0.3, label_smoothing=0.2),
}


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small", initializer_range=0.2)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    tokenizer = load_tokenizer(str(folder))
    renderer = ChatRenderer(tokenizer)
    records = [Preference(f"a/{i}", "g", "a", *pair) for i, pair in enumerate(PAIRS)]
    key = StoreKey(tokenizer_sha256(tokenizer), renderer.version, "rows", "train", 4085)
    rendered = map(renderer.preference, records)
    cache = tmp_path_factory.mktemp("cache")
    return build_store(rendered, cache=cache, tokenizer=tokenizer, key=key)


def make_trainer(folder: Path, out: Path, *, with_eos: bool) -> Any:
    """A policy that has moved, and its reference's numbers computed before."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = load_tokenizer(str(folder))
    if not with_eos:
        ending = "{% else %}{{ eos_token }}"
        assert ending in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(ending, "")
    policy, reference = (build_model(spec_of(folder)) for _ in range(2))
    nudge(policy)
    for model in (policy, reference):
        model.set_attn_implementation("sdpa")
    rows = [
        {
            "prompt": messages(prompt),
            "chosen": messages((Turn("assistant", chosen),)),
            "rejected": messages((Turn("assistant", rejected),)),
        }
        for prompt, chosen, rejected in PAIRS
    ]
    args = trl.DPOConfig(
        str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=len(PAIRS),
        precompute_ref_log_probs=True,
    )
    data = Dataset.from_list(rows)
    return trl.DPOTrainer(
        policy, reference, args=args, train_dataset=data, processing_class=tokenizer
    )


@pytest.fixture(scope="module")
def trainer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_trainer(folder, tmp_path_factory.mktemp("trl"), with_eos=False)


def parts(store: TokenStore) -> list[list[list[int]]]:
    """Prompt, chosen and rejected of every pair, from the batches of separate prompts."""
    settings = pair_settings("pairs", capacity=256, global_batch=1)
    data = PackedDataModule(store, heldout=None, settings=settings)
    found: dict[int, list[list[int]]] = {}
    for batch in PackedLoader(data.train_plan):
        ids, ends = batch.input_ids[0].tolist(), batch.cu_seqlens.tolist()
        for place, row in enumerate(batch.document_index.tolist()):
            start, middle, end = ends[2 * place : 2 * place + 3]
            answers: Any = batch.answer_ids
            sizes = [int((answers == 2 * place + side).sum()) for side in (0, 1)]
            chosen, rejected = ids[middle - sizes[0] : middle], ids[end - sizes[1] : end]
            found[row] = [ids[start : middle - sizes[0]], chosen, rejected]
    return [found[row] for row in range(len(PAIRS))]


def their_parts(trainer: Any) -> list[list[list[int]]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [[row[name] for name in names] for row in trainer.train_dataset]


def test_tokens_are_trls_but_for_the_end_of_text_that_the_template_adds(
    folder: Path, store: TokenStore, trainer: Any, tmp_path: Path
):
    """Phi-3.5's template ends a whole conversation by `<|endoftext|>`, behind `<|end|>`. A model
    stops at `<|end|>`, so we don't train what follows; for the comparison TRL's template loses it.
    """
    ours = parts(store)
    assert their_parts(trainer) == ours
    published = their_parts(make_trainer(folder, tmp_path, with_eos=True))
    eos = load_tokenizer(str(folder)).eos_token_id
    assert published == [[prompt, [*one, eos], [*other, eos]] for prompt, one, other in ours]


def theirs(trainer: Any, loss_type: str, objective: Objective) -> tuple[float, dict[str, Tensor]]:
    trainer.loss_types, trainer.beta = [loss_type], objective.beta
    trainer.label_smoothing = objective.label_smoothing
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return loss.item(), gradients(trainer.model)


def ours(
    folder: Path, store: TokenStore, objective: Objective, layout: Layout
) -> tuple[float, dict[str, Tensor]]:
    """One step over all pairs in several micro-batches."""
    settings = pair_settings(layout, capacity=128, global_batch=8)
    data = PackedDataModule(store, heldout=None, settings=settings)
    module = make_dpo_module(folder, data, objective=objective)
    module.configure_model()
    references = reference_logps(module, data)
    nudge(module.backbone)
    loader = PackedLoader(data.train_plan, reference=references)
    loss = 0.0
    for index, batch in enumerate(loader):
        part = module.training_step(batch, index) / module.splits  # type: ignore[arg-type]
        part.backward()
        loss += part.item()
    assert data.train_plan.num_steps == 1 < data.train_plan.num_rows
    return loss, gradients(module.backbone)


def reference_logps(module: DpoModule, data: PackedDataModule) -> np.ndarray:
    return logps_by_row(module, PackedLoader(data.train_plan), size=len(PAIRS))


@pytest.mark.parametrize("layout", ["pairs", "shared_pairs"])
@pytest.mark.parametrize("loss_type", VARIANTS)
def test_loss_and_gradients_of_a_step_are_trls(
    folder: Path, store: TokenStore, trainer: Any, loss_type: str, layout: Layout
):
    objective = VARIANTS[loss_type]
    want, expected = theirs(trainer, loss_type, objective)
    got, grads = ours(folder, store, objective, layout)
    assert got == pytest.approx(want, rel=1e-5)
    assert_same_gradients(grads, expected)


def test_the_references_numbers_are_trls(folder: Path, store: TokenStore, trainer: Any):
    data = PackedDataModule(store, heldout=None, settings=pair_settings(capacity=128))
    module = make_dpo_module(folder, data)
    module.configure_model()
    columns = [trainer.train_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
    expected = np.array([list(column) for column in columns]).T
    np.testing.assert_allclose(reference_logps(module, data), expected, rtol=1e-5, atol=0)

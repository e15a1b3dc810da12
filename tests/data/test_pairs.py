"""Preference pairs as packed rows, worked out once more without the plan's arithmetic."""

from pathlib import Path

import numpy as np
import pytest
from toy_store import phi_like_tokenizer

from mediphi.batches import PreferenceBatch
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import PlanSettings, TrainingPlan
from mediphi.data.render import Piece, Rendered
from mediphi.data.sequences import PAIR_KINDS, Layout
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore
from mediphi.records import LABELS, PieceKind

ERRORS = ("spelling errors", "brevity")
LAYOUTS: tuple[Layout, ...] = ("pairs", "shared_pairs")


def run_of(kind: PieceKind, ids: list[int]) -> Piece:
    return Piece(kind, "", tuple(ids), ())


def pair_store(cache: Path, sizes: list[tuple[int, int, int]]) -> TokenStore:
    """Pairs of (prompt, chosen, rejected) tokens; ids say where a token stands."""
    tokenizer = phi_like_tokenizer()
    documents = []
    for number, (prompt, chosen, rejected) in enumerate(sizes):
        ids = list(range(1, 1 + prompt + chosen + rejected))
        pieces = [
            run_of("system", ids[:1]),
            run_of("user", ids[1:prompt]),
            run_of("chosen", ids[prompt : prompt + chosen]),
            run_of("rejected", ids[prompt + chosen :]),
        ]
        labels = {"task_type": "summarization", "error_type": ERRORS[number % 2]}
        documents.append(Rendered(f"a/{number}", "a", pieces, labels))
    key = StoreKey(tokenizer_sha256(tokenizer), "pairs", f"{sizes}", "train", 0)
    return build_store(documents, cache=cache, tokenizer=tokenizer, key=key)


SIZES = [(7, 3, 2), (4, 1, 5), (12, 2, 2), (3, 6, 1), (9, 4, 4), (2, 2, 3), (5, 5, 5)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return pair_store(tmp_path_factory.mktemp("pairs"), SIZES)


def settings(layout: Layout, **changes: int) -> PlanSettings:
    numbers = {"capacity": 48, "global_batch": 1, **changes}
    return PlanSettings(kinds=PAIR_KINDS, layout=layout, **numbers)


def batches(store: TokenStore, layout: Layout, **changes: int) -> list[PreferenceBatch]:
    found = list(PackedLoader(TrainingPlan(store, settings(layout, **changes))))
    assert all(isinstance(batch, PreferenceBatch) for batch in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_answer_token_is_predicted_from_the_token_before_it(
    store: TokenStore, layout: Layout
):
    seen = []
    for batch in batches(store, layout):
        ids, positions = batch.input_ids[0].numpy(), batch.position_ids[0].numpy()
        for place, row in enumerate(batch.document_index.tolist()):
            prompt, *answers = SIZES[row]
            starts = (prompt, prompt + answers[0])
            for side, (size, start) in enumerate(zip(answers, starts, strict=True)):
                own = (batch.answer_ids == 2 * place + side).numpy()
                expected = np.arange(1 + start, 1 + start + size)
                assert batch.label_ids.numpy()[own].tolist() == expected.tolist()
                before = batch.logit_index.numpy()[own]
                assert ids[before].tolist() == [prompt, *expected[:-1]]
                assert positions[before].tolist() == list(range(prompt - 1, prompt - 1 + size))
            seen.append(row)
    assert sorted(seen) == list(range(len(SIZES)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boundaries_are_of_sequences_or_of_segments(store: TokenStore, layout: Layout):
    for batch in batches(store, layout):
        rows = batch.document_index.tolist()
        assert batch.shares_prompt == (layout == "shared_pairs")
        if batch.shares_prompt:
            lengths = [size for row in rows for size in SIZES[row]]
        else:
            lengths = [SIZES[row][0] + SIZES[row][side] for row in rows for side in (1, 2)]
        assert np.diff(batch.cu_seqlens.numpy()).tolist() == lengths
        assert batch.num_tokens == sum(lengths)
        assert batch.max_seqlen == max(p + max(c, r) for p, c, r in (SIZES[row] for row in rows))
        assert int(batch.position_ids.max()) == batch.max_seqlen - 1


def test_a_shared_prompt_stands_once(store: TokenStore):
    tokens = {layout: sum(b.num_tokens for b in batches(store, layout)) for layout in LAYOUTS}
    assert tokens["pairs"] - tokens["shared_pairs"] == sum(prompt for prompt, *_ in SIZES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_divided_by_the_pairs_of_the_global_batch(store: TokenStore, layout: Layout):
    plan = TrainingPlan(store, settings(layout, global_batch=2))
    loader = PackedLoader(plan)
    for step in range(plan.num_steps):
        parts = [loader[step * plan.accumulate + part] for part in range(plan.accumulate)]
        pairs = sum(len(batch.document_index) for batch in parts)
        assert {batch.num_global_targets for batch in parts} == {pairs}
    assert plan.num_targets == len(SIZES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_rows_gets_a_batch_without_pairs(store: TokenStore, layout: Layout):
    plan = TrainingPlan(store, settings(layout, capacity=200, global_batch=2, world_size=2))
    assert plan.num_rows == 1
    batch = PackedLoader(plan, rank=1)[0]
    assert isinstance(batch, PreferenceBatch)
    assert (batch.num_pairs, batch.num_tokens, len(batch.label_ids)) == (0, 1, 0)
    assert batch.num_global_targets == len(SIZES)
    assert not batch.shares_prompt and batch.cu_seqlens.tolist() == [0, 1]


def test_labels_and_references_follow_their_pair(store: TokenStore):
    plan = TrainingPlan(store, settings("shared_pairs"))
    reference = np.arange(2 * len(SIZES), dtype=np.float32).reshape(-1, 2)
    names = {"source": ("b", "a"), "task_type": ("", "x", "summarization"), "error_type": ERRORS}
    names["error_type"] = ("", *ERRORS)
    assert set(names) == {"source", *LABELS}
    for batch in PackedLoader(plan, group_names=names, reference=reference):
        assert isinstance(batch, PreferenceBatch)
        rows = batch.document_index.tolist()
        assert batch.reference_logps.tolist() == [[2.0 * row, 2.0 * row + 1] for row in rows]
        assert batch.error_ids.tolist() == [1 + row % 2 for row in rows]
        assert batch.task_ids.tolist() == [2] * len(rows)
        assert batch.source_ids.tolist() == [1] * len(rows)


def test_without_a_reference_its_numbers_are_no_numbers(store: TokenStore):
    assert all(batch.reference_logps.isnan().all() for batch in batches(store, "pairs"))


def test_long_is_what_the_model_sees_of_a_pair(tmp_path: Path):
    """Both answers of the second pair end at position 8, though its row holds 12 tokens more."""
    store = pair_store(tmp_path, [(7, 4, 2), (4, 4, 4)])
    plan = TrainingPlan(store, settings("shared_pairs"))
    assert plan.sequences.reach.tolist() == [11, 8]
    bounded = PlanSettings(PAIR_KINDS, 48, 1, layout="shared_pairs", long_above=10)
    rows = TrainingPlan(store, bounded)
    assert rows.num_rows == 2
    long = [bool(rows._is_long[row]) for row in range(2)]
    alone = [rows.chunks(np.array([row])).document.tolist() for row in range(2)]
    assert sorted(zip(alone, long, strict=True)) == [([0], True), ([1], False)]


def test_pairs_that_do_not_fit_are_named(store: TokenStore):
    plan = TrainingPlan(store, settings("pairs", capacity=15))
    assert plan.too_long.tolist() == [2, 4]  # of 16 and 17 tokens


def test_both_layouts_train_on_the_same_pairs_in_the_same_steps(store: TokenStore):
    first, second = (
        [sorted(batch.document_index.tolist()) for batch in batches(store, layout, capacity=16)]
        for layout in LAYOUTS
    )
    assert first == second and len(first) > 2


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_micro_batch_has_more_tokens_than_its_plan_says(
    store: TokenStore, layout: Layout, micro_batch: int
):
    """Compiled layers take rows padded to them: with prompts twice the longest, else full ones."""
    numbers = {"capacity": 18, "global_batch": 2, "micro_batch": micro_batch}
    plan = TrainingPlan(store, settings(layout, **numbers))
    tokens = [batch.num_tokens for batch in PackedLoader(plan)]
    assert len(set(tokens)) > 2 and max(tokens) <= plan.max_tokens
    if layout == "shared_pairs":
        assert plan.max_tokens == 18 * micro_batch
    else:
        assert max(tokens) > 18 * micro_batch
        assert micro_batch > 1 or max(tokens) == plan.max_tokens

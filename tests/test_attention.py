"""Packed rows equal separate documents, in logits and gradients, for every kernel."""

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCAB, packed, random_documents, reference_varlen, small_model
from torch import Tensor
from torch.nn.attention import varlen
from toy_store import sized_store

from mediphi import attention
from mediphi.batches import PreferenceBatch, TokenBatch
from mediphi.blocks import Block, Blocks, length_blocks, shared_prompt_blocks
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import PlanSettings, TrainingPlan
from mediphi.errors import UserError
from mediphi.records import PIECE_KINDS

LENGTHS = [1, 17, 2, 33, 5, 5, 40, 9]


def packed_logits(model: Any, batch: TokenBatch, kernel: attention.Kernel = "sdpa") -> Tensor:
    """Logits of a packed row as training computes them."""
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **attention.boundaries(batch, kernel),
    ).logits[0]


def separate_logits(model: Any, documents: list[Tensor], implementation: str) -> Tensor:
    model.set_attn_implementation(implementation)
    rows = [model(input_ids=d[None], use_cache=False).logits[0] for d in documents]
    model.set_attn_implementation("mediphi_sdpa")
    return torch.cat(rows)


def gradients(model: Any, logits: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(logits, batch.target_ids[0], ignore_index=-100, reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("peer", ["sdpa", "eager"])
def test_packed_logits_and_gradients_are_those_of_separate_documents(
    peer: str, key_value_heads: int
):
    model = small_model(num_key_value_heads=key_value_heads)
    documents = random_documents(LENGTHS)
    batch = packed(documents)
    ours, alone = packed_logits(model, batch), separate_logits(model, documents, peer)
    # measured: 3.5e-6 on logits of up to 4.2
    torch.testing.assert_close(ours, alone, atol=3e-5, rtol=0)
    got, expected = gradients(model, ours, batch), gradients(model, alone, batch)
    for name, grad in expected.items():
        # measured: 9e-7 of the norm
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_any_mix_of_lengths_equals_separate_documents(lengths: list[int], seed: int):
    model = small_model(num_hidden_layers=1)
    documents = random_documents(lengths, seed=seed)
    with torch.no_grad():
        ours = packed_logits(model, packed(documents))
        torch.testing.assert_close(
            ours, separate_logits(model, documents, "sdpa"), atol=3e-5, rtol=0
        )


def moved(model: Any, run: Any, changed: int = 3) -> list[float]:
    """How far each document's logits move when one document gets other tokens."""
    documents = random_documents(LENGTHS)
    batch = packed(documents)
    documents[changed] = (documents[changed] + 11) % VOCAB
    other = packed(documents)
    with torch.no_grad():
        difference = (run(model, batch) - run(model, other)).abs().amax(-1)
    return [float(difference[a:b].max()) for a, b in pairwise(batch.cu_seqlens.tolist())]


def test_changing_one_document_moves_no_other():
    shifts = moved(small_model(), packed_logits)
    assert shifts.pop(3) > 0.1
    assert max(shifts) == 0.0


def test_plain_sdpa_with_a_cache_would_leak():
    """The control: transformers drops the block-diagonal mask when it makes a cache."""

    def with_cache(use_cache: bool) -> Any:
        return lambda model, batch: model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=use_cache
        ).logits[0]

    model = small_model("sdpa")
    assert min(moved(model, with_cache(True))[4:]) > 0.01
    tight = moved(model, with_cache(False))
    assert tight.pop(3) > 0.1 and max(tight) < 1e-5


def test_without_boundaries_packed_attention_refuses_to_run():
    model, batch = small_model(), packed(random_documents([4, 3]))
    with pytest.raises(ValueError, match="needs `blocks`"):
        model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)


def test_a_mask_is_refused_because_it_would_be_ignored():
    heads = torch.randn(1, 2, 5, 4)
    blocks = length_blocks(torch.tensor([0, 5], dtype=torch.int32))
    mask = torch.ones(1, 1, 5, 5)
    with pytest.raises(ValueError, match="no attention mask"):
        attention.sdpa_attention(torch.nn.Identity(), heads, heads, heads, mask, blocks=blocks)


# --- blocks of similar length


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=30),
    growth=st.floats(1.0, 3.0),
)
def test_blocks_are_a_partition_of_the_row_with_bounded_padding(lengths: list[int], growth: float):
    ends = np.cumsum([0, *lengths])
    cu_seqlens = torch.from_numpy(ends.astype(np.int32))
    blocks = length_blocks(cu_seqlens, growth=growth)
    places = torch.cat([block.rows.flatten()[block.real] for block in blocks])
    assert sorted(places.tolist()) == list(range(sum(lengths)))
    starts = set(ends[:-1].tolist())
    for rows, real, keys, masked in blocks:
        assert keys is rows and masked is None  # causal
        mask = torch.zeros(rows.numel(), dtype=torch.bool)
        mask[real] = True
        mask = mask.view(rows.shape)
        for row, kept in zip(rows, mask, strict=True):
            own = row[kept]
            # a document, whole, from its first token on, before any padding
            assert int(own[0]) in starts and int(own[-1]) + 1 in ends
            assert own.tolist() == list(range(int(own[0]), int(own[0]) + len(own)))
            assert bool(kept[: len(own)].all()) and len(own) * growth >= rows.shape[1]


def test_equal_lengths_make_one_block_without_padding():
    (block,) = length_blocks(torch.tensor([0, 7, 14, 21], dtype=torch.int32))
    assert block.rows.tolist() == [list(range(i, i + 7)) for i in (0, 7, 14)]
    assert len(block.real) == 21


# --- sliding window


def test_a_sequence_longer_than_the_sliding_window_is_refused_in_one_line():
    model = small_model(sliding_window=16)
    packed_logits(model, packed(random_documents([16, 3])))
    with pytest.raises(UserError, match=r"17 tokens exceeds.*window of 16") as refused:
        packed_logits(model, packed(random_documents([17, 3])))
    assert "\n" not in str(refused.value)


# --- the varlen kernel's arguments


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_varlen_and_sdpa_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, key_value_heads: int
):
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    model = small_model(num_key_value_heads=key_value_heads)
    batch = packed(random_documents(LENGTHS))
    with torch.no_grad():
        expected = packed_logits(model, batch)
        model.set_attn_implementation("mediphi_varlen")
        got = packed_logits(model, batch, "varlen")
    # bf16 inside the kernel; measured: 0.06 on logits of up to 4.2
    torch.testing.assert_close(got, expected, atol=0.15, rtol=0)


def test_varlen_takes_the_arguments_of_other_collators(monkeypatch: pytest.MonkeyPatch):
    """TRL's and transformers' know of no positions behind the last sequence."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    batch = packed(random_documents([5, 9]))
    q, k, v = torch.randn(3, 1, 2, batch.num_tokens, 8).unbind()
    sealed = attention.boundaries(batch, "varlen")
    theirs = {n: x for n, x in sealed["sealed"].arguments.items() if n != "num_tokens"}
    ours, got = (
        attention.varlen_attention(torch.nn.Identity(), q, k, v, None, **options)[0]
        for options in (sealed, theirs)
    )
    assert set(theirs) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert torch.equal(ours, got)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_a_models_own_scale_is_used(monkeypatch: pytest.MonkeyPatch, kernel: attention.Kernel):
    """Phi-3 has the default scale, other architectures don't."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    q, k, v = torch.randn(3, 1, 2, 12, 4, generator=torch.Generator().manual_seed(0))
    call = attention.sdpa_attention if kernel == "sdpa" else attention.varlen_attention
    options = attention.boundaries(packed(random_documents([12])), kernel)
    got, weights = call(torch.nn.Identity(), q, k, v, None, scaling=2.0, **options)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=2.0).transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=1e-5 if kernel == "sdpa" else 0.05, rtol=0)
    assert weights is None


def test_the_fake_names_its_arguments_as_torch_does():
    import inspect

    real = inspect.signature(varlen.varlen_attn).parameters
    assert set(inspect.signature(reference_varlen).parameters) <= set(real)


@pytest.mark.parametrize("fault", [{"dropout": 0.1}, {"sealed": None}])
def test_varlen_refuses_dropout_and_missing_boundaries(fault: dict[str, Any]):
    heads = torch.randn(1, 2, 5, 4)
    options = attention.boundaries(packed(random_documents([5])), "varlen") | fault
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises(ValueError, match="needs boundaries"):
        attention.varlen_attention(torch.nn.Identity(), heads, heads, heads, None, **options)


# --- answers that share a prompt

PAIRS = [(40, 12, 15), (7, 30, 3), (1, 1, 1), (38, 14, 14), (39, 5, 13), (22, 9, 40)]
"""Lengths of prompt, chosen and rejected answer."""


class SharedRow(NamedTuple):
    """Pairs with their prompts once, and the same pairs as two whole sequences each."""

    input_ids: Tensor
    position_ids: Tensor
    cu_parts: Tensor
    sequences: list[Tensor]
    places: list[Tensor]


def shared_row(pairs: Any = PAIRS, *, seed: int = 0) -> SharedRow:
    parts = random_documents([n for pair in pairs for n in pair], seed=seed)
    ends = np.cumsum([0, *map(len, parts)])
    where = [torch.arange(a, b) for a, b in pairwise(ends)]
    positions = [
        torch.arange(n) + start for p, c, r in pairs for n, start in ((p, 0), (c, p), (r, p))
    ]
    wholes = [(i, i + side) for i in range(0, len(parts), 3) for side in (1, 2)]
    return SharedRow(
        torch.cat(parts)[None],
        torch.cat(positions)[None],
        torch.from_numpy(ends.astype(np.int32)),
        [torch.cat([parts[i], parts[j]]) for i, j in wholes],
        [torch.cat([where[i], where[j]]) for i, j in wholes],
    )


def shared_hidden(
    model: Any, row: SharedRow, kernel: attention.Kernel = "sdpa", *, shares: bool = True
) -> Tensor:
    """Hidden states; with `shares` off, by the boundaries of one plain sequence a pair."""
    if shares:
        options = attention.shared_prompt_boundaries(row.cu_parts, kernel)
    else:
        pairs = row.input_ids[0].split(row.cu_parts[::3].diff().tolist())
        options = attention.boundaries(packed(pairs), kernel)
    return model.get_decoder()(
        input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **options
    ).last_hidden_state[0]


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_answers_that_share_a_prompt_equal_separate_sequences(key_value_heads: int):
    """Hidden states and gradients: a prompt's are the sum of those of both its sequences."""
    model = small_model(num_key_value_heads=key_value_heads)
    row = shared_row()
    shared = shared_hidden(model, row)
    model.set_attn_implementation("sdpa")
    alone = [model.model(s[None], use_cache=False).last_hidden_state[0] for s in row.sequences]
    for hidden, places in zip(alone, row.places, strict=True):
        # measured: 1.8e-6 on states of up to 3.7
        torch.testing.assert_close(shared[places], hidden, atol=1e-5, rtol=0)

    weights = torch.randn(shared.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.model.named_parameters(), strict=True)
    losses = [(h * weights[p]).sum() for h, p in zip(alone, row.places, strict=True)]
    together = sum((shared[p] * weights[p]).sum() for p in row.places)
    expected = torch.autograd.grad(torch.stack(losses).sum(), parameters)
    got = torch.autograd.grad(together, parameters)
    for name, grad, want in zip(names, got, expected, strict=True):
        assert (grad - want).norm() <= 1e-5 * want.norm(), name  # measured: 6e-7


@settings(deadline=None, max_examples=15)
@given(
    pairs=st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_pairs_of_any_lengths_equal_separate_sequences(pairs: list[Any], seed: int):
    model = small_model(num_hidden_layers=2)
    row = shared_row(pairs, seed=seed)
    with torch.no_grad():
        shared = shared_hidden(model, row)[torch.cat(row.places)]
        batch = packed(row.sequences)
        separate = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention.boundaries(batch, "sdpa"),
        ).last_hidden_state[0]
    torch.testing.assert_close(shared, separate, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("shares", [True, False])
def test_no_answer_sees_the_other(
    monkeypatch: pytest.MonkeyPatch, kernel: attention.Kernel, shares: bool
):
    """With the boundaries of plain sequences, the control, the rejected answer sees the chosen."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    model = small_model(attention.IMPLEMENTATIONS[kernel])
    row = shared_row()
    a, b = row.cu_parts[4:6].tolist()  # the second pair's chosen answer
    ids = row.input_ids.clone()
    ids[:, a:b] = (ids[:, a:b] + 11) % VOCAB
    other = row._replace(input_ids=ids)

    with torch.no_grad():
        before, after = (shared_hidden(model, r, kernel, shares=shares) for r in (row, other))
    moved = (before - after).abs().amax(-1)
    parts = [float(moved[a:b].max()) for a, b in pairwise(row.cu_parts.tolist())]
    assert parts.pop(4) > 0.1
    if not shares:
        assert parts.pop(4) > 0.1
    assert max(parts) == 0.0


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_varlen_and_sdpa_share_prompts_alike(monkeypatch: pytest.MonkeyPatch, key_value_heads: int):
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    model = small_model(num_key_value_heads=key_value_heads)
    row = shared_row()
    with torch.no_grad():
        expected = shared_hidden(model, row)
        model.set_attn_implementation("mediphi_varlen")
        got = shared_hidden(model, row, "varlen")
    # bf16 inside the kernel; measured: 0.07 on states of up to 3.7
    torch.testing.assert_close(got, expected, atol=0.15, rtol=0)


def visible_by(blocks: list[Block], tokens: int) -> Tensor:
    """Which token sees which, `[tokens, tokens]`, counted."""
    seen = torch.zeros(tokens, tokens, dtype=torch.long)
    for rows, real, keys, mask in blocks:
        causal = torch.ones(rows.shape[1], keys.shape[1], dtype=torch.bool).tril()
        visible = causal.expand(len(rows), -1, -1) if mask is None else mask[:, 0]
        is_real = torch.zeros(rows.numel(), dtype=torch.bool)
        is_real[real] = True
        for sequence, query in is_real.view(rows.shape).nonzero().tolist():
            seen[rows[sequence, query]] += torch.bincount(
                keys[sequence, visible[sequence, query]], minlength=tokens
            )
    return seen


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(*[st.integers(1, 25)] * 3), min_size=1, max_size=8),
    growth=st.floats(1.0, 3.0),
)
def test_every_token_sees_its_own_past_once_and_padding_is_bounded(pairs: list[Any], growth: float):
    row = shared_row(pairs)
    tokens = row.input_ids.shape[1]
    blocks = shared_prompt_blocks(row.cu_parts, growth=growth)
    expected = torch.zeros(tokens, tokens, dtype=torch.long)
    for places in row.places:
        for i, place in enumerate(places):
            expected[place, places[: i + 1]] = 1
    assert torch.equal(visible_by(blocks, tokens), expected)
    for rows, real, keys, mask in blocks:
        lengths = torch.bincount(real // rows.shape[1], minlength=len(rows))
        assert bool((lengths * growth >= rows.shape[1]).all())
        seen = (
            lengths
            if mask is None
            else mask[:, 0]
            .gather(1, (lengths - 1)[:, None, None].expand(-1, -1, keys.shape[1]))
            .sum((1, 2))
        )
        assert bool((seen * growth >= keys.shape[1]).all())


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
def test_every_of_many_answers_sees_its_prompt_and_itself_alone(
    num_answers: int, num_prompts: int, seed: int
):
    lengths = np.random.default_rng(seed).integers(1, 9, (num_prompts, 1 + num_answers))
    cu_parts = torch.tensor([0, *lengths.flatten().tolist()]).cumsum(0).int()
    tokens = int(cu_parts[-1])
    expected = torch.zeros(tokens, tokens, dtype=torch.long)
    for prompt, *answers in cu_parts.unfold(0, num_answers + 2, num_answers + 1).tolist():
        for start, end in [(prompt, answers[0]), *pairwise(answers)]:
            expected[start:end, prompt : answers[0]] = 1
            expected[start:end, start:end] = 1
    expected = expected.tril()
    blocks = shared_prompt_blocks(cu_parts, num_answers=num_answers)
    assert torch.equal(visible_by(blocks, tokens), expected)
    options = attention.shared_prompt_boundaries(cu_parts, "varlen", num_answers=num_answers)
    assert torch.equal(_visible_by_varlen(options, tokens), expected)


def _visible_by_varlen(options: dict[str, Any], tokens: int) -> Tensor:
    """The last query of a sequence sees its last key, as the kernel has it."""
    seen = torch.zeros(tokens, tokens, dtype=torch.long)
    queries, keys = (options[f"cu_seq_lens_{x}"].tolist() for x in "qk")
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        for place in range(a, b):
            own = options["kv_index"][c : d - (b - 1 - place)]
            seen[place] += torch.bincount(own, minlength=tokens)
    return seen


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("shares", [True, False])
def test_a_batch_of_pairs_brings_the_boundaries_of_its_layout(
    kernel: attention.Kernel, shares: bool
):
    row = shared_row()
    none, pairs = torch.zeros(0, dtype=torch.long), len(PAIRS)
    groups = torch.zeros(pairs, dtype=torch.uint8)
    batch = PreferenceBatch(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        cu_seqlens=row.cu_parts,
        lengths=tuple(row.cu_parts.diff().tolist()),
        max_seqlen=62,
        shares_prompt=shares,
        logit_index=none,
        label_ids=none,
        answer_ids=none,
        reference_logps=torch.zeros(pairs, 2),
        num_global_targets=pairs,
        document_index=torch.arange(pairs),
        source_ids=groups,
        task_ids=groups,
        error_ids=groups,
    )
    got = attention.boundaries(batch, kernel)
    if shares:
        expected = attention.shared_prompt_boundaries(row.cu_parts, kernel)
    elif kernel == "sdpa":
        expected = {"blocks": Blocks.of(length_blocks(row.cu_parts))}
    else:
        expected = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), row.cu_parts)
        expected |= dict.fromkeys(("max_length_q", "max_length_k"), 62)
        expected["num_tokens"] = row.input_ids.shape[1]
    if kernel == "sdpa":
        got, expected = (asdict(options["blocks"]) for options in (got, expected))
        assert got.pop("masks")[0] is expected.pop("masks")[0] is None
    else:
        got = got["sealed"].arguments
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_flash_cannot_share_a_prompt_and_says_what_to_do():
    with pytest.raises(UserError, match=r"share_prompt needs .*varlen or sdpa, or.*false") as told:
        attention.shared_prompt_boundaries(shared_row().cu_parts, "flash")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_a_shared_pair_longer_than_the_sliding_window_is_refused(
    monkeypatch: pytest.MonkeyPatch, kernel: attention.Kernel
):
    """The window is on what an answer sees, its prompt and itself, however long the row."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    model = small_model(attention.IMPLEMENTATIONS[kernel], sliding_window=20)
    shared_hidden(model, shared_row([(10, 10, 10), (5, 15, 15)]), kernel)
    with pytest.raises(UserError, match="21 tokens exceeds"):
        shared_hidden(model, shared_row([(10, 10, 11)]), kernel)


# --- choice


def test_auto_takes_the_fastest_kernel_and_a_wish_is_checked():
    assert attention.choose_kernel("auto", device_type="cpu") == "sdpa"
    assert attention.choose_kernel("auto", device_type="cuda") in ("flash", "varlen")
    assert attention.choose_kernel("auto", device_type="cuda", half=False) == "sdpa"
    assert attention.choose_kernel("varlen", device_type="cuda") == "varlen"
    with pytest.raises(UserError, match="attention=flash cannot run on this cpu"):
        attention.choose_kernel("flash", device_type="cpu")


# --- LongRoPE: short or long factors for a whole micro-batch


def test_a_long_neighbour_would_change_a_short_documents_numbers():
    """The trap: transformers looks at the largest position of the whole batch."""
    model = small_model()  # short factors up to 64 positions
    short, long = random_documents([30, 90])
    with torch.no_grad():
        alone = packed_logits(model, packed([short]))
        beside_short = packed_logits(model, packed([short, long[:60]]))[:30]
        beside_long = packed_logits(model, packed([short, long]))[:30]
    assert (beside_short - alone).abs().max() < 1e-5
    assert (beside_long - alone).abs().max() > 0.05


@pytest.mark.parametrize(("long_above", "mixed"), [(64, False), (None, True)])
def test_our_micro_batches_never_mix_short_and_long(
    tmp_path: Path, long_above: int | None, mixed: bool
):
    sizes = [(n,) for n in (90, 30, 20, 70, 100, 12, 64, 65, 40, 8, 25, 33)]
    settings_ = PlanSettings(
        kinds=PIECE_KINDS, capacity=128, global_batch=4, micro_batch=2, long_above=long_above
    )
    plan = TrainingPlan(sized_store(tmp_path, sizes), settings_)
    batches = [b for b in PackedLoader(plan) if b.document_index.tolist() != [-1]]
    lengths = [b.cu_seqlens.diff() for b in batches]
    kinds = [{bool(x) for x in (row > 64).tolist()} for row in lengths]
    assert any(k == {True, False} for k in kinds) == mixed
    assert {True} in kinds or mixed


def test_documents_packed_by_our_plan_keep_their_own_numbers(tmp_path: Path):
    """The cure, end to end: every document of every micro-batch equals itself alone."""
    sizes = [(n,) for n in (90, 30, 20, 70, 12, 64, 65, 40)]
    settings_ = PlanSettings(
        kinds=PIECE_KINDS, capacity=128, global_batch=4, micro_batch=2, long_above=64
    )
    model = small_model()
    for batch in PackedLoader(TrainingPlan(sized_store(tmp_path, sizes), settings_)):
        # the store's documents repeat one token, which would hide a wrong angle
        ids = torch.randint(0, VOCAB, batch.input_ids[0].shape)
        batch = replace(batch, input_ids=ids[None])
        documents = [ids[a:b] for a, b in pairwise(batch.cu_seqlens.tolist())]
        with torch.no_grad():
            alone = separate_logits(model, documents, "sdpa")
            torch.testing.assert_close(packed_logits(model, batch), alone, atol=5e-5, rtol=0)

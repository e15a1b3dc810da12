"""All attention kernels give the same numbers on a CUDA device; `pytest -m gpu tests/gpu`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import VOCAB, packed, random_documents, small_model
from small_training import pair_settings, random_pairs
from torch import Tensor

from mediphi import attention
from mediphi.batches import PreferenceBatch
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import TrainingPlan
from mediphi.modules.causal_lm import hidden_states, takes_padding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LENGTHS = [1, 17, 2, 133, 5, 5, 40, 9]
SIZES = {"hidden_size": 128, "max_position_embeddings": 512, "rope_scaling": None}
KERNELS: list[attention.Kernel] = ["flash", "varlen", "sdpa"]


def run(kernel: attention.Kernel, *, heads: int, changed: int | None = None) -> dict[str, Tensor]:
    """Logits of a packed row and all gradients, in bf16 autocast as in training."""
    if kernel not in attention.available_kernels("cuda"):
        pytest.skip(f"{kernel} is not installed")
    model = small_model(attention.IMPLEMENTATIONS[kernel], num_key_value_heads=heads, **SIZES)
    model = model.cuda()
    documents = random_documents(LENGTHS)
    if changed is not None:
        documents[changed] = (documents[changed] + 11) % VOCAB
    batch = packed(documents).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention.boundaries(batch, kernel),
        ).logits[0]
    F.cross_entropy(logits.float(), batch.target_ids[0], ignore_index=-100).backward()
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach().float(), **grads}


def exact(heads: int) -> dict[str, Tensor]:
    """The same in float32 on the CPU, which the CPU tests hold against transformers."""
    model = small_model(num_key_value_heads=heads, **SIZES)
    batch = packed(random_documents(LENGTHS))
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **attention.boundaries(batch, "sdpa"),
    ).logits[0]
    F.cross_entropy(logits, batch.target_ids[0], ignore_index=-100).backward()
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_near_float32_on_the_cpu(kernel: attention.Kernel, heads: int):
    expected = exact(heads)
    for name, value in run(kernel, heads=heads).items():
        want = expected[name]
        # bf16 autocast on a CPU: up to 0.09; without boundaries: at least 0.4
        assert (value.cpu() - want).norm() <= 0.18 * want.norm() + 1e-6, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_changing_one_document_moves_no_other(kernel: attention.Kernel):
    before, after = (run(kernel, heads=2, changed=c)["logits"] for c in (None, 3))
    shift = (before - after).abs().amax(-1).split(LENGTHS)
    assert float(shift[3].max()) > 0.1
    assert max(float(s.max()) for i, s in enumerate(shift) if i != 3) == 0.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_phi35_minis_head_dimension_of_96_runs(kernel: attention.Kernel):
    if kernel not in attention.available_kernels("cuda"):
        pytest.skip(f"{kernel} is not installed")
    batch = packed(random_documents(LENGTHS)).to("cuda")
    tokens = batch.num_tokens
    q, k, v = (torch.randn(1, 4, tokens, 96, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    outputs = {}
    for name in ("sdpa", kernel):
        if name == "flash":
            pytest.skip("transformers calls flash-attn itself")
        call = attention.sdpa_attention if name == "sdpa" else attention.varlen_attention
        outputs[name], _ = call(
            torch.nn.Identity(), q, k, v, None, **attention.boundaries(batch, name)
        )
    torch.testing.assert_close(outputs[kernel], outputs["sdpa"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_positions_behind_the_last_sequence_change_no_number(kernel: attention.Kernel):
    """What a kernel leaves undefined would be NaN: freed memory is full of them."""
    if kernel not in attention.available_kernels("cuda"):
        pytest.skip(f"{kernel} is not installed")
    model = small_model(attention.IMPLEMENTATIONS[kernel], num_key_value_heads=2, **SIZES).cuda()
    batch = packed(random_documents(LENGTHS)).to("cuda")
    found = []
    longer = batch.num_tokens + 100
    assert takes_padding(batch.num_tokens, longer)
    for tokens in (None, longer):
        model.zero_grad()
        del_me = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 24)]
        del del_me
        with torch.autocast("cuda", torch.bfloat16):
            hidden = hidden_states(model, batch, kernel, compiled_tokens=tokens)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        (hidden.float() * weights.cuda()).sum().backward()
        grads: dict[str, Any] = {n: p.grad.clone() for n, p in model.model.named_parameters()}
        found.append({"hidden": hidden.detach().float(), **grads})
    plain, padded = found
    for name, want in plain.items():
        # on a CPU not at all; a GPU's products round otherwise in other shapes
        assert (padded[name] - want).norm() <= 0.02 * want.norm() + 1e-6, name


# --- answers that share a prompt

PAIRS = [(133, 40, 17), (9, 2, 60), (1, 1, 1), (130, 41, 70)]
"""Lengths of prompt, chosen and rejected answer."""

SHARING: list[attention.Kernel] = ["varlen", "sdpa"]


@pytest.fixture
def batch(tmp_path: Path) -> PreferenceBatch:
    """All pairs in one row, each prompt once."""
    store = random_pairs(tmp_path, PAIRS, vocab=VOCAB)
    settings = pair_settings(capacity=512, global_batch=1)
    (batch,) = PackedLoader(TrainingPlan(store, settings))
    assert isinstance(batch, PreferenceBatch) and batch.shares_prompt
    return batch


def run_shared(
    batch: PreferenceBatch, kernel: attention.Kernel, *, heads: int, device: str = "cuda"
) -> dict[str, Tensor]:
    """Hidden states and all gradients, in bf16 autocast on a GPU, else in float32."""
    model = small_model(attention.IMPLEMENTATIONS[kernel], num_key_value_heads=heads, **SIZES)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = hidden_states(model.to(device), batch.to(device), kernel)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights.to(device)).sum().backward()
    grads: dict[str, Any] = {n: p.grad.cpu() for n, p in model.model.named_parameters()}
    return {"hidden": hidden.detach().float().cpu(), **grads}


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kernel", SHARING)
def test_shared_prompts_are_near_float32_on_the_cpu(
    batch: PreferenceBatch, kernel: attention.Kernel, heads: int
):
    """Which the CPU tests hold against separate sequences; causal masks end bottom right."""
    expected = run_shared(batch, "sdpa", heads=heads, device="cpu")
    for name, value in run_shared(batch, kernel, heads=heads).items():
        want = expected[name]
        # bf16 on a CPU: up to 0.12; with causal masks that end top left: at least 0.5
        assert (value - want).norm() <= 0.25 * want.norm(), name


@pytest.mark.parametrize("kernel", SHARING)
def test_no_answer_sees_the_other(batch: PreferenceBatch, kernel: attention.Kernel):
    """The second pair's chosen answer changes."""
    start, end = (int(batch.cu_seqlens[place]) for place in (4, 5))
    changed = batch.input_ids.clone()
    changed[0, start:end] = (changed[0, start:end] + 11) % VOCAB
    batches = (batch, replace(batch, input_ids=changed))
    before, after = (run_shared(own, kernel, heads=2)["hidden"] for own in batches)
    shift = [float(s.max()) for s in (before - after).abs().amax(-1).split(batch.lengths)]
    assert shift.pop(4) > 0.1
    assert max(shift) == 0.0

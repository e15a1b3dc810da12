"""Attention kernels: each runs a small packed row, output and gradient against plain attention."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from mediphi import attention
from mediphi.batches import IGNORE, TokenBatch
from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.doctor.packed import compare, kernel_dtype, sequences
from mediphi.errors import UserError

LENGTHS = (7, 40, 1, 23, 40, 64)


def attention_kernels(case: Case) -> Iterator[Finding]:
    """A line for each kernel that should run on this device, and which one training takes."""
    here, wanted = case.device(), case.config.hardware.attention
    try:
        attention.choose_kernel(wanted, device_type=here.type)
    except UserError as error:
        yield failure("attention", str(error), remedy="hardware.attention=auto")
    for kernel in attention.available_kernels(here.type):
        is_chosen = kernel == here.kernel
        name = f"{kernel} (chosen)" if is_chosen else kernel
        fault, told = _trial(kernel, here.type)
        if not fault:
            yield ok("attention", f"{name}: {told}")
            continue
        others = [k for k in attention.available_kernels(here.type) if k != kernel]
        remedy = f"hardware.attention={others[-1]}" if others else "reinstall PyTorch"
        judge = failure if is_chosen else warning
        yield judge("attention", f"{name}: {fault}", remedy=remedy)


def _trial(kernel: attention.Kernel, device_type: str) -> tuple[str, str]:
    """What is wrong with a kernel, else how near it came."""
    try:
        model, batch = _model().to(device_type), _batch().to(device_type)  # type: ignore[arg-type]
        output = compare(model, batch, kernel)
        gradient = _gradient_difference(model, batch, kernel)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        return f"does not run here ({type(error).__name__}: {reason})", ""
    worst = max(output.difference, gradient)
    told = f"output {output.difference:.0e} and gradient {gradient:.0e} from one document at a time"
    if not worst <= output.tolerance:
        return f"wrong: {told} (allowed {output.tolerance:.0e})", ""
    return "", f"{told} ({str(kernel_dtype(kernel)).removeprefix('torch.')})"


def _gradient_difference(model: Any, batch: TokenBatch, kernel: attention.Kernel) -> float:
    """Of the input embeddings' gradients: the largest of the sequences, as a share of its norm."""
    ids = batch.input_ids
    weights = torch.linspace(-1, 1, ids.shape[1], device=ids.device)[:, None]
    packed = _gradient(
        model,
        ids,
        weights,
        implementation=attention.IMPLEMENTATIONS[kernel],
        dtype=kernel_dtype(kernel),
        inputs={"position_ids": batch.position_ids, **attention.boundaries(batch, kernel)},
    )
    differences = []
    for places in (each.to(ids.device) for each in sequences(batch)):
        alone = _gradient(
            model,
            ids[:, places],
            weights[places],
            implementation="sdpa",
            dtype=kernel_dtype(kernel),
            inputs={},
        )
        differences.append(float((packed[places] - alone).norm() / alone.norm()))
    return max(differences)


def _gradient(
    model: Any,
    ids: Tensor,
    weights: Tensor,
    *,
    implementation: str,
    dtype: torch.dtype,
    inputs: dict[str, Any],
) -> Tensor:
    """Of a weighted sum of hidden states, by the input embeddings, `[tokens, hidden]`."""
    model.set_attn_implementation(implementation)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autocast(ids.device.type, dtype, enabled=dtype == torch.bfloat16):
        decoder = model.get_decoder()
        out = decoder(inputs_embeds=embeddings, use_cache=False, **inputs).last_hidden_state[0]
    (gradient,) = torch.autograd.grad((out.float() * weights).sum(), embeddings)
    return gradient[0]


def _model() -> Phi3ForCausalLM:
    """Two layers with grouped queries and weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        sliding_window=None,
    )
    return Phi3ForCausalLM._from_config(config, dtype=torch.float32).eval()


def _batch() -> TokenBatch:
    """Random sequences of `LENGTHS`, one token and equal lengths among them; nothing is learnt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (1, sum(LENGTHS)), generator=generator)
    no_group = torch.zeros_like(ids, dtype=torch.uint8)
    return TokenBatch(
        input_ids=ids,
        target_ids=torch.full_like(ids, IGNORE),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        kind_ids=no_group,
        source_ids=no_group,
        task_ids=no_group,
        target_index=ids[0, :0],
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        lengths=LENGTHS,
        max_seqlen=max(LENGTHS),
        num_global_targets=1,
        document_index=torch.arange(len(LENGTHS)),
    )

"""Attention over packed rows: three kernels, one answer.

A row `[1, T]` holds many sequences end to end; no token may see another sequence. The boundaries
travel as keyword arguments through the Hugging Face model to the functions registered here:

- `flash`: flash-attn's varlen kernel, through transformers' own function.
- `varlen`: PyTorch's own varlen kernel (`torch.nn.attention.varlen`), CUDA only.
- `sdpa`: sequences of similar length are padded to one block and go through PyTorch's causal SDPA.
  On a CPU this costs the FLOPs of the sequences instead of the square of the row, which a
  block-diagonal mask over the row would cost.

A row may have more positions than its sequences have tokens: compiled layers take rows of one
length. Attention leaves such a tail at its end alone, at no cost, and gives it zeros.

Two answers to one prompt may share it: a row then holds `[prompt | chosen | rejected]` pair by
pair, both answers start at the same position, and neither sees the other. Prompt and chosen answer
are one causal sequence as they lie; the rejected answer's queries look at the prompt's keys and at
their own.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward

from mediphi.batches import Batch, PreferenceBatch, send
from mediphi.blocks import Blocks, length_blocks, prompt_bounds, shared_prompt_blocks
from mediphi.errors import UserError

Kernel = Literal["flash", "varlen", "sdpa"]

IMPLEMENTATIONS: dict[Kernel, str] = {
    "flash": "flash_attention_2",
    "varlen": "mediphi_varlen",
    "sdpa": "mediphi_sdpa",
}
"""Kernel -> what `attn_implementation` is called in transformers."""

NEEDED_CAPABILITY = (8, 0)
"""Of a GPU for flash attention: Ampere."""

HALF_ONLY = "computes in half precision, hardware.precision=32-true does not: take sdpa or auto"
FLASH_SHARES_NOTHING = (
    "stage.share_prompt needs hardware.attention=varlen or sdpa, or set it to false"
)


def choose_kernel(
    wanted: str,
    *,
    device_type: str,
    shares_prompts: bool = False,
    half: bool = True,
    is_here: bool = True,
) -> Kernel:
    """The best kernel that is there, or the wanted one.

    Args:
        wanted: a kernel, or `auto`.
        device_type: `cuda` or `cpu`.
        shares_prompts: whether rows will hold two answers to one prompt, which flash cannot do.
        half: whether products are in half precision, the only one of flash and varlen; in float32
            `auto` does not take them.
        is_here: else the device is another machine's: it has whatever is wanted, and `auto` counts
            on nothing that has to be installed.

    Raises:
        UserError: the wanted kernel cannot run here.
    """
    elsewhere: list[Kernel] = ["varlen", "sdpa", "flash"]
    available = available_kernels(device_type) if is_here else elsewhere
    if shares_prompts and wanted == "auto":
        available = [kernel for kernel in available if kernel != "flash"]
    if shares_prompts and wanted == "flash":
        raise UserError(FLASH_SHARES_NOTHING)
    if wanted == "auto":
        return available[0] if half else "sdpa"
    if wanted not in available:
        raise UserError(
            f"hardware.attention={wanted} cannot run on this {device_type}: "
            f"available are {', '.join(available)} (or auto)"
        )
    if wanted != "sdpa" and not half:
        raise UserError(f"hardware.attention={wanted} {HALF_ONLY}")
    return wanted  # type: ignore[return-value]


def available_kernels(device_type: str) -> list[Kernel]:
    """Kernels that run on this device, fastest first."""
    if device_type != "cuda":
        return ["sdpa"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < NEEDED_CAPABILITY:
        return ["sdpa"]
    from transformers.utils.import_utils import is_flash_attn_2_available

    flash: list[Kernel] = ["flash"] if is_flash_attn_2_available() else []
    return [*flash, "varlen", "sdpa"]


@dataclass(slots=True)  # not frozen: torch.compile looks into those
class Sealed:
    """Keyword arguments of attention that a compiled layer hands on without a look inside.

    In the open, their numbers and sizes would be part of the compiled code.
    """

    arguments: dict[str, Any]


def boundaries(batch: Batch, kernel: Kernel) -> dict[str, Any]:
    """Keyword arguments of the model call that keep the sequences of a row apart.

    Worked out on the host, from lengths that it knows, and sent without waiting for the device.

    Raises:
        UserError: shared prompts, which the kernel cannot do.
    """
    shares = isinstance(batch, PreferenceBatch) and batch.shares_prompt
    if not shares and kernel != "sdpa":
        arguments = {
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
            "num_tokens": batch.num_tokens,
        }
        return {"sealed": Sealed(arguments)}
    bounds = torch.tensor([0, *batch.lengths]).cumsum(0).int()
    if shares:
        made = shared_prompt_boundaries(bounds, kernel)
    else:
        made = {"blocks": Blocks.of(length_blocks(bounds))}
    sent = {name: _sent(value, batch.input_ids.device) for name, value in made.items()}
    return sent if kernel == "sdpa" else {"sealed": Sealed(sent)}


def _sent(value: Any, device: torch.device) -> Any:
    if isinstance(value, Blocks):
        return value.to(device)
    return send(value, device) if isinstance(value, Tensor) else value


def shared_prompt_boundaries(
    cu_parts: Int32[Tensor, " parts_plus_1"], kernel: Kernel, *, num_answers: int = 2
) -> dict[str, Any]:
    """Keyword arguments of the model call on a row of answers, each prompt once before its own.

    Args:
        cu_parts: `[(1 + num_answers) * prompts + 1]`, on the CPU: boundaries of a prompt and its
            answers in turn (chosen and rejected, of pairs); none is empty. The position ids of all
            answers go on from the prompt's.
        num_answers: of every prompt, at least 2.

    Raises:
        UserError: `flash`, which transformers calls with the keys in the order of the row.
    """
    if kernel == "flash":
        raise UserError(FLASH_SHARES_NOTHING)
    if kernel == "sdpa":
        return {"blocks": Blocks.of(shared_prompt_blocks(cu_parts, num_answers=num_answers))}
    keys = []
    for prompt, *answers in prompt_bounds(cu_parts, num_answers).tolist():
        keys.append(torch.arange(prompt, answers[1]))
        for start, end in pairwise(answers[1:]):
            own = torch.arange(start, end)
            keys.append(torch.cat([torch.arange(prompt, answers[0]), own]))
    lengths_k = torch.tensor([len(k) for k in keys])
    cu_seqlens_q = cu_parts[torch.arange(len(cu_parts)) % (num_answers + 1) != 1]
    return {
        "cu_seq_lens_q": cu_seqlens_q,
        "cu_seq_lens_k": F.pad(lengths_k.cumsum(0), (1, 0)).int(),
        "max_length_q": int(cu_seqlens_q.diff().max()),
        "max_length_k": int(lengths_k.max()),
        "num_tokens": int(cu_parts[-1]),
        "kv_index": torch.cat(keys),
    }


def sdpa_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads head_dim"], None]:
    """Attention within each sequence of a packed row, block by block.

    Raises:
        ValueError: called without `blocks` or with a mask (it would be ignored).
    """
    blocks: Blocks | None = kwargs.get("blocks")
    if blocks is None or attention_mask is not None:
        raise ValueError("packed attention needs `blocks` and takes no attention mask")
    _refuse_window(kwargs.get("sliding_window"), max(shape[1] for shape in blocks.key_shapes))
    heads, head_dim = query.shape[1], query.shape[3]
    queries = _gather(query, blocks.rows, blocks.row_shapes)
    keys, values = (_gather(x, blocks.keys, blocks.key_shapes) for x in (key, value))
    parts = []
    for q, k, v, mask in zip(queries, keys, values, blocks.masks, strict=True):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=key.shape[1] != heads,
        )  # [sequences, heads, longest, head_dim]
        parts.append(out.transpose(1, 2).reshape(-1, heads, head_dim))
    return _with_tail(torch.cat(parts)[blocks.ways_back], query), None


def _with_tail(
    out: Float[Tensor, "real_tokens heads head_dim"], query: Float[Tensor, "1 heads tokens _"]
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Zeros for the positions behind the last sequence."""
    tail = query.shape[2] - len(out)
    return (F.pad(out, (0, 0, 0, 0, 0, tail)) if tail else out).unsqueeze(0)


def _gather(
    x: Float[Tensor, "1 heads tokens head_dim"],
    places: Int64[Tensor, " padded"],
    shapes: list[torch.Size],
) -> list[Tensor]:
    """For each block `[sequences, heads, longest, head_dim]`.

    One gather for all blocks: an index per block would cost its backward pass a row of zeros each.
    """
    pieces = x[0].transpose(0, 1)[places].split([shape.numel() for shape in shapes])
    return [t.unflatten(0, s).transpose(1, 2) for t, s in zip(pieces, shapes, strict=True)]


def varlen_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads head_dim"], None]:
    """PyTorch's varlen flash attention (torch >= 2.11), CUDA, half precision.

    Where a sequence has more keys than queries, the last query sees the last key.

    Raises:
        ValueError: dropout, which the kernel does not have, or a call without boundaries.
    """
    from torch.nn.attention.varlen import varlen_attn

    kwargs = _unsealed(kwargs)
    if dropout or "cu_seq_lens_q" not in kwargs or attention_mask is not None:
        raise ValueError("varlen attention needs boundaries and takes no dropout and no mask")
    _refuse_window(kwargs.get("sliding_window"), kwargs["max_length_k"])
    # The kernel leaves what no sequence covers undefined, perhaps NaN: it never sees a tail.
    num_tokens = kwargs.get("num_tokens", query.shape[2])  # other collators know of no tail
    q, k, v = (x[0, :, :num_tokens].transpose(0, 1) for x in (query, key, value))
    if (kv_index := kwargs.get("kv_index")) is not None:  # shared prompts are keys twice
        k, v = k[kv_index], v[kv_index]
    if (groups := q.shape[1] // k.shape[1]) > 1:  # torch 2.11 has no grouped queries
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if q.dtype == torch.float32:  # the kernel computes in half precision only
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out = varlen_attn(
        q,
        k,
        v,
        kwargs["cu_seq_lens_q"],
        kwargs["cu_seq_lens_k"],
        kwargs["max_length_q"],
        kwargs["max_length_k"],
        scale=scaling,
        window_size=(-1, 0),
    )
    assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
    return _with_tail(out.to(query.dtype), query), None


def flash_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch tokens heads head_dim"], None]:
    """transformers' function around flash-attn, which takes no sealed arguments and no tail.

    Calls without such arguments are handed on as they are.
    """
    if "sealed" not in kwargs:
        return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs = _unsealed(kwargs)
    num_tokens = kwargs.pop("num_tokens")
    q, k, v = (x[:, :, :num_tokens] for x in (query, key, value))
    out, _ = flash_attention_forward(module, q, k, v, attention_mask, **kwargs)
    return _with_tail(out[0], query), None


def _unsealed(kwargs: dict[str, Any]) -> dict[str, Any]:
    sealed: Sealed | None = kwargs.get("sealed")
    if sealed is None:
        return kwargs
    return {**{n: v for n, v in kwargs.items() if n != "sealed"}, **sealed.arguments}


def _refuse_window(window: int | None, longest: int) -> None:
    """Phi-3 configs carry a sliding window; these kernels attend to the whole sequence."""
    if window is not None and longest > window:
        raise UserError(
            f"a sequence of {longest} tokens exceeds the model's sliding window of {window}: "
            f"set stage.max_length to at most {window}"
        )


# Other boundaries would compile the kernels anew, which are no slower uncompiled.
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], torch.compiler.disable(sdpa_attention))
AttentionInterface.register(IMPLEMENTATIONS["varlen"], torch.compiler.disable(varlen_attention))
# In the place of transformers' own: by this name it loads the package, and makes no dense mask.
AttentionInterface.register(IMPLEMENTATIONS["flash"], torch.compiler.disable(flash_attention))

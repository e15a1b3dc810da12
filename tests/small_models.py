"""Small Phi-3 models, packed batches and varlen attention, for the tests of training."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from mediphi.batches import IGNORE, TokenBatch

ASSETS = Path(__file__).parents[1] / "assets" / "models"
VOCAB = 97


def phi3_config(**changes: Any) -> Phi3Config:
    """Two layers, grouped queries, LongRoPE with factors that differ, no padding token."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
        "initializer_range": 0.2,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return Phi3Config(**{**sizes, **changes})


def small_model(implementation: str = "mediphi_sdpa", **changes: Any) -> Phi3ForCausalLM:
    """Random float32 weights, the same for the same config; in train mode."""
    import mediphi.attention  # noqa: F401  registers the implementations

    torch.manual_seed(3)
    config = phi3_config(**changes)
    return Phi3ForCausalLM._from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    ).train()


def write_small_folder(folder: Path, **changes: Any) -> Path:
    """The bundled tiny architecture, shrunk, with its tokenizer; no weights."""
    shutil.copytree(ASSETS / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }
    config |= small | {"rope_scaling": scaling} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_documents(lengths: Sequence[int], *, vocab: int = VOCAB, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def packed(documents: Sequence[torch.Tensor], *, num_global_targets: int | None = None):
    """One row of whole documents, as `data.loader.collate` lays them out."""
    lengths = [len(d) for d in documents]
    ends = np.cumsum([0, *lengths])
    ids = torch.cat(list(documents))
    targets = torch.cat([ids[1:], torch.tensor([IGNORE])])
    targets[torch.from_numpy(ends[1:] - 1)] = IGNORE
    zeros = torch.zeros(1, len(ids), dtype=torch.uint8)
    return TokenBatch(
        input_ids=ids[None],
        target_ids=targets[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        kind_ids=zeros,
        source_ids=zeros,
        task_ids=zeros,
        target_index=(targets != IGNORE).nonzero().squeeze(1),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        lengths=tuple(lengths),
        max_seqlen=max(lengths),
        num_global_targets=num_global_targets or sum(lengths) - len(lengths),
        document_index=torch.arange(len(lengths)),
    )


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, sequence by sequence."""
    assert query.dtype in (torch.bfloat16, torch.float16)  # the kernel has no float32
    assert window_size == (-1, 0)  # everything before, nothing after: causal
    assert query.shape[1] == key.shape[1] == value.shape[1]  # all that every torch has
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and len(key) == len(value)
    parts = []
    for (a, b), (c, d) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        q, k, v = (x.transpose(0, 1).double() for x in (query[a:b], key[c:d], value[c:d]))
        # causal, as flash attention has it: the last query sees the last key
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts).to(query.dtype)

"""What a model gives to chosen tokens of a packed row, without logits of the others."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from mediphi.modules.losses import token_logps

CHUNK_TOKENS = 2048


@torch.inference_mode()
def row_logps(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    index: Int64[Tensor, " targets"],
    label_ids: Int64[Tensor, " targets"],
    autocast: bool,
) -> Float[Tensor, " targets"]:
    """Log-probability of each label.

    Args:
        inputs: of the decoder: `input_ids` and `position_ids` `[1, tokens]`, and the keyword
            arguments that keep the row's texts apart.
        index: positions that predict the labels.
        autocast: compute in bfloat16 where training with bf16-mixed does.
    """
    with torch.autocast(label_ids.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.get_decoder()(use_cache=False, **inputs).last_hidden_state[0]
        return token_logps(
            hidden.index_select(0, index),
            model.get_output_embeddings().weight,  # type: ignore[union-attr]
            label_ids,
            chunk_tokens=CHUNK_TOKENS,
        )

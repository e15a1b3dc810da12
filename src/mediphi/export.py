"""From a trained model to a Hugging Face folder, and back to see that it is the same."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mediphi.backbone import STOP_TOKENS, eos_id
from mediphi.errors import ArtifactError
from mediphi.lora import merged_state, save_adapter


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    with_adapter: bool = False,
) -> None:
    """Write a Hugging Face folder: safetensors, config, tokenizer, template, every stop id.

    Adapters are merged into the weights, so that every stage can go on from the folder.

    Args:
        with_adapter: write them to `adapter/` too, as peft reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in STOP_TOKENS]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ids, pad_token_id=eos_id(tokenizer)
    )
    model.save_pretrained(folder, state_dict=merged_state(model, dtype=dtype))
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # save_pretrained writes the dtype of the model in memory
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if with_adapter:
        save_adapter(model, folder / "adapter")


@torch.no_grad()
def reload_and_compare(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype) -> float:
    """Load the exported folder as a stranger would; return the largest difference of logits.

    Every tensor must be bitwise the trained one with its adapters merged, rounded to `dtype`. Then
    both sides compute logits in float32 with transformers' own attention, near and far, so that a
    config that does not fit the weights, or a wrong merge, shows too. Moves the model to the CPU.

    Raises:
        ArtifactError: the folder does not give the trained model back.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.to("cpu")  # type: ignore[arg-type]
    theirs = loaded.state_dict()
    for name, tensor in merged_state(model, dtype=dtype).items():
        if not torch.equal(theirs[name], tensor):
            raise ArtifactError(f"{folder}: {name} is not the trained model's")
    expected, got = _logits(model), _logits(loaded.float())
    difference = float((expected - got).abs().max())
    largest = float(expected.abs().max())
    # A merged weight is rounded once, an adapted layer's output is the sum of two products.
    allowed = 1e-4 * max(1.0, largest) if dtype == torch.float32 else 0.05 * largest + 0.05
    if not difference <= allowed:
        raise ArtifactError(
            f"{folder}: reloaded logits differ by {difference:.3g} (allowed {allowed:.3g}); "
            "the export is not the trained model"
        )
    return difference


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Of 64 fixed tokens at the first and at the last positions; leaves the model as it was."""
    implementation, training = model.config._attn_implementation, model.training
    positions = torch.arange(min(64, model.config.max_position_embeddings))[None]
    ids = positions * 7919 % model.config.vocab_size
    model.eval().set_attn_implementation("sdpa")
    try:
        last = model.config.max_position_embeddings - positions.shape[1]
        starts = (0, last)  # LongRoPE: short factors, long factors
        with torch.compiler.set_stance("force_eager"):
            rows = [model(ids, position_ids=positions + s, use_cache=False).logits for s in starts]
        return torch.cat(rows).float()
    finally:
        model.set_attn_implementation(implementation)  # type: ignore[arg-type]
        model.train(training)

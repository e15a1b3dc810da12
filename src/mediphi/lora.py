"""Low-rank adapters (Hu et al. 2021): trained beside frozen weights, merged into them on export.

A linear layer `W` counts as `W + alpha / rank * B A`. `A` is drawn, `B` starts at zero, so a new
adapter changes nothing. peft puts the adapters into the model in place: its class, and how it is
called, stay transformers' own.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mediphi.config.stages import Lora
from mediphi.errors import UserError

ADAPTER = "default"
"""peft's name of the only adapter."""


def add_adapters(model: PreTrainedModel, lora: Lora, *, seed: int) -> None:
    """Freeze `model` and give its linear layers float32 adapters, drawn after `seed`, in place.

    The head never gets one: the loss multiplies with its weight itself.

    Raises:
        UserError: peft is not installed, or `target_modules` names a layer that is not there.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("stage.lora needs peft: pip install 'mediphi[lora]'") from None
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = names if lora.target_modules == "all-linear" else list(lora.target_modules)
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(
            f"stage.lora.target_modules: {', '.join(unknown)}: no such linear layers; "
            f"the model has {', '.join(names)} (or all-linear)"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  any number
        lora_dropout=lora.dropout,
        target_modules=wanted,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merged_state(
    model: PreTrainedModel, *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """State dict of the plain architecture, adapters merged in float32, then rounded to `dtype`.

    Merged tensors lie on the CPU: the same numbers wherever the model is.
    """
    state = model.state_dict()
    merged = {}
    for name, tensor in state.items():
        layer, is_adapted, leaf = name.rpartition(".base_layer.")
        if is_adapted:
            if leaf == "weight":
                a, b = (state[f"{layer}.lora_{x}.{ADAPTER}.weight"].cpu() for x in "AB")
                scaling = model.get_submodule(layer).scaling[ADAPTER]  # type: ignore[index]
                tensor = tensor.cpu().float() + b.float() @ a.float() * scaling
            merged[f"{layer}.{leaf}"] = tensor.to(dtype)
        elif ".lora_" not in name:
            merged[name] = tensor.to(dtype)
    return merged


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapters alone, as `peft.PeftModel.from_pretrained(base, folder)` loads them."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"base_model.model.{n}": t.contiguous().cpu() for n, t in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = copy.copy(model.peft_config[ADAPTER])  # type: ignore[index]
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has no order
    config.save_pretrained(str(folder))

"""Random checkpoints for the benchmark of merging, and the numbers that it merges them with."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "assets" / "models" / "phi35_mini"
PACKAGES = ("mediphi", "torch", "transformers", "mergekit", "safetensors")
HIDDEN, FFN, VOCABULARY, LAYERS = 1024, 4096, 32064, 28
PARAMETERS = {
    "linear": {"weight": 0.2, "normalize": True},
    "slerp": {"t": 0.25},
    "task_arithmetic": {"weight": 0.2},
    "ties": {"weight": 0.2, "density": 0.3},
    "breadcrumbs": {"weight": 0.2, "density": 0.5, "gamma": 0.01},
    "breadcrumbs_ties": {"weight": 0.2, "density": 0.5, "gamma": 0.01},
}


def write_checkpoints(folder: Path, names: list[str], *, layers: int) -> int:
    """Random checkpoints; returns the number of parameters of one."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {
            f"{stem}self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
            f"{stem}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{stem}mlp.gate_up_proj.weight": (2 * FFN, HIDDEN),
            f"{stem}mlp.down_proj.weight": (HIDDEN, FFN),
            f"{stem}input_layernorm.weight": (HIDDEN,),
            f"{stem}post_attention_layernorm.weight": (HIDDEN,),
        }
    config = json.loads((TOKENIZER / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "dtype": "bfloat16"}
    config.pop("torch_dtype", None)
    factors = HIDDEN // 16 // 2
    for scaling in (config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        for key in ("short_factor", "long_factor"):
            if key in scaling:
                scaling[key] = scaling[key][:factors]
    for number, name in enumerate(names):
        target = folder / name
        if (target / "model.safetensors").is_file():
            continue
        shutil.copytree(TOKENIZER, target, dirs_exist_ok=True)
        (target / "config.json").write_text(json.dumps(config, indent=1))
        drawn = torch.Generator().manual_seed(0)
        noise = torch.Generator().manual_seed(number)
        tensors = {}
        for key, shape in shapes.items():
            base = (torch.randn(shape, generator=drawn) * 0.02).bfloat16()
            change = torch.randn(shape, generator=noise) * 1e-3 if number else 0.0
            tensors[key] = (base.float() + change).bfloat16()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return sum(torch.Size(shape).numel() for shape in shapes.values())

"""Small Phi-3 folders to merge, and damage done to copies of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_models import write_small_folder
from transformers import AutoConfig, AutoModelForCausalLM

from mediphi.merge.engine import Job, merge
from mediphi.merge.operators import Values

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def write_model(folder: Path, *, seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Path:
    """One layer, random weights, the bundled tokenizer; 9 tensors."""
    write_small_folder(folder, **{"num_hidden_layers": 1, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors = {name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def merged_to(job: Job, values: Callable[[str], Values], place: Path) -> Path:
    """The merge of a job, as a folder."""
    merge(
        job,
        values=values,
        scratch=place / "scratch",
        target=place / "model",
        progress=lambda done, total: None,
    )
    return place / "model"


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Replace keys; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def into_shards(folder: Path) -> Path:
    """Two shards and an index; the embeddings lie in the first."""
    tensors = tensors_of(folder)
    names = sorted(tensors, key=lambda name: "embed" not in name)
    halves = {"model-a.safetensors": names[:3], "model-b.safetensors": names[3:]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, own in halves.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder

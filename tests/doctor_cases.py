"""A case for the doctor's checks, on the shrunk tiny model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch.nn.functional as F
from composing import composed
from small_models import write_small_folder
from transformers import AttentionInterface

from mediphi.config import Config, load
from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding


def doctor_config(folder: Path, *overrides: str) -> Config:
    """`stage=doctor`, everything in `folder`."""
    model = folder / "model"
    if not model.exists():
        write_small_folder(model, initializer_range=0.2)
    places = [f"paths.runs={folder}/runs", f"paths.cache={folder}/cache"]
    ours = ["stage=doctor", "logger=csv", "hardware=cpu", *places]
    if not any(o.startswith("model") for o in overrides):
        ours.append(f"model.architecture={model}")
    return load(composed(*ours, *overrides))


def found(check: Callable[[Case], Iterator[Finding]], case: Case) -> list[Finding]:
    return list(check(case))


def only(check: Callable[[Case], Iterator[Finding]], case: Case, status: str) -> Finding:
    """The one finding of a status; whatever is not fine says what to do."""
    findings = found(check, case)
    assert all(f.remedy for f in findings if f.status != "ok"), findings
    (finding,) = [f for f in findings if f.status == status]
    return finding


def ignore_boundaries() -> None:
    """Attention over the whole row, as if it were one sequence."""

    def leaky(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
        groups = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=groups
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("mediphi_sdpa", leaky)

"""Answers of a CUDA device are those of a CPU; `pytest -m gpu tests/gpu`."""

from pathlib import Path

import pytest
import torch
from small_models import random_documents, write_small_folder

from mediphi import generation
from mediphi.backbone import BackboneSpec, build_model, load_tokenizer
from mediphi.engine import Device
from mediphi.generation import answer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [d.tolist() for d in random_documents((5, 30, 17, 60, 70), vocab=4000, seed=5)]
DEVICES = {
    kind: Device(type=kind, name="test", precision="32-true", kernel="sdpa")
    for kind in ("cpu", "cuda")
}


@pytest.mark.parametrize("preallocates", [True, False])
def test_a_gpu_answers_as_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preallocates: bool
):
    monkeypatch.setitem(generation.PREALLOCATES, "cuda", preallocates)
    folder = write_small_folder(tmp_path / "model", initializer_range=0.3)
    spec = BackboneSpec(str(folder), init="random", revision="main", kernel="sdpa", seed=1)
    tokenizer, answers = load_tokenizer(str(folder)), {}
    for kind, device in DEVICES.items():
        model = build_model(spec).to(kind)  # type: ignore[arg-type]
        answers[kind] = answer(model, tokenizer, PROMPTS, max_new_tokens=12, device=device)
    assert answers["cuda"] == answers["cpu"] and len(set(answers["cpu"])) > 3

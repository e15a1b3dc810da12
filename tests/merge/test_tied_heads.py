"""A head that config.json ties to the embedding is that embedding, also merged and searched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import (
    Tensors,
    change_json,
    change_tensors,
    copied,
    merged_to,
    tensors_of,
    write_model,
)
from transformers import AutoModelForCausalLM

from mediphi.backbone import BackboneSpec, build_model
from mediphi.candidate_bench import targets_of
from mediphi.errors import ArtifactError
from mediphi.merge.candidates import Candidates
from mediphi.merge.checkpoints import open_checkpoint
from mediphi.merge.engine import Job, Parents, open_parents
from mediphi.merge.operators import Values

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tie(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def move(tensors: Tensors) -> None:
    tensors |= {n: t + 0.05 * torch.randn_like(t) for n, t in tensors.items() if n != HEAD}
    tie(tensors)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and an expert, tied by their configs, that store both."""
    base = write_model(tmp_path / "base", seed=0)
    change_json(base / "config.json", tie_word_embeddings=True)
    expert = copied(change_tensors(base, tie), tmp_path / "expert")
    change_tensors(expert, move)
    return [base, expert]


def job_of(models: list[Path]) -> Job:
    return Job("task_arithmetic", {"expert": models[1]}, base=models[0], threads=2)


def by_name(name: str) -> Values:
    """A filter that has the head in view."""
    return {"weight": (0.9 if name == HEAD else 0.3,)}


def bench_of(job: Job) -> tuple[Any, Candidates]:
    parents, folder = open_parents(job), str(job.base)
    spec = BackboneSpec(folder=folder, init="pretrained", revision="main", kernel="sdpa")
    model = build_model(spec).eval()
    return model, Candidates(job, parents, targets_of(model, parents, job))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_embedding_is_read_once(dtype: torch.dtype, models: list[Path]) -> None:
    folder = change_tensors(models[0], lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    assert open_checkpoint(folder).tensors.keys() == tensors_of(folder).keys() - {HEAD}


@pytest.mark.parametrize("damage", ["value", "sign of zero", "dtype", "shape"])
def test_a_tied_head_that_differs_is_refused(damage: str, models: list[Path]) -> None:
    def differ(tensors: Tensors) -> None:
        if damage == "sign of zero":
            tensors[EMBEDDING][-1, -1], tensors[HEAD][-1, -1] = 0.0, -0.0
        elif damage == "value":
            tensors[HEAD][-1, -1] += 1e-6
        else:
            head = tensors[HEAD]
            tensors[HEAD] = head.bfloat16() if damage == "dtype" else head[:-1].clone()

    change_tensors(models[1], differ)
    with pytest.raises(ArtifactError) as caught:
        open_parents(job_of(models))
    assert str(caught.value) == (
        f"{models[1]}: tensor {HEAD} differs from {EMBEDDING}, to which config.json ties it; "
        "remove it, or set tie_word_embeddings to false there"
    )


def test_a_head_that_is_not_tied_is_a_tensor_of_its_own(models: list[Path]) -> None:
    for folder in models:
        change_json(folder / "config.json", tie_word_embeddings=False)
    assert HEAD in open_parents(job_of(models)).checkpoints[0].tensors


@pytest.mark.parametrize(
    ("architecture", "is_tied"), [("gemma", True), ("phi3", False), ("?", False)]
)
def test_a_config_that_does_not_tell_has_the_architectures_default(
    architecture: str, is_tied: bool, models: list[Path]
) -> None:
    change_json(models[0] / "config.json", tie_word_embeddings=None, model_type=architecture)
    assert (HEAD not in open_checkpoint(models[0]).tensors) == is_tied


def test_a_merge_reloads_as_one_tied_model_whatever_names_the_head(
    models: list[Path], tmp_path: Path
) -> None:
    folder = merged_to(job_of(models), by_name, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    start, end = (tensors_of(one)[EMBEDDING] for one in models)
    torch.testing.assert_close(model.lm_head.weight, start + 0.3 * (end - start))


def test_one_that_stores_both_is_merged_with_one_that_does_not(
    models: list[Path], tmp_path: Path
) -> None:
    both = tensors_of(merged_to(job_of(models), by_name, tmp_path / "both"))
    change_tensors(models[1], lambda tensors: tensors.pop(HEAD))
    one = tensors_of(merged_to(job_of(models), by_name, tmp_path / "one"))
    assert both.keys() == one.keys() and all(torch.equal(both[n], one[n]) for n in one)


def test_every_build_of_a_candidate_is_the_merge(models: list[Path], tmp_path: Path) -> None:
    """Two threads wrote head and embedding, one memory, with other values each."""
    job = job_of(models)
    folder = merged_to(job, by_name, tmp_path / "merged")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model, candidates = bench_of(job)
    for _ in range(10):
        candidates.build(by_name)
        found = model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    candidates.close()


def test_two_tensors_that_are_one_weight_of_the_model_are_refused(models: list[Path]) -> None:
    """Of an architecture whose names tell nothing."""
    job = job_of(models)
    spec = BackboneSpec(folder=str(job.base), init="pretrained", revision="main", kernel="sdpa")
    model = build_model(spec)
    change_json(models[0] / "config.json", tie_word_embeddings=False)
    parents = Parents((open_checkpoint(models[0]),), ())
    with pytest.raises(
        ArtifactError, match=r"^\S+base: transformers ties \S+ to \S+, and both are"
    ):
        targets_of(model, parents, job)

"""Weights read a slice at a time are those that a whole model loads, and as strictly refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import write_small_folder
from small_training import spec_of
from torch import Tensor, nn

from mediphi.backbone import BackboneSpec, build_model, prepare_training, shapes_of
from mediphi.config.stages import Lora
from mediphi.errors import ArtifactError, UserError
from mediphi.strategies.fsdp2 import rows_of
from mediphi.strategies.sharding import StoredWeights, make_rotary_buffers, plain_name, stand_ins

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def pretrained(folder: Path, **changes: Any) -> BackboneSpec:
    return replace(spec_of(folder), init="pretrained", **changes)


def stored(folder: Path) -> StoredWeights:
    spec = pretrained(folder)
    return StoredWeights(spec, shapes_of(spec))


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every parameter of the folder's model, in two parts."""
    spec = pretrained(folder)
    model = shapes_of(spec)
    weights = StoredWeights(spec, model)
    found = {}
    for name, parameter in model.named_parameters():
        half = len(parameter) // 2
        parts = (weights.rows(name, 0, half), weights.rows(name, half, len(parameter)))
        found[name] = torch.cat(parts)
    weights.refuse_faults()
    return found


def write_weights(folder: Path, **options: Any) -> Path:
    build_model(spec_of(folder)).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in one file."""
    return write_weights(write_small_folder(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Any:
    """A copy of the folder with tensors changed."""

    def write(change: Any) -> Path:
        target = Path(shutil.copytree(folder, tmp_path / "changed"))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return write


# --- what is read


def test_slices_of_one_file_or_of_several_are_the_whole_models_weights(
    folder: Path, tmp_path: Path
):
    several = write_small_folder(tmp_path / "several")
    write_weights(several, max_shard_size="200KB")
    assert len(set(json.loads((several / "model.safetensors.index.json").read_text()))) > 1
    expected = dict(build_model(pretrained(folder)).named_parameters())
    for found in (read_all(folder), read_all(several)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_slice_is_a_copy_of_its_own_size_in_float32(folder: Path, changed: Any):
    def to_bf16(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    for weights in (stored(folder), stored(changed(to_bf16))):
        rows = weights.rows(HEAD, 3, 5)
        assert rows.dtype == torch.float32
        assert rows.untyped_storage().nbytes() == rows.nbytes == 4 * 2 * rows.shape[1]


def test_a_tied_head_is_found_under_either_name(tmp_path: Path):
    """transformers takes what is there."""
    tied = write_weights(write_small_folder(tmp_path / "tied", tie_word_embeddings=True))
    path = tied / "model.safetensors"
    expected = load_file(path)
    assert HEAD not in expected and torch.equal(read_all(tied)[EMBEDDING], expected[EMBEDDING])
    renamed = {HEAD if n == EMBEDDING else n: tensor for n, tensor in expected.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    assert torch.equal(read_all(tied)[EMBEDDING], expected[EMBEDDING])
    save_file({**expected, HEAD: expected[EMBEDDING].clone()}, path, metadata={"format": "pt"})
    assert torch.equal(read_all(tied)[EMBEDDING], expected[EMBEDDING])
    save_file({**expected, HEAD: expected[EMBEDDING] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="1 tensors are tied, but differ"):
        read_all(tied)


# --- what is refused


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.more.weight"] = torch.zeros(2)


def cut(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[HEAD][:-1].clone()


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD][-1, -1] = float("inf")


@pytest.mark.parametrize("change", [rename, add, cut, spoil])
def test_weights_that_do_not_fit_are_refused_in_the_words_of_one_device(change: Any, changed: Any):
    folder = changed(change)
    messages = set()
    for load in (lambda: build_model(pretrained(folder)), lambda: read_all(folder)):
        with pytest.raises(ArtifactError) as caught:
            load()
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_buffers_that_older_files_carry_are_ignored_as_transformers_does(changed: Any):
    def carry(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    folder = changed(carry)
    whole, parts = build_model(pretrained(folder)), read_all(folder)
    assert all(torch.equal(parts[name], p) for name, p in whole.named_parameters())
    (angles,) = (b for name, b in whole.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    assert angles.all(), "the file's zeros were taken"


def test_a_torn_file_pickles_or_no_folder_are_refused_in_the_words_of_one_device(
    folder: Path, tmp_path: Path
):
    torn = Path(shutil.copytree(folder, tmp_path / "torn"))
    path = torn / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded" in refusal(torn)
    path.unlink()
    (torn / "pytorch_model.bin").touch()
    assert "only pickles" in refusal(torn)
    assert "no config.json there" in refusal(tmp_path / "nothing")


def refusal(folder: Path) -> str:
    """What both ways to load say."""
    messages = set()
    for load in (lambda: build_model(pretrained(folder)), lambda: stored(folder)):
        with pytest.raises(UserError) as caught:
            load()
        messages.add(str(caught.value))
    (message,) = messages
    return message


# --- what is made


def test_rotary_buffers_made_anew_are_bitwise_those_of_the_whole_model(folder: Path):
    spec = pretrained(folder)
    model = shapes_of(spec)
    assert all(buffer.is_meta for buffer in model.buffers())
    make_rotary_buffers(model)
    expected = dict(build_model(spec).named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys() and len(found) > 1
    for name, buffer in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], buffer)
    assert model.state_dict().keys() == build_model(spec).state_dict().keys()


def test_buffers_that_are_not_rotary_are_refused(folder: Path):
    model = shapes_of(pretrained(folder))
    model.norms = nn.BatchNorm1d(2, device="meta")
    make_rotary = r"buffer norms.running_mean cannot be made anew"
    with pytest.raises(UserError, match=make_rotary):
        make_rotary_buffers(model)


def test_adapters_are_drawn_as_on_one_device_while_the_weights_are_shapes(folder: Path):
    spec = pretrained(folder, lora=Lora(rank=4), seed=3)
    model = shapes_of(spec)
    with stand_ins(model):
        prepare_training(model, spec)
    expected = dict(build_model(spec).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    adapters = {name for name in expected if ".lora_" in name}
    assert adapters and all(torch.equal(found[n], expected[n]) for n in adapters)
    plain = dict(shapes_of(spec).named_parameters())
    for name in expected.keys() - adapters:
        assert found[name].is_meta and found[name].shape == plain[plain_name(name)].shape
        assert not found[name].requires_grad


# --- who keeps what


@given(size=st.integers(1, 70), ranks=st.integers(1, 9))
def test_shares_of_rows_are_those_of_torch_chunk(size: int, ranks: int):
    chunks = [part.tolist() for part in torch.arange(size).chunk(ranks)]
    found = [list(range(*rows_of(rank, ranks=ranks, size=size))) for rank in range(ranks)]
    assert [part for part in found if part] == chunks

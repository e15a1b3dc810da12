"""Folders that can be read, and one line for each that cannot be trusted."""

import gc
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_checkpoints import (
    INDEX,
    change_json,
    copied,
    into_shards,
    tensors_of,
    write_model,
)

from mediphi.errors import ArtifactError
from mediphi.merge.checkpoints import open_checkpoint
from mediphi.merge.storage import bytes_of

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return copied(model, tmp_path / "m")


@pytest.fixture
def sharded(folder: Path) -> Path:
    return into_shards(folder)


def refusal(folder: Path) -> str:
    """The one line; the path is shortened to its last part."""
    with pytest.raises(ArtifactError) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), folder.name)


@pytest.mark.parametrize("shards", [False, True])
def test_every_tensor_is_read_bitwise(shards: bool, folder: Path) -> None:
    expected = tensors_of(folder)
    checkpoint = open_checkpoint(into_shards(folder) if shards else folder)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)


@pytest.mark.parametrize("shards", [False, True])
def test_every_tensor_is_read_by_pieces(shards: bool, folder: Path) -> None:
    there = tensors_of(folder)
    opened = open_checkpoint(into_shards(folder) if shards else folder)
    for name, expected in there.items():
        stored = opened.stored(name)
        assert stored.shape == expected.shape and stored.dtype == expected.dtype
        halves = [slice(0, 3), slice(3, expected.numel())]
        rooms = [torch.empty(own.stop - own.start, dtype=stored.dtype) for own in halves]
        for room, own in zip(rooms, halves, strict=True):
            stored.read_into(bytes_of(room), own.start)
        assert torch.equal(torch.cat(rooms), expected.view(-1)), name


def test_a_file_cut_while_it_is_open(folder: Path) -> None:
    opened = open_checkpoint(folder)
    last = list(opened.tensors)[-1]
    path = folder / opened.tensors[last].file
    os.truncate(path, path.stat().st_size - 1)
    room = torch.empty(opened.stored(last).numel(), dtype=opened.tensors[last].dtype)
    with pytest.raises(ArtifactError) as caught:
        opened.stored(last).read_into(bytes_of(room), 0)
    assert str(caught.value) == f"{path}: it has become shorter while it was read"


def test_files_are_closed_with_the_checkpoint(folder: Path) -> None:
    def count() -> int:
        links = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
        return sum(link.startswith(str(folder.resolve())) for link in links)

    before, opened = count(), open_checkpoint(folder)
    tensor = opened.stored(next(iter(opened.tensors)))
    assert count() > before
    del opened
    gc.collect()
    room = torch.full([1], torch.nan, dtype=tensor.dtype)
    tensor.read_into(bytes_of(room), 0)
    assert room.isfinite().all()
    del tensor
    gc.collect()
    assert count() == before


def test_a_run_directory_stands_for_its_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "model")
    assert open_checkpoint(tmp_path / "run").folder == tmp_path / "run" / "model"


def test_a_snapshot_of_the_hub_cache_is_a_model(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    folder.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_checkpoint(snapshot).tensors


def test_tensors_are_views_of_the_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    one, two = checkpoint.read(EMBEDDINGS), checkpoint.read(EMBEDDINGS)
    assert one.data_ptr() == two.data_ptr()


def test_no_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == "gone: no such folder; give a local Hugging Face folder"


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder) == "m: no config.json there; give a Hugging Face folder"


def test_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    line = "run: this run is not finished: run the same command again"
    assert refusal(tmp_path / "run") == line


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}', "\xff"])
def test_a_damaged_config(content: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert re.match(r"m/config.json: not (readable as JSON \(.+\)|a JSON object)$", refusal(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        "m: no model.safetensors; save the model as safetensors, or name another folder"
    )


def test_pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == (
        "m: no model.safetensors: only pickles (pytorch_model.bin), which are refused; "
        "save the model as safetensors, or name another folder"
    )


def header(path: Path, change: Callable[[bytes], bytes]) -> None:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    changed = change(raw[8 : 8 + size])
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + size :])


def doubled(raw: bytes) -> bytes:
    """The embeddings twice, both at the same place: safetensors itself takes that."""
    entry = json.dumps(json.loads(raw)[EMBEDDINGS]).encode()
    return b'{"' + EMBEDDINGS.encode() + b'":' + entry + b"," + raw.lstrip()[1:]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(b"garbage, not safetensors" * 99),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "header beyond the file": lambda p: p.write_bytes(
        struct.pack("<Q", 10**7) + p.read_bytes()[8:]
    ),
    "header without end": lambda p: p.write_bytes(struct.pack("<Q", 2**62) + p.read_bytes()[8:]),
    "overlap": lambda p: header(
        p, lambda raw: re.sub(rb'"data_offsets":\[\d+,', b'"data_offsets":[0,', raw)
    ),
    "doubled": lambda p: header(p, doubled),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("shards", [False, True])
def test_a_damaged_file(damage: str, shards: bool, folder: Path) -> None:
    if shards:
        into_shards(folder)
    file = "model-a.safetensors" if shards else "model.safetensors"
    DAMAGE[damage](folder / file)
    shape = rf"m/{file}: damaged \(.+\); fetch the model again, or name another folder"
    assert re.fullmatch(shape, refusal(folder))


def change_index(folder: Path, name: str, file: str | None) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"].pop(name, None)
    if file is not None:
        content["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(content))


END = "; fetch the model again, or name another folder"


def test_an_index_naming_a_missing_file(sharded: Path) -> None:
    (sharded / "model-b.safetensors").unlink()
    line = "m: 'model-b.safetensors' is named by its index but missing"
    assert refusal(sharded) == line + END


@pytest.mark.parametrize("where", ["../{}", "{}/../x/../{}", "absolute", "sub/{}", ".."])
def test_an_index_naming_a_file_outside(where: str, sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (sharded / "model-b.safetensors").rename(outside)
    file = str(outside) if where == "absolute" else where.replace("{}", outside.name)
    content = (sharded / INDEX).read_text().replace("model-b.safetensors", file)
    (sharded / INDEX).write_text(content)
    assert refusal(sharded) == f"m/{INDEX}: names {file!r}, outside of the folder" + END


@pytest.mark.parametrize("shards", [False, True])
def test_a_link_that_leaves_the_folder(shards: bool, folder: Path, tmp_path: Path) -> None:
    if shards:
        into_shards(folder)
    file = "model-b.safetensors" if shards else "model.safetensors"
    (folder / file).rename(tmp_path / "elsewhere.safetensors")
    (folder / file).symlink_to("../elsewhere.safetensors")
    line = f"m/{file}: a link to outside of the folder; put the file itself there"
    assert refusal(folder) == line


def test_an_index_with_a_tensor_that_its_file_lacks(sharded: Path) -> None:
    change_index(sharded, "model.extra.weight", "model-b.safetensors")
    assert refusal(sharded) == (
        "m: tensor model.extra.weight is not in model-b.safetensors, where the index has it" + END
    )


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    change_index(sharded, EMBEDDINGS, None)
    line = f"m: tensor {EMBEDDINGS} is in model-a.safetensors, not in the index"
    assert refusal(sharded) == line + END


def test_a_tensor_stored_twice(sharded: Path) -> None:
    from safetensors.torch import load_file, save_file

    extra = {EMBEDDINGS: load_file(sharded / "model-a.safetensors")[EMBEDDINGS]}
    save_file(load_file(sharded / "model-b.safetensors") | extra, sharded / "model-b.safetensors")
    assert refusal(sharded) == (
        f"m: tensor {EMBEDDINGS} is stored twice, in model-a.safetensors and model-b.safetensors"
        + END
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded) == f"m/{INDEX}: has no weight_map from tensors to files" + END


def test_an_empty_index(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {}}')
    assert refusal(sharded) == f"m/{INDEX}: its weight_map names no tensor" + END


def test_a_tensor_listed_twice(sharded: Path) -> None:
    content = (sharded / INDEX).read_text()
    twice = content.replace('"weight_map": {', f'"weight_map": {{"{EMBEDDINGS}": "x", ')
    (sharded / INDEX).write_text(twice)
    line = f"m/{INDEX}: not readable as JSON ({EMBEDDINGS} stands there twice)"
    assert refusal(sharded) == line


def test_one_file_and_an_index(model: Path, sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    line = f"m: has both model.safetensors and {INDEX}; remove one of them"
    assert refusal(sharded) == line


def test_no_tensor(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"{}      ")
    assert refusal(folder) == "m: model.safetensors holds no tensor" + END


def test_numbers_that_cannot_be_merged(folder: Path) -> None:
    def eight_bits(raw: bytes) -> bytes:
        content = json.loads(raw)
        entry = content[EMBEDDINGS]
        entry |= {"dtype": "F8_E4M3", "shape": [4 * entry["shape"][0], entry["shape"][1]]}
        return json.dumps(content).encode()

    header(folder / "model.safetensors", eight_bits)
    assert refusal(folder) == (
        f"m: tensor {EMBEDDINGS} is F8_E4M3; weights of float32, bfloat16, float16 can be merged"
    )


def test_a_config_may_say_what_it_likes_beside(folder: Path) -> None:
    change_json(folder / "config.json", anything=[1, {"b": None}])
    assert open_checkpoint(folder).config["anything"]

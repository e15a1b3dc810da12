"""What a run was made from: other data or another parent are noticed, and absent ones forgiven."""

from pathlib import Path

import pytest
from test_artifacts import NOTHING, finished, opened

from mediphi.artifacts import (
    Parent,
    check_data,
    lineage,
    manifest_hash,
    named_parents,
    plain_folder,
    publish,
    verified_parent,
    verify,
)
from mediphi.errors import ArtifactError

OLD, NEW = (Parent("/runs/sft/model", digit * 64) for digit in "12")


def test_a_run_goes_on_with_the_data_it_began_with_only(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path):
        check_data(path, "f1")
        check_data(path, "f1")
        with pytest.raises(ArtifactError, match=r"data changed since this run began .* restore"):
            check_data(path, "f2")
        publish(path, config_hash="h1", **NOTHING)
    assert "data.json" in verify(path)["files"]
    check_data(path, "f1")
    with pytest.raises(ArtifactError, match="on_existing=overwrite"):
        check_data(path, "f2")
    (path / "data.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"data.json: damaged"):
        check_data(path, "f1")


def test_a_run_goes_on_from_the_model_it_began_with_only(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path):
        check_data(path, "f1", parents={"model": OLD})
        publish(path, config_hash="h1", **NOTHING)
    check_data(path, "f1", parents={"model": OLD})
    check_data(path, "f1", parents={"model": OLD._replace(path="/moved")})
    remedy = "restore it, choose another name= or on_existing=overwrite"
    for fingerprint in ("f1", None):  # also where the data are gone
        with pytest.raises(ArtifactError) as told:
            check_data(path, fingerprint, parents={"model": NEW})
        assert str(told.value) == (
            f"{path}: the model at /runs/sft/model changed since this run began "
            f"(11111111, now 22222222); {remedy}"
        )
    with pytest.raises(ArtifactError, match=r"the model changed .* \(11111111, now no manifest\)"):
        check_data(path, "f1", parents={})
    check_data(path, "f1")  # nobody knows what it is now
    verify(path)


def test_a_run_that_began_from_no_artifact_does_not_go_on_from_one(tmp_path: Path) -> None:
    check_data(tmp_path, "f1", parents={})
    check_data(tmp_path, "f1", parents={})
    with pytest.raises(ArtifactError, match=r"\(no manifest, now 22222222\)"):
        check_data(tmp_path, "f1", parents={"model": NEW})


def test_a_record_without_parents_stays_valid(tmp_path: Path) -> None:
    check_data(tmp_path, "f1")
    raw = (tmp_path / "data.json").read_bytes()
    assert raw == b'{"fingerprint": "f1"}\n'
    check_data(tmp_path, "f1", parents={"model": NEW})
    assert (tmp_path / "data.json").read_bytes() == raw


@pytest.mark.parametrize("parents", ["3", '"model"', "[1]"])
def test_a_damaged_record_of_parents_is_told(tmp_path: Path, parents: str) -> None:
    (tmp_path / "data.json").write_text(f'{{"fingerprint": "f1", "parents": {parents}}}')
    with pytest.raises(ArtifactError, match=r"data.json: damaged"):
        check_data(tmp_path, "f1", parents={})


def test_a_named_parent_is_what_was_verified_though_no_file_of_it_is_read(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    model = run / "model"
    (model / "config.json").write_text("{}")
    publish(run, config_hash="h1", **NOTHING)
    by_run = verified_parent(model)
    assert named_parents(str(run)) == named_parents(str(model)) == {"model": by_run}
    publish(model, config_hash="h1", **NOTHING)
    own = verified_parent(model)
    assert named_parents(str(run)) == named_parents(str(model)) == {"model": own} != by_run
    (model / "weights.bin").write_bytes(b"another")
    assert named_parents(str(run)) == {"model": own}  # the manifest alone


def test_a_parent_that_is_gone_damaged_or_foreign_is_no_named_one(tmp_path: Path) -> None:
    assert named_parents(str(tmp_path / "gone")) is None
    assert named_parents("somebody/model") is None
    (tmp_path / "config.json").write_text("{}")
    assert named_parents(str(tmp_path)) is None
    publish(tmp_path, config_hash="h1", **NOTHING)
    assert named_parents(str(tmp_path)) is not None
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert named_parents(str(tmp_path)) is None


# --- a model folder without a manifest of ours --------------------------------------------------


def stranger(folder: Path, *, num_bytes: int = 1000) -> Path:
    """A Hugging Face folder as others write it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("A model.")
    (folder / "model.safetensors").write_bytes(bytes(range(250)) * (num_bytes // 250))
    return folder


def test_a_plain_folder_is_what_is_read_of_it_wherever_it_lies(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "a")
    first = plain_folder(str(folder))
    assert first is not None and first.path == str(folder)
    (folder / "README.md").write_text("A better model.")
    (folder / "notes").mkdir()
    moved = folder.rename(tmp_path / "b")
    assert plain_folder(str(moved)) == Parent(str(moved), first.sha256)
    for name in ("config.json", "model.safetensors"):
        raw = (moved / name).read_bytes()
        (moved / name).write_bytes(raw[:-1] + b"!")
        assert plain_folder(str(moved)) != Parent(str(moved), first.sha256)
        (moved / name).write_bytes(raw)
    assert plain_folder(str(moved)) == Parent(str(moved), first.sha256)  # control
    (moved / "chat_template.jinja").touch()
    assert plain_folder(str(moved)) != Parent(str(moved), first.sha256)


def test_of_large_weights_blocks_from_first_to_last_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage, "BLOCK", 10)
    monkeypatch.setattr(lineage, "NUM_BLOCKS", 5)
    folder = stranger(tmp_path / "a", num_bytes=4000)
    file = folder / "model.safetensors"
    size, raw = file.stat().st_size, file.read_bytes()
    blocks = list(lineage._blocks(file))
    spread = [number * (size - 10) // 4 for number in range(5)]
    assert [len(block) for block in blocks] == [10] * 5
    assert blocks[0] == raw[:10] and blocks[-1] == raw[-10:]
    assert all(
        raw[start : start + 10] == block for start, block in zip(spread, blocks, strict=True)
    )
    known = plain_folder(str(folder))
    for place, is_seen in ((0, True), (size - 1, True), (spread[2] + 5, True), (100, False)):
        changed = bytearray(raw)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert (plain_folder(str(folder)) != known) is is_seen
    file.write_bytes(bytes(byte ^ 1 for byte in raw))  # as training does: everywhere
    assert plain_folder(str(folder)) != known
    (folder / "small.json").write_bytes(raw[:45])
    assert b"".join(lineage._blocks(folder / "small.json")) == raw[:45]


def test_artifacts_hub_names_and_what_is_gone_are_no_plain_folders(tmp_path: Path) -> None:
    assert plain_folder("somebody/model") is None
    assert plain_folder(str(tmp_path / "gone")) is None
    folder = stranger(tmp_path / "run" / "model")
    assert plain_folder(str(tmp_path / "run")) == plain_folder(str(folder)) is not None
    publish(tmp_path / "run", config_hash="h1", **NOTHING)
    assert plain_folder(str(folder)) is None
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert plain_folder(str(folder)) is None  # `verified_parent` refuses it


def test_a_run_goes_on_from_the_plain_folder_it_began_with_only(tmp_path: Path) -> None:
    for parents in ({}, None):
        check_data(tmp_path, "f1", parents={}, folder=OLD)
        check_data(tmp_path, "f1", parents=parents, folder=OLD._replace(path="/moved"))
        with pytest.raises(ArtifactError) as told:
            check_data(tmp_path, "f1", parents=parents, folder=NEW)
        assert str(told.value) == (
            f"{tmp_path}: the model at /runs/sft/model changed since this run began "
            "(11111111, now 22222222); restore it, choose another name= or on_existing=overwrite"
        )
    check_data(tmp_path, "f1", parents=None, folder=None)  # it is gone: nobody knows
    with pytest.raises(ArtifactError, match=r"\(no manifest, now 22222222\)"):
        check_data(tmp_path, "f1", parents={"model": NEW})


def test_a_record_without_a_folder_stays_valid(tmp_path: Path) -> None:
    check_data(tmp_path, "f1", parents={})
    assert (tmp_path / "data.json").read_bytes() == b'{"fingerprint": "f1", "parents": {}}\n'
    check_data(tmp_path, "f1", parents={}, folder=NEW)


def test_a_finished_run_is_not_written_to_by_the_look_at_its_data(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    check_data(path, "f1")
    verify(path)


def test_a_parent_is_vouched_for_by_itself_or_by_its_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    model = run / "model"
    assert verified_parent(model) == Parent(str(run), manifest_hash(run))
    own = publish(model, config_hash="h1", **NOTHING)
    assert verified_parent(model) == Parent(str(model), own)
    weights = model / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"weights.bin: damaged"):
        verified_parent(model)
    (model / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="run/model"):
        verified_parent(model)


def test_a_parent_of_somebody_else_has_nothing_to_verify(tmp_path: Path) -> None:
    assert verified_parent(tmp_path / "hub" / "name") is None
    (tmp_path / "manifest.json").write_text('{"name": "an app", "version": 3}')
    assert verified_parent(tmp_path) is None
    run = finished(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "mine").mkdir()
    assert verified_parent(run / "checkpoints") is None

"""What a run was made from: other data or another parent are noticed, and absent ones forgiven."""

from pathlib import Path

import pytest
from test_artifacts import NOTHING, finished, opened

from mediphi.artifacts import (
    Parent,
    check_data,
    manifest_hash,
    named_parents,
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

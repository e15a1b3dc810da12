"""Disks, the logger and the hub."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_cases import found, only
from huggingface_hub import constants

from mediphi.doctor import hub, storage, tracker
from mediphi.errors import UserError

MakeCase = Callable
KEY = "0123456789abcdef0123456789abcdef01234567"


def test_folders_are_tried_and_left_as_they_were(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    for check in (storage.runs_folder, storage.cache_folder, storage.temporary_files):
        assert {f.status for f in found(check, case)} == {"ok"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("key", ["runs", "cache"])
def test_a_folder_that_cannot_be_written_fails(
    key: str, make_case: MakeCase, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    check = {"runs": storage.runs_folder, "cache": storage.cache_folder}[key]
    finding = only(check, make_case(f"paths.{key}={tmp_path}/file/inside"), "FAIL")
    assert "Not a directory" in finding.found and f"paths.{key}=FOLDER" in finding.remedy


def test_a_file_system_without_locks_fails(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "locked", lambda folder: contextlib.nullcontext())
    assert "has no locks" in only(storage.runs_folder, make_case(), "FAIL").found


def test_little_room_is_told(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LITTLE", 1e30)
    for check in (storage.runs_folder, storage.cache_folder, storage.temporary_files):
        assert "GB free" in only(check, make_case(), "warning").found


def test_a_temporary_folder_of_another_file_system_is_named(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    case = make_case()
    if Path("/dev/shm").stat().st_dev == Path(case.config.paths.runs).parent.stat().st_dev:
        pytest.skip("one file system")
    assert "another file system" in found(storage.temporary_files, case)[0].found


def test_a_tmpdir_that_is_passed_over_is_told(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    text = only(storage.temporary_files, make_case(), "warning").found
    assert text.startswith("TMPDIR=/nowhere cannot be written")


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({}, "ok", "offline"),
        ({"WANDB_API_KEY": KEY}, "ok", "online: a key is there"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "ok", "offline"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "ok", "disabled"),
        ({"WANDB_MODE": "online"}, "warning", "no key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wandb_s_state_is_told_and_its_key_is_not(
    environment: dict[str, str],
    status: str,
    words: str,
    make_case: MakeCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = only(tracker.logger, make_case("logger=wandb"), status)
    assert words in finding.found and KEY[:8] not in str(finding)


def test_a_local_model_needs_no_hub(make_case: MakeCase) -> None:
    assert "not needed" in only(hub.hub, make_case(), "ok").found


def test_a_hub_id_without_a_network_is_one_line(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    case = make_case("model=phi35_mini", "model.path=nobody/no-such-model")
    with pytest.raises(UserError, match="not in the local cache, HF_HUB_OFFLINE is set; give mod"):
        found(hub.hub, case)


def test_hub_data_is_told(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("corpus=paper/mediflow")
    assert "stream from the hub" in only(hub.hub, case, "ok").found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "but HF_HUB_OFFLINE is set" in only(hub.hub, case, "FAIL").found

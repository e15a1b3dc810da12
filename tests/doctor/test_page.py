"""The page, its file and its exit code: by the real command, and what a terminal adds."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from composing import ROOT
from doctor_cases import doctor_config

from mediphi.doctor import checkup, machine, storage
from mediphi.doctor.findings import Page, clean, failure, ok, warning

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
LINE = re.compile(r"^  (ok|warning|FAIL) +[a-z]+( [a-z]+)? {2,}\S|^ {11,}\S|^[A-Z][a-z]+$|^$")


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MEDIPHI_", "WANDB_"))}
    kept |= {"MEDIPHI_RUNS": str(folder / "runs"), "MEDIPHI_CACHE": str(folder / "cache")}
    kept |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "stage=doctor", *arguments],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_the_default_command_passes_on_one_plain_page(tmp_path: Path) -> None:
    done = command(tmp_path, "corpus=medcode", "name=mine", WANDB_API_KEY=SECRET)
    assert (done.returncode, done.stderr) == (0, ""), done
    first, *lines, file, last = done.stdout.splitlines()
    assert first.startswith("model tiny, corpus medcode (plain text), hardware accelerator=auto")
    assert [line for line in lines if not LINE.match(line)] == []
    assert file == f"the same as JSON: {tmp_path}/runs/doctor/mine/doctor.json"
    assert re.fullmatch(r"doctor: \d+ ok, \d+ warnings?, 0 failed", last)
    assert done.stdout.isascii() and SECRET not in done.stdout
    report = (tmp_path / "runs/doctor/mine/doctor.json").read_text()
    checks = {row["check"] for row in json.loads(report)["findings"]}
    assert checks >= {name for group in checkup.GROUPS for name in group.checks}
    assert SECRET not in report
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["doctor", "doctor.json", "mine", "runs"]


def test_faults_are_lines_and_the_exit_code_is_2(tmp_path: Path) -> None:
    """A library that does not load and runs that cannot be written, seen in one go."""
    (tmp_path / "site" / "lightning").mkdir(parents=True)
    (tmp_path / "site/lightning/__init__.py").write_text("raise OSError('libcudart.so: no file')")
    (tmp_path / "runs").touch()
    path = f"{tmp_path}/site{os.pathsep}{ROOT}/src"
    done = command(tmp_path, "corpus=medcode", PYTHONPATH=path)
    assert done.returncode == 2 and done.stderr == "" and "Traceback" not in done.stdout, done
    assert "does not load: OSError: libcudart.so: no file" in " ".join(done.stdout.split())
    assert "not looked at without the libraries" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("2 failed: imports, runs folder")


def checked_up(folder: Path, *overrides: str) -> int:
    try:
        checkup.check_up(doctor_config(folder, *overrides))
    except SystemExit as end:
        return int(str(end.code))
    return 0


def only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [group for group in checkup.GROUPS if group.title == "Disk"]
    monkeypatch.setattr(checkup, "GROUPS", kept)


def test_a_crash_in_one_check_is_its_failure_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(case: object) -> None:
        raise ZeroDivisionError(f"no blocks\nof {SECRET}")

    only_disk(monkeypatch)
    monkeypatch.setattr(storage, "runs_folder", crash)
    assert checked_up(tmp_path, "name=a") == 2
    page = " ".join(capsys.readouterr().out.split())
    assert "FAIL runs folder ended by ZeroDivisionError: no blocks -> raised in test_page" in page
    assert "ok cache folder" in page and page.endswith("1 failed: runs folder")


def test_check_only_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only_disk(monkeypatch)
    assert checked_up(tmp_path, "check_only=true") == 0
    assert "JSON" not in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_again_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_disk(monkeypatch)
    assert checked_up(tmp_path, "name=a") == 0
    monkeypatch.setattr(storage, "LITTLE", 1e30)
    assert checked_up(tmp_path, "name=a") == 0
    report = json.loads((tmp_path / "runs/doctor/a/doctor.json").read_text())
    assert {row["status"] for row in report["findings"]} == {"ok", "warning"}


@pytest.mark.parametrize("colour", [True, False])
def test_signs_and_colours_are_for_a_terminal(
    colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    page = Page()
    for finding in (ok("a", "x"), warning("b", "y", remedy="do"), failure("c", "z", remedy="go")):
        page.finding(finding)
    out = capsys.readouterr().out
    assert all(sign in out for sign in ("✓ ok", "! warning", "✗ FAIL", "-> go"))
    assert ("\033[31m✗ FAIL\033[0m" in out) is colour


def test_secrets_are_blanked_and_lines_are_one() -> None:
    finding = clean(failure("a", f"key {SECRET}", remedy="one\ntwo"))
    assert SECRET not in str(finding) and finding.remedy == "one two"


def test_every_check_is_a_function_that_is_there() -> None:
    for group in checkup.GROUPS:
        for place in group.checks.values():
            module, _, function = place.partition(".")
            loaded = __import__(f"mediphi.doctor.{module}", fromlist=[function])
            assert isinstance(getattr(loaded, function), Callable)
    assert machine.device.__doc__

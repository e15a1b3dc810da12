"""Versions: what is installed is looked up as pip sees it, in `dist-info` folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_cases import found, only

from mediphi.doctor import software

MakeCase = Callable


def install(folder: Path, name: str, version: str, *lines: str) -> None:
    """What a package leaves that says it is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages hide those installed here."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.parametrize("check", [software.python, software.packages, software.imports])
def test_what_runs_the_tests_is_fine(check: Callable, make_case: MakeCase) -> None:
    assert {f.status for f in found(check, make_case())} == {"ok"}


def test_a_malicious_release_is_named(site: Path, make_case: MakeCase) -> None:
    install(site, "lightning", "2.6.2")
    told = [f for f in found(software.packages, make_case()) if f.status == "FAIL"]
    assert "installed is 2.6.2" in told[0].found and "pip install 'lightning" in told[0].remedy
    assert told[1].found == "lightning 2.6.2 is a malicious release"


def test_a_neighbour_of_it_is_not(site: Path, make_case: MakeCase) -> None:
    install(site, "lightning", "2.6.4")
    assert {f.status for f in found(software.packages, make_case())} == {"ok"}


def test_a_torchvision_of_another_build_is_told(site: Path, make_case: MakeCase) -> None:
    install(site, "torch", "2.13.0+cpu")
    install(site, "torchvision", "0.28.0")
    assert "not of the same build" in only(software.packages, make_case(), "warning").found


def test_requirements_and_python_are_those_of_the_project(site: Path, make_case: MakeCase) -> None:
    needs = ("Requires-Python: >=3.99", "Requires-Dist: no-such-package>=1")
    install(site, "mediphi", "0.1.0", *needs)
    assert "3.99" in only(software.python, make_case(), "FAIL").remedy
    finding = only(software.packages, make_case(), "FAIL")
    assert finding.found == "no-such-package>=1, which is not installed"


def test_an_extra_is_a_fault_only_where_the_config_needs_it(
    site: Path, make_case: MakeCase
) -> None:
    needs = 'Requires-Dist: deepspeed<0.20,>=0.19.8; extra == "deepspeed"'
    install(site, "mediphi", "0.1.0", needs)
    install(site, "deepspeed", "0.18.0")
    assert "0.18.0; this config" in only(software.extras, make_case(), "warning").found
    finding = only(software.extras, make_case("hardware.strategy=zero3"), "FAIL")
    assert "hardware.strategy=zero3 needs deepspeed" in finding.found
    assert finding.remedy == "pip install -e '.[deepspeed]'"

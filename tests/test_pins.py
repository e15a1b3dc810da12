"""What may be installed beside us: no malicious release, no known hole, nothing that drags CUDA in.

Floors and exclusions are read from `pyproject.toml` as pip reads them.
"""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE: dict[str, Requirement] = {
    canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])
}
EXTRAS = {name: list(map(Requirement, r)) for name, r in PROJECT["optional-dependencies"].items()}

MALICIOUS = [("lightning", "2.6.2"), ("lightning", "2.6.3")]
VULNERABLE = [("torch", "2.9.1"), ("transformers", "4.57.3"), ("hydra-core", "1.3.7")]
"""The last releases below the floors of advisories."""
NEVER = {"litellm"}
NOT_IN_BASE = {
    "litdata",
    "liger-kernel",
    "torchvision",
    "triton",
    "deepspeed",
    "flash-attn",
    *NEVER,
}


def refused(found: SpecifierSet, releases: list[str]) -> list[str]:
    return [release for release in releases if not found.contains(release, prereleases=True)]


@pytest.mark.parametrize(("name", "release"), MALICIOUS + VULNERABLE)
def test_a_bad_release_cannot_be_installed(name: str, release: str) -> None:
    assert refused(BASE[name].specifier, [release]) == [release]


def test_the_exclusions_are_no_wider_than_they_must_be() -> None:
    """Negative control: neighbours of the malicious releases stay allowed."""
    assert refused(BASE["lightning"].specifier, ["2.6.1", "2.6.4", "2.6.6"]) == []
    assert refused(SpecifierSet(">=2.6.1,<3"), ["2.6.2", "2.6.3"]) == []


def test_the_base_install_brings_neither_gpu_packages_nor_litellm() -> None:
    assert BASE.keys().isdisjoint(NOT_IN_BASE)
    for name, requirements in EXTRAS.items():
        assert {canonicalize_name(r.name) for r in requirements}.isdisjoint(NEVER), name


def test_no_requirement_is_a_link_or_without_a_floor() -> None:
    """A link serves what its owner likes; without a floor pip may take any old release."""
    for requirement in [*BASE.values(), *(r for rs in EXTRAS.values() for r in rs)]:
        assert requirement.url is None, requirement
        floors = [s for s in requirement.specifier if s.operator in (">=", "==", "~=")]
        assert floors or requirement.name == "ninja", requirement


def test_hydra_s_private_modules_are_held_to_the_minor_that_we_know() -> None:
    """The door leans on them; a minor release may move them without a word."""
    assert refused(BASE["hydra-core"].specifier, ["1.4.0", "1.3.8"]) == ["1.4.0"]


@pytest.mark.parametrize("name", sorted(BASE))
def test_what_is_installed_here_is_what_the_pins_say(name: str) -> None:
    assert refused(BASE[name].specifier, [version(name)]) == []

"""Versions: what is installed, what `pyproject.toml` allows, what must not be there."""

import platform
import time
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mediphi.config.schema import Config
from mediphi.doctor.case import LIBRARIES, Case
from mediphi.doctor.findings import Finding, failure, ok, warning

PROJECT = "mediphi"
SHOWN = ("torch", "transformers", "lightning", "hydra-core", "wandb")
EXTRAS = ("deepspeed", "flash-attn", "lora", "tensorboard")
"""Extras that a config may need; the others are for developers."""
MALICIOUS = {"litellm": ("1.82.7", "1.82.8"), "lightning": ("2.6.2", "2.6.3")}
LONG_IMPORT = 60.0
"""Seconds."""


def python(case: Case) -> Iterator[Finding]:
    here = platform.python_version()
    try:
        allowed = metadata.metadata(PROJECT)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        yield warning(
            "python",
            f"{here}; {PROJECT} itself is not installed, so nothing says which versions it allows",
            remedy="pip install -e .",
        )
        return
    if SpecifierSet(allowed).contains(here, prereleases=True):
        yield ok("python", f"{here} (allowed {allowed})")
    else:
        yield failure("python", here, remedy=f"make an environment with python {allowed}")


def packages(case: Case) -> Iterator[Finding]:
    """Every package of the base install, and whatever should be nowhere."""
    wanted = _requirements()
    faults = [(one, fault) for one in wanted if (fault := _fault(one))]
    for one, fault in faults:
        yield failure("packages", fault, remedy=f"pip install {_quoted(one)}")
    if wanted and not faults:
        versions = ", ".join(f"{n} {found}" for n in SHOWN if (found := version(n)))
        yield ok("packages", f"all {len(wanted)} as required: {versions}")
    for name, releases in MALICIOUS.items():
        if version(name) in releases:
            yield failure(
                "packages",
                f"{name} {version(name)} is a malicious release",
                remedy=f"pip uninstall {name}, and change every password and key of this machine",
            )
    yield from _torchvision()


def _torchvision() -> Iterator[Finding]:
    """One of the index beside a CPU build of PyTorch breaks `import lightning`."""
    torch, vision = version("torch"), version("torchvision")
    if torch and vision and ("+cpu" in torch) != ("+cpu" in vision):
        yield warning(
            "packages",
            f"torchvision {vision} is not of the same build as torch {torch}: imports may fail",
            remedy="pip uninstall torchvision (nothing here needs it)",
        )


def extras(case: Case) -> Iterator[Finding]:
    """Optional packages: a fault where the config needs them, else told."""
    needed, there, missing = needed_extras(case.config), [], []
    for extra in EXTRAS:
        for one in _requirements(extra):
            fault, name = _fault(one), canonicalize_name(one.name)
            if fault and extra in needed:
                yield failure(
                    "extras",
                    f"{needed[extra]} needs {fault}",
                    remedy=f"pip install -e '.[{extra}]'",
                )
            elif fault and version(name):
                remedy = f"pip install {_quoted(one)}"
                yield warning("extras", f"{fault}; this config does not need it", remedy=remedy)
            elif fault:
                missing.append(name)
            else:
                there.append(f"{name} {version(name)}")
    absent = f"; not installed and not needed: {', '.join(missing)}" if missing else ""
    yield ok("extras", f"{', '.join(there) or 'none'}{absent}")


def needed_extras(config: Config) -> dict[str, str]:
    """Extra -> the setting that needs it."""
    needed = {}
    if config.hardware.strategy == "zero3":
        needed["deepspeed"] = "hardware.strategy=zero3"
    if config.hardware.attention == "flash":
        needed["flash-attn"] = "hardware.attention=flash"
    if config.logger.kind == "tensorboard":
        needed["tensorboard"] = "logger=tensorboard"
    return needed


def imports(case: Case) -> Iterator[Finding]:
    """What is installed may still not load: a library of another build, a missing system file."""
    start = time.perf_counter()
    try:
        case.libraries()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        text = f"one of {', '.join(LIBRARIES)} does not load: {type(error).__name__}: {reason}"
        remedy = "make a fresh environment and pip install -e . there"
        yield failure("imports", text, remedy=remedy)
        return
    from mediphi.tracking.progress import silence_lightning

    silence_lightning()
    if (seconds := time.perf_counter() - start) > LONG_IMPORT:
        remedy = "put the environment on a local disk: every run pays this"
        yield warning("imports", f"{', '.join(LIBRARIES)} took {seconds:.0f} s", remedy=remedy)
    else:
        yield ok("imports", f"{', '.join(LIBRARIES)} load")


def version(name: str) -> str | None:
    """Of an installed package, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(extra: str = "") -> list[Requirement]:
    """Of the base install, or those that an extra adds."""
    try:
        all_of_them = [Requirement(text) for text in metadata.requires(PROJECT) or ()]
    except metadata.PackageNotFoundError:
        return []
    if not extra:
        return [r for r in all_of_them if r.marker is None or _adds(r, "")]
    optional = [r for r in all_of_them if r.marker is not None]
    return [r for r in optional if not _adds(r, "") and _adds(r, extra)]


def _adds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _fault(wanted: Requirement) -> str:
    """What is wrong with an installed package; empty where nothing is."""
    found = version(wanted.name)
    if found is None:
        return f"{wanted.name}{wanted.specifier}, which is not installed"
    if wanted.specifier.contains(found, prereleases=True):
        return ""
    return f"{wanted.name}{wanted.specifier}, installed is {found}"


def _quoted(requirement: Requirement) -> str:
    return f"'{requirement.name}{requirement.specifier}'"

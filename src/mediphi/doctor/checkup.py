"""All checks in their order, one after the other, whatever becomes of any of them."""

import json
import time
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from mediphi.artifacts import write_atomic
from mediphi.config import run_dir
from mediphi.config.schema import READS, Config
from mediphi.doctor.case import Case, Unknown
from mediphi.doctor.findings import Finding, Page, clean, failure, warning
from mediphi.errors import UserError
from mediphi.launch import RunResult

REPORT = "doctor.json"
FORMAT = 1


class Group(NamedTuple):
    """Checks under one heading: name -> module and function, loaded when their turn comes.

    Attributes:
        is_heavy: they need PyTorch and the like, and are not looked at where those do not load.
        sees_text: they read documents, which an exception's own words could repeat.
    """

    title: str
    checks: dict[str, str]
    is_heavy: bool = True
    sees_text: bool = False


GROUPS = (
    Group(
        "Software",
        {
            "python": "software.python",
            "packages": "software.packages",
            "extras": "software.extras",
            "imports": "software.imports",
        },
        is_heavy=False,
    ),
    Group(
        "Machine",
        {
            "device": "machine.device",
            "cores": "machine.cores",
            "attention": "kernels.attention_kernels",
            "processes": "ranks.processes",
        },
    ),
    Group("Services", {"logger": "tracker.logger", "hub": "hub.hub"}, is_heavy=False),
    Group(
        "Model",
        {
            "tokenizer": "model.vocabulary",
            "stop tokens": "model.stop_tokens",
            "positions": "model.positions",
            "memory": "machine.memory",
            "weights": "model.weights",
        },
    ),
    Group(
        "Disk",
        {
            "runs folder": "storage.runs_folder",
            "cache folder": "storage.cache_folder",
            "temporary files": "storage.temporary_files",
        },
        is_heavy=False,
    ),
    Group(
        "Data",
        {
            "corpus": "proofs.corpus",
            "loss mask": "proofs.loss_mask",
            "packing": "proofs.packed_equals_separate",
        },
        sees_text=True,
    ),
)


def check_up(config: Config) -> RunResult:
    """Look at everything, print a page, and write it to `doctor.json` in the run directory.

    Raises:
        SystemExit: 2, when a check failed.
    """
    page, findings = Page(), []
    kinds = READS[config.corpus.record_kind]
    print(
        f"model {config.model.name}, corpus {config.corpus.name} ({kinds}), "
        f"hardware {_devices(config)}"
    )
    with Case(config) as case, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a page has room for what a reader can act on
        for group in GROUPS:
            page.heading(group.title)
            for name in group.checks:
                for finding in map(clean, _looked(case, group, name)):
                    findings.append((group.title, finding))
                    page.finding(finding)
    print()
    folder = run_dir(config)
    if not config.check_only:
        _write(folder, config, findings)
    page.summary([finding for _, finding in findings])
    if any(finding.status == "FAIL" for _, finding in findings):
        raise SystemExit(2)
    return RunResult(None, folder)


def _looked(case: Case, group: Group, name: str) -> Iterator[Finding]:
    """What a check finds; what goes wrong in it is its failure, and the next one has its turn."""
    try:
        if group.is_heavy:
            case.libraries()
        module, _, function = group.checks[name].partition(".")
        yield from getattr(import_module(f"mediphi.doctor.{module}"), function)(case)
    except Unknown as part:
        yield warning(name, f"not looked at without the {part}", remedy="see what failed above")
    except UserError as error:
        remedy = "a run would stop with the same words: mend it and look again"
        yield failure(name, str(error), remedy=remedy)
    except Exception as error:
        words = "" if group.sees_text else f": {(str(error).splitlines() or [''])[0][:200]}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        yield failure(
            name,
            f"ended by {type(error).__name__}{words}",
            remedy=f"raised in {Path(place.filename).name}, line {place.lineno}; if the reason is "
            "not on this machine, it is a defect: report it",
        )


def _devices(config: Config) -> str:
    hardware = config.hardware
    text = f"accelerator={hardware.accelerator} devices={hardware.devices}"
    if hardware.num_nodes > 1:
        text += f" num_nodes={hardware.num_nodes}"
    return text if hardware.strategy == "auto" else f"{text} strategy={hardware.strategy}"


def _write(folder: Path, config: Config, findings: list[tuple[str, Finding]]) -> None:
    """Where it cannot be written, the check of the runs folder has said so."""
    rows = [{"group": group, **finding._asdict()} for group, finding in findings]
    report = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": config.model.name,
        "corpus": config.corpus.name,
        "findings": rows,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    except (OSError, UserError):
        return
    print(f"the same as JSON: {folder / REPORT}")

"""Every YAML file of the project composes, is judged valid, and resolves to what is committed."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from composing import ROOT, loader, report

from mediphi.sweep import expand, plan

NUM_CONF_FILES = 66
NUM_SWEEP_FILES = 3
REGENERATE = "python scripts/golden_configs.py"


def _golden():
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts/golden_configs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN = _golden()
CONF_FILES = sorted((ROOT / "conf").rglob("*.yaml"))
SWEEP_FILES = sorted((ROOT / "sweeps").rglob("*.yaml"))


def test_no_config_file_was_added_or_lost_unseen() -> None:
    assert len(CONF_FILES) == NUM_CONF_FILES
    assert len(SWEEP_FILES) == NUM_SWEEP_FILES


def _overrides(path: Path) -> list[str] | None:
    """What selects this file; None where no override does."""
    relative = path.relative_to(ROOT / "conf").with_suffix("")
    group, _, option = relative.as_posix().partition("/")
    if group == "published":
        stage, _, model = option.partition("_")
        return [f"stage={stage}", f"model={model}"]
    if group == "hydra":
        return []
    return [f"{group}={option}"] if option else []


@pytest.mark.parametrize("path", CONF_FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_config_file_composes_and_is_valid(path: Path) -> None:
    assert report(*GOLDEN.partnered(_overrides(path))) == []


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda p: p.name)
def test_every_point_of_a_sweep_file_is_valid(path: Path) -> None:
    params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    points = expand([f"{key}={value}" for key, value in params.items()])
    sweep = plan(loader(path.parent), config_name=path.stem, points=points)
    assert sweep.name == path.stem
    stated = re.search(r"(\d+) jobs", path.read_text())
    assert stated, "the header says how many jobs"
    assert len(sweep.points) == int(stated[1]) > 1


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda p: p.name)
def test_a_sweep_file_states_question_parameters_metric_and_budget(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("Question:", "Parameters:", "Metric:", "Budget:", f"--config-name {path.stem}"):
        assert word in header


@pytest.mark.parametrize("name", GOLDEN.cases())
def test_a_resolved_config_is_the_committed_one(name: str) -> None:
    committed = (GOLDEN.GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")
    assert GOLDEN.resolved(GOLDEN.cases()[name]) == committed, f"see the diff of {REGENERATE}"


def test_no_golden_file_is_left_over() -> None:
    names = {path.stem for path in GOLDEN.GOLDEN.glob("*.yaml")}
    assert names == set(GOLDEN.cases())

"""What Hydra itself would do with a config, before any schema sees it, is refused in one line."""

import ast
from pathlib import Path

import pytest
from composing import ROOT, composed, report
from omegaconf import DictConfig, OmegaConf
from program import finish, start

from mediphi.config import check, load

EVIL = """
defaults: [config, _self_]
hydra:
  callbacks:
    a: {_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [owned]}}
"""
LOGGING = """# @package hydra.job_logging
version: 1
handlers: {a: {class: logging.FileHandler, filename: made}}
root: {handlers: [a]}
"""


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["hydra.run.dir=made"], "hydra.run.dir=made"),
        (["hydra={run: {dir: made}}"], "hydra.run.dir=made"),
        (["hydra.run={dir: made}"], "hydra.run.dir=made"),
        (["-m", "hydra.sweep.dir=made", "seed=0,1"], "hydra.sweep.dir=made"),
        (["hydra/job_logging=default"], "hydra.job_logging="),
        (["hydra.output_subdir=made"], "hydra.output_subdir=made"),
        (["-m", "hydra/sweeper=basic", "seed=0,1"], "hydra.sweeper._target_="),
        (["--config-dir", "files", "--config-name", "evil"], "hydra.callbacks="),
        (["--config-dir", "files", "+loud=log"], "hydra.job_logging="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_hydra_s_own_folders_logs_and_calls_are_refused(
    arguments: list[str], key: str, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    (files / "loud").mkdir(parents=True)
    (files / "evil.yaml").write_text(EVIL)
    (files / "loud" / "log.yaml").write_text(LOGGING)
    code, out, err = finish(start(tmp_path, *arguments))
    assert (code, out) == (2, "")
    heading, line = err.splitlines()
    assert heading == "error: 1 problem in the config"
    assert line.startswith(f"  {key}") and "sweeper.params" in line
    assert [p.name for p in tmp_path.iterdir()] == ["files"]


def test_a_refused_hydra_setting_hides_no_other_problem() -> None:
    assert len(report("hydra.run.dir=made", "hydra.callbacks={}", "seed=-1")) == 2


def sections(node: DictConfig, prefix: str = "") -> list[str]:
    found = [f"{prefix}{k}" for k in node if k != "hydra" and isinstance(node[k], DictConfig)]
    return [
        prefix.rstrip("."),
        *(s for f in found for s in sections(node[f[len(prefix) :]], f"{f}.")),
    ]


def test_a_target_is_refused_in_every_section() -> None:
    """A config holds values. `instantiate` would call whatever they name."""
    plain = load(composed("corpus=datamix")).model_dump(mode="json")
    places = sections(OmegaConf.create(plain))
    assert {"", "stage", "stage.phase1", "corpus.task_outputs", "hardware.checkpoints"} <= set(
        places
    )
    for place in places:
        key = f"{place}._target_".lstrip(".")
        mutated = OmegaConf.create(plain)
        OmegaConf.update(mutated, key, "os.system", force_add=True)
        config, lines = check(mutated)
        assert config is None
        assert len(lines) == 1 and lines[0].startswith(f"{key}=os.system: "), lines
    assert check(OmegaConf.create(plain))[1] == []


def test_nothing_of_ours_instantiates_what_a_config_names() -> None:
    names = {"instantiate", "get_class", "get_method", "get_object", "locate", "eval", "exec"}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.alias) and node.name.split(".")[-1] in names), path
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id in names), path


# Rules between keys are judged beside wrong values.


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (["seed=-1", "hardware.micro_batch=3"], ["seed=-1", "stage.global_batch=4"]),
        (
            ["stage.phase1.lr=0", "stage.phase1.warmup_steps=9", "stage.phase1.max_steps=9"],
            ["stage.phase1.lr=0", "stage.phase1.warmup_steps=9"],
        ),
        (
            ["logger.tags=[1]", "model.init=pretrained", "corpus.task_outputs.generator=files"],
            ["logger.tags.0=1", "corpus.task_outputs.path", "model.path"],
        ),
        (["stage.lrr=1", "hardware.devices=3"], ["stage.lrr=1", "stage.global_batch=4"]),
        (["seed=${nowhere}", "hardware.devices=3"], ["seed=${nowhere}", "stage.global_batch=4"]),
    ],
)
def test_wrong_values_and_broken_rules_come_in_one_report(
    overrides: list[str], starts: list[str]
) -> None:
    lines = report(*overrides)
    assert len(lines) == len(starts), lines
    assert all(told.startswith(start) for told, start in zip(lines, starts, strict=True)), lines


@pytest.mark.parametrize(
    "overrides",
    [
        ["stage.global_batch=0", "hardware.micro_batch=3"],
        ["hardware.devices=x", "hardware.micro_batch=3"],
        ["hardware.micro_batch=${nowhere}", "hardware.devices=3"],
        ["hardware.accelerator=cpuu", "hardware.attention=flash"],
        ["stage.phase1.max_steps=x", "stage.phase1.warmup_steps=9"],
    ],
)
def test_a_rule_about_a_wrong_value_says_nothing(overrides: list[str]) -> None:
    """Negative control: what the other keys may be follows from a value that nobody knows."""
    assert len(report(*overrides)) == 1

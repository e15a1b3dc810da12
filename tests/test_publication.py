"""The next command that a finished run prints."""

import shlex
from pathlib import Path

import pytest
import yaml
from composing import ROOT, composed, loader

from mediphi.config import Config, load
from mediphi.config.stages import DpoStage
from mediphi.publication import next_command
from mediphi.sweep import expand, plan

MODELS = ("tiny", "phi35_mini")
NEXT = {"pit": "sft", "dapt": "sft", "sft": "dpo"}
CORPORA = {"pit": "medcode", "dapt": "pubmed", "sft": "mediflow"}


def config_of(*overrides: str) -> Config:
    return load(composed(*overrides))


def arguments(config: Config, folder: Path) -> list[str]:
    return shlex.split(next_command(config, folder))[2:]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", NEXT)
def test_the_next_stage_trains_this_model_on_the_corpus_of_its_size(
    stage: str, model: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    finished = config_of(f"stage={stage}", f"corpus={CORPORA[stage]}", f"model={model}")
    config = config_of(*arguments(finished, folder))
    assert (config.stage.kind, config.model.name) == (NEXT[stage], model)
    assert config.model.path == str(folder)
    assert config.corpus.name.startswith("paper_") == (model == "phi35_mini")


@pytest.mark.parametrize("model", MODELS)
def test_the_sweep_after_dpo_keeps_the_models_learning_rate_and_varies_beta(
    model: str, tmp_path: Path
) -> None:
    own = config_of("stage=dpo", "corpus=mediflow_dpo", f"model={model}", "model.path=runs/sft/a")
    option, folder, _, name, *more = arguments(own, tmp_path)
    assert option == "--config-dir"
    path = ROOT / folder / f"{name}.yaml"
    params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    grid = expand([*(f"{key}={value}" for key, value in params.items()), *more])
    configs = [
        point.config for point in plan(loader(path.parent), config_name=name, points=grid).points
    ]
    stages = [config.stage for config in [own, *configs] if isinstance(config.stage, DpoStage)]
    assert {stage.phase.lr for stage in stages} == {stages[0].phase.lr}
    assert {config.model.path for config in configs} == {"runs/sft/a"}
    assert {config.corpus.name.startswith("paper_") for config in configs} == {model != "tiny"}
    assert len({stage.beta for stage in stages[1:]}) == len(configs) > 1

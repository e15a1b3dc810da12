"""The plan of a stage's phases: what it refuses before anything is written."""

import json
from pathlib import Path

import pytest
from composing import composed
from small_models import ASSETS, phi3_config

from mediphi.backbone import load_tokenizer
from mediphi.config import load
from mediphi.errors import UserError
from mediphi.phases import PhasePlan, plan_phases
from mediphi.preparation import prepare

PHASES = {"pit": ("phase1", "phase2"), "dapt": ("phase",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and the cache that the first plan fills."""
    folder = tmp_path_factory.mktemp("phases")
    rows = ({"text": f"Note {i}. Patient {i * 7} was seen {i} times. " * 3} for i in range(40))
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def planned(folder: Path, stage: str, *overrides: str) -> tuple[PhasePlan, ...]:
    """Phases of one epoch without warm-up, `overrides` apart."""
    plain = {"warmup_steps": "0", "max_steps": "null", "epochs": "1"}
    config = load(
        composed(
            f"stage={stage}",
            "corpus=local",
            f"corpus.sources.mine.path={folder / 'notes.jsonl'}",
            f"paths.cache={folder / 'cache'}",
            "stage.max_length=64",
            "stage.global_batch=2",
            "hardware.micro_batch=1",
            "stage.quiz=null",
            *(f"stage.{p}.{key}={value}" for p in PHASES[stage] for key, value in plain.items()),
            *overrides,
        )
    )
    data = prepare(config, load_tokenizer(str(ASSETS / "tiny")))
    return plan_phases(config, data=data, model_config=phi3_config())


@pytest.mark.parametrize(
    ("stage", "number"), [("pit", 0), ("pit", 1), ("dapt", 0)], ids=["phase1", "phase2", "dapt"]
)
def test_a_warm_up_that_would_never_end_is_refused_in_one_line(
    stage: str, number: int, folder: Path
) -> None:
    key = f"stage.{PHASES[stage][number]}.warmup_steps"
    steps = planned(folder, stage)[number].num_steps
    assert steps > 2
    assert planned(folder, stage, f"{key}={steps - 1}")[number].phase.warmup_steps == steps - 1
    for warmup in (steps, 10 * steps):
        with pytest.raises(UserError) as caught:
            planned(folder, stage, f"{key}={warmup}")
        said = str(caught.value)
        assert said.startswith(f"{key}={warmup}: the phase has only {steps} optimizer steps")
        remedies = (f"set {key}", "stage.global_batch", "epochs", "corpus=paper/")
        assert all(remedy in said for remedy in remedies) and "\n" not in said
        assert caught.value.exit_code == 2

"""One vocabulary of metrics; a CSV that survives interruption; W&B that leaks and stops nothing."""

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediphi.config.schema import Logger as LoggerConfig
from mediphi.errors import ArtifactError, MachineError, UserError
from mediphi.records import DIFFICULTIES, TASK_KINDS
from mediphi.tracking import begin_phase, finish, log, make_loggers
from mediphi.tracking.csv_log import CsvLogger
from mediphi.tracking.names import METRICS, WALL_CLOCK, header, unit_of
from mediphi.tracking.redaction import REDACTED, redact

GROUPS = {"kind": TASK_KINDS, "source": ["icd10cm"], "difficulty": DIFFICULTIES}
NAMES = header("tokens", GROUPS)


def started(path: Path, *, resumed_step: int | None = None, phase: str = "phase1") -> CsvLogger:
    logger = CsvLogger(path, NAMES)
    logger.begin_phase(phase, first_step=0, resumed_step=resumed_step)
    return logger


def steps_in(path: Path) -> list[str]:
    return [line.split(",", 2)[0] for line in path.read_text().splitlines()[1:]]


# --- names --------------------------------------------------------------------------------------


PAIR_GROUPS = {"error": ["brevity"], "task": ["summarization"], "group": ["brevity", "all"]}


@pytest.mark.parametrize(("objective", "groups"), [("tokens", GROUPS), ("pairs", PAIR_GROUPS)])
def test_names_are_unique_and_wall_clock_ones_come_last(objective: Any, groups: Any) -> None:
    names = header(objective, groups)
    assert len(set(names)) == len(names)
    assert tuple(names[-len(WALL_CLOCK) :]) == WALL_CLOCK
    assert not [name for name in names if "{" in name]
    assert {m.name for m in METRICS if m.wall_clock} == {"tokens_per_second", "mfu", "memory_gb"}


def test_each_objective_has_its_own_names() -> None:
    tokens, pairs = header("tokens", {**GROUPS, **PAIR_GROUPS}), header("pairs", PAIR_GROUPS)
    assert {"train/perplexity", "heldout/accuracy/task/summarization"} < set(tokens)
    assert {"heldout/margin/error/brevity", "train/kl", "heldout/logps/chosen"} < set(pairs)
    assert not [name for name in tokens if "margin" in name or "reward" in name]
    assert not [name for name in pairs if "perplexity" in name or "/kind/" in name]


def test_groups_without_names_have_no_columns() -> None:
    names = header("tokens", {"kind": ["answer"]})
    assert "train/loss/kind/answer" in names
    assert not [name for name in names if "/source/" in name or "quiz" in name or "exam" in name]


def test_a_split_may_have_names_of_its_own() -> None:
    both = {"kind": ["answer"], "train/source": ["notes"], "heldout/source": ["letters"]}
    names = header("tokens", both)
    found = {name for name in names if "/loss/source/" in name or "/loss/kind/" in name}
    assert found == {
        "train/loss/source/notes",
        "heldout/loss/source/letters",
        "train/loss/kind/answer",
        "heldout/loss/kind/answer",
    }


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("train/loss/kind/summary", "nats/token"),
        ("heldout/accuracy/task/note scoring", "share right"),
        ("heldout/accuracy/error/brevity", "share right"),
        ("train/logps/chosen", "nats"),
        ("train/logps_per_token/chosen", "nats/token"),
        ("heldout/kl", "nats/token"),
        ("train/reward/chosen", ""),
        ("lr", ""),
    ],
)
def test_a_name_has_the_unit_of_its_pattern(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_every_name_has_a_unit_and_a_misspelt_one_none() -> None:
    names = [*NAMES, *header("pairs", PAIR_GROUPS)]
    assert all(isinstance(unit_of(name), str) for name in names)
    for wrong in ("losses", "train/losss", "heldout/margins", "train/margin/kind/summary"):
        with pytest.raises(KeyError):
            unit_of(wrong)


# --- CSV ----------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False) | st.integers(-(2**53), 2**53))
def test_numbers_read_back_as_they_were(value: float) -> None:
    from mediphi.tracking.csv_log import _cell

    assert float(_cell(value)) == value


def test_rows_are_on_disk_at_once_under_the_fixed_header(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = started(path)
    logger.log_metrics({"train/loss": 2.5, "lr": 1e-3}, step=10)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(["step", "phase", *NAMES])
    assert dict(zip(lines[0].split(","), lines[1].split(","), strict=True))["train/loss"] == "2.5"


def test_steps_run_on_over_the_phases(tmp_path: Path) -> None:
    logger = started(tmp_path / "metrics.csv")
    logger.log_metrics({"lr": 1.0}, step=5)
    logger.begin_phase("phase2", first_step=100, resumed_step=None)
    logger.log_metrics({"lr": 1.0}, step=5)
    assert steps_in(logger.path) == ["5", "105"]


def test_resume_drops_rows_beyond_the_checkpoint_and_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = started(path, phase="phase0")
    logger.log_metrics({"lr": 1.0}, step=40)
    logger.begin_phase("phase1", first_step=40, resumed_step=None)
    for step in range(10, 60, 10):
        logger.log_metrics({"lr": 1.0}, step=step)
    with path.open("a") as file:
        file.write("100,phase1,0.5")
    again = CsvLogger(path, NAMES)
    again.begin_phase("phase1", first_step=40, resumed_step=30)
    assert steps_in(path) == ["40", "50", "60", "70"]
    again.log_metrics({"lr": 1.0}, step=40)
    assert steps_in(path)[-1] == "80"


def test_a_phase_without_a_checkpoint_starts_its_rows_afresh(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    started(path).log_metrics({"lr": 1.0}, step=3)
    started(path)
    assert steps_in(path) == []


def test_what_a_resumed_file_says_already_is_not_said_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    started(path).log_metrics({"quiz/easy": 0.7}, step=3)
    again = started(path, resumed_step=3)
    again.log_metrics({"quiz/easy": 0.7}, step=3)
    again.log_metrics({"heldout/loss": 0.7}, step=3)
    assert steps_in(path) == ["3", "3"]


def test_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="losss"):
        started(tmp_path / "metrics.csv").log_metrics({"losss": 1.0}, step=1)


def test_row_before_a_phase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="begin_phase"):
        CsvLogger(tmp_path / "metrics.csv", NAMES).log_metrics({"lr": 1.0}, step=1)


def test_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,phase,other\n")
    with pytest.raises(ArtifactError, match="other columns"):
        started(path)


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = started(path)
    logger.log_metrics({"lr": 1.0}, step=1)
    path.write_text(path.read_text() + "2,phase1\n")
    with pytest.raises(ArtifactError, match=r"metrics.csv:3 is damaged"):
        started(path, resumed_step=2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_full_disk_is_one_line(tmp_path: Path) -> None:
    logger = started(tmp_path / "metrics.csv")
    logger.path = Path("/dev/full")
    with pytest.raises(MachineError, match=r"cannot write .*No space left") as caught:
        logger.log_metrics({"lr": 1.0}, step=1)
    assert "\n" not in str(caught.value)


# --- redaction ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["api_key", "apikey", "hub_token", "token", "password", "client_secret", "AUTH_TOKEN"]
)
def test_values_under_secret_keys_are_blanked(key: str) -> None:
    assert redact({"a": [{key: "x"}], key: 5}) == {"a": [{key: REDACTED}], key: REDACTED}


@pytest.mark.parametrize(
    "value",
    ["hf_abcdefghij0123456789", "sk-abcdefghij0123456789", "https://me:pw@host/x", "Bearer abc"],
)
def test_secret_looking_values_are_blanked(value: str) -> None:
    assert redact({"path": value, "list": ["a", value]}) == {
        "path": REDACTED,
        "list": ["a", REDACTED],
    }


def test_harmless_config_passes_unchanged() -> None:
    config = {
        "max_tokens": 512,
        "loss_chunk_tokens": 2048,
        "tokenizer": "phi",
        "revision": "9fceb02d0ae598e95dc970b74767f19372d61af8",
        "url": "https://example.org/a:b",
        "none": None,
        "flag": True,
    }
    assert redact(config) == config


# --- TensorBoard and progress -------------------------------------------------------------------


def test_tensorboard_gets_the_steps_of_the_whole_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = _tensorboard(tmp_path)
    begin_phase(loggers, "phase2", first_step=100)
    log(loggers, {"lr": 0.5}, step=10)
    finish(loggers)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("lr")] == [(110, 0.5)]


def test_missing_tensorboard_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboard is not installed: pip install"):
        _tensorboard(tmp_path)


def _tensorboard(run_dir: Path) -> list[Any]:
    return make_loggers(
        LoggerConfig(kind="tensorboard"),
        run_dir=run_dir,
        run_name="r",
        header=NAMES,
        config_dict={},
    )


def test_progress_without_a_terminal_is_plain_lines(tmp_path: Path, capsys: Any) -> None:
    from types import SimpleNamespace

    from mediphi.tracking.progress import make_progress

    logger = started(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": 2.0, "lr": 1e-3, "tokens_per_second": 41234.0}, step=1)
    trainer: Any = SimpleNamespace(
        global_step=0, loggers=[logger], is_global_zero=True, limit_val_batches=0
    )
    progress: Any = make_progress("phase1", num_steps=2, every_seconds=0.0)
    progress.on_train_start(trainer, None)
    for trainer.global_step in (1, 1, 2):
        progress.on_train_batch_end(trainer, None, None, None, 0)
    lines = capsys.readouterr().err
    assert "\r" not in lines and "\x1b" not in lines
    first, last = lines.splitlines()
    assert first.startswith("phase1 step 1/2  loss 2.000  lr 1.0e-03  41,234 tok/s  ETA 0:00:0")
    assert last == "phase1 step 2/2  loss 2.000  lr 1.0e-03  41,234 tok/s"


def test_the_bar_ends_on_the_last_evaluation(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toy_training import NUM_STEPS, train

    from mediphi.tracking.progress import ProgressBar

    monkeypatch.setenv("COLUMNS", "200")
    train(tmp_path, callbacks=lambda _: [ProgressBar("phase1", num_steps=NUM_STEPS)])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    *_, before, last = [float(row["heldout/loss"]) for row in rows if row["heldout/loss"]]
    shown = capsys.readouterr().err.splitlines()[-1]
    assert f"{NUM_STEPS}/{NUM_STEPS}" in shown and f"held-out {last:.3f}" in shown
    assert f"{before:.3f}" != f"{last:.3f}"


def test_importing_the_vocabulary_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys, mediphi.tracking.names, mediphi.tracking.redaction\n"
        "print([m for m in ('torch', 'lightning', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_infinite_loss_can_be_written(tmp_path: Path) -> None:
    logger = started(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": math.inf, "lr": math.nan}, step=1)
    assert ",inf," in logger.path.read_text() and ",nan," in logger.path.read_text()

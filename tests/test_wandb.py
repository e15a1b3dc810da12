"""W&B gets the numbers, no secret, and cannot stop a training."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mediphi.config.schema import Logger as LoggerConfig
from mediphi.records import DIFFICULTIES, TASK_KINDS
from mediphi.tracking import begin_phase, finish, log, make_loggers
from mediphi.tracking.names import header

GROUPS = {"kind": TASK_KINDS, "source": ["icd10cm"], "difficulty": DIFFICULTIES}
NAMES = header("tokens", GROUPS)


CANARY = "canary-5f0c9a"


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nobody is logged in."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))


def run_job(run_dir: Path, config: dict[str, Any] | None = None) -> list[Any]:
    loggers = make_loggers(
        LoggerConfig(kind="wandb", group="sweep"),
        run_dir=run_dir,
        run_name="a run",
        header=NAMES,
        config_dict=config or {"stage": {"kind": "pit"}},
    )
    begin_phase(loggers, "phase1", first_step=0)
    log(loggers, {"train/loss": 0.123456789}, step=10)
    return loggers


def everything_in(folder: Path) -> bytes:
    return b"".join(
        p.name.encode() + p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_symlink()
    )


def test_offline_run_holds_the_metrics_and_no_secret(
    tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("HUB_TOKEN", f"{CANARY}-env")
    monkeypatch.setattr(sys, "argv", ["train.py", f"hub_token={CANARY}-argv"])
    config = {"stage": {"kind": "pit"}, "hub_token": f"{CANARY}-config", "shown": "marker-1"}
    finish(run_job(tmp_path / "run", config))
    written = everything_in(tmp_path)
    assert b"train/loss" in written and b"marker-1" in written  # the search can find
    assert CANARY.encode() not in written
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    assert (out, err) == ("", "")


def test_resume_continues_the_run_and_the_next_job_has_its_own(
    tmp_path: Path, no_account: None
) -> None:
    ids = []
    for name in ("a", "a", "b"):
        loggers = run_job(tmp_path / name)
        ids.append(loggers[1].experiment.id)
        finish(loggers, exit_code=1)
    assert ids[0] == ids[1] != ids[2]
    assert len(list((tmp_path / "a" / "wandb").glob("offline-run-*"))) >= 1


def test_unreachable_wandb_is_one_warning(
    tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    import wandb

    def refuse(**kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", refuse)
    loggers = run_job(tmp_path)
    log(loggers, {"train/loss": 1.0}, step=20)
    finish(loggers)
    assert capfd.readouterr().err.count("warning: W&B is off") == 1
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["10", "20"]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "online"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_online_only_when_logged_in(
    environment: dict[str, str], mode: str, no_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mediphi.tracking.wandb_log import wandb_mode

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode() == mode


@pytest.mark.parametrize(("host", "mode"), [("api.wandb.ai", "online"), ("example.org", "offline")])
def test_netrc_counts_as_logged_in(
    host: str, mode: str, tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mediphi.tracking.wandb_log import wandb_mode

    (tmp_path / "netrc").write_text(f"machine {host} login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == mode

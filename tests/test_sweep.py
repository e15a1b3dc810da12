"""Sweeps: all points judged first, one process each, skip what is done, retry what failed."""

import csv
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from program import ROOT, attempts, finish, start

from mediphi.artifacts import check_data, locked, open_run, publish
from mediphi.config import config_hash
from mediphi.data.fingerprint import fingerprint
from mediphi.door.compose import make_loader
from mediphi.door.files import tame_hydra
from mediphi.errors import ArtifactError, ConfigError
from mediphi.sweep import Plan, Point, expand, plan, run_sweep
from mediphi.sweep.runner import Stop, _run_point
from mediphi.sweep.table import Row, heldout_loss, markdown, objective


def planned(*arguments: str, config_name: str = "config") -> Plan:
    tame_hydra()
    return plan(make_loader(ROOT / "conf"), config_name=config_name, points=expand(arguments))


def statuses(cwd: Path) -> dict[str, str]:
    (path,) = (cwd / "runs" / "sweeps").glob("*/table.csv")
    with path.open() as file:
        return {row["point"]: row["status"] for row in csv.DictReader(file)}


# The plan.


def test_the_grid_is_the_product_in_the_order_given() -> None:
    points = expand(["stage=pit", "seed=0,1", "stage.phase1.lr=1e-3,3e-3"])
    assert points == [
        ("stage=pit", f"seed={seed}", f"++stage.phase1.lr={lr}")
        for seed in (0, 1)
        for lr in ("0.001", "0.003")
    ]


def test_a_later_argument_replaces_an_earlier_one() -> None:
    assert expand(["seed=0,1", "seed=5"]) == [("seed=5",)]


def test_every_point_is_judged_and_a_shared_problem_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        planned("seed=0,-1", "stage.phase1.lr=1e-3,x", "logger.entity=3")
    assert caught.value.lines == (
        "logger.entity=3: must be text, write \"'3'\"",
        "stage.phase1.lr=x: must be a number [point seed=0 stage.phase1.lr=x and 1 more]",
        "seed=-1: must be >= 0 [point seed=-1 stage.phase1.lr=0.001 and 1 more]",
    )


def test_the_doctor_is_no_point_of_a_sweep() -> None:
    with pytest.raises(ConfigError) as caught:
        planned("stage=doctor", "seed=0,1")
    (line,) = caught.value.lines
    assert line.startswith("stage=doctor: ") and line.endswith("run it without -m")
    with pytest.raises(ConfigError, match=r"without -m \[point stage=doctor\]"):
        planned("stage=pit,doctor")


def test_points_that_would_share_a_directory_are_refused() -> None:
    with pytest.raises(ConfigError, match="would share it"):
        planned("seed=0,1", "name=mine")
    with pytest.raises(ConfigError, match="would share it"):
        planned("hardware.micro_batch=1,2")


def test_the_name_of_a_sweep_does_not_depend_on_the_order_of_its_points() -> None:
    assert planned("seed=0,1").name == planned("seed=1,0").name
    assert planned("seed=0,1").name != planned("seed=0,2").name


# The jobs, with commands of a few milliseconds.


def toy(tmp_path: Path, *arguments: str) -> Plan:
    return planned(*arguments, f"paths.runs={tmp_path}")


def python(text: str):
    def command(point: Point, group: str) -> list[str]:
        return [sys.executable, "-S", "-c", f"seed={point.config.seed}; group={group!r}\n{text}"]

    return command


def test_a_failed_job_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = toy(tmp_path, "seed=0,1,2", "check_only=true")
    with pytest.raises(SystemExit) as caught:
        run_sweep(sweep, command=python("print('trying'); assert seed != 1, 'one is odd'"))
    assert caught.value.code == 1
    assert list(_rows(sweep).values()) == [
        "checked",
        "failed",
        "checked",
    ]
    assert "exit 1: AssertionError: one is odd" in capsys.readouterr().out


def test_a_job_without_a_manifest_is_not_done(tmp_path: Path) -> None:
    sweep = toy(tmp_path, "seed=0,1")
    with pytest.raises(SystemExit):
        run_sweep(sweep, command=python("pass"))
    assert set(_rows(sweep).values()) == {"failed"}


def test_a_checked_point_is_told_from_a_run_and_names_the_log_with_its_plan(
    tmp_path: Path,
) -> None:
    sweep = toy(tmp_path, "seed=0,1", "check_only=true")
    rows = run_sweep(sweep, command=python("print(f'plan of {seed}')"))
    assert [row.status for row in rows] == ["checked", "checked"]
    assert [Path(row.run_dir).read_text() for row in rows] == ["plan of 0\n", "plan of 1\n"]
    assert [row.metric for row in rows] == ["", ""]


SIDE_BY_SIDE = """
import os, time
here = {place!r}
os.makedirs(here, exist_ok=True)
open(f"{{here}}/{{seed}}", "w").close()
running, patience = len(os.listdir(here)), time.monotonic() + {patience}
while running < {wait_for} and time.monotonic() < patience:
    time.sleep(0.01)
    running = len(os.listdir(here))
open(here + "-peaks", "a").write(f"{{running}}\\n")
{then}
"""


def test_one_job_runs_at_a_time_by_default(tmp_path: Path) -> None:
    place = str(tmp_path / "running")
    script = SIDE_BY_SIDE.format(
        place=place, wait_for=2, patience=0.1, then="os.remove(f'{here}/{seed}')"
    )
    run_sweep(toy(tmp_path, "seed=0,1,2", "check_only=true"), command=python(script))
    assert (tmp_path / "running-peaks").read_text() == "1\n1\n1\n"


def test_jobs_run_side_by_side_when_asked(tmp_path: Path) -> None:
    place = str(tmp_path / "running")
    script = SIDE_BY_SIDE.format(place=place, wait_for=3, patience=60, then="")
    sweep = toy(tmp_path, "seed=0,1,2", "check_only=true")
    run_sweep(sweep, num_jobs=3, command=python(script))
    assert (tmp_path / "running-peaks").read_text() == "3\n3\n3\n"


@pytest.mark.parametrize(("num_jobs", "expected"), [(1, None), (2, 2), (8, 1)])
def test_jobs_side_by_side_share_the_cores(
    num_jobs: int, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    seen = tmp_path / "threads"
    script = f"import os; open({str(seen)!r}, 'w').write(os.environ.get('OMP_NUM_THREADS', ''))"
    run_sweep(toy(tmp_path, "check_only=true"), num_jobs=num_jobs, command=python(script))
    assert seen.read_text() == ("" if expected is None else str(expected))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_sweep(toy(tmp_path, "check_only=true"), num_jobs=num_jobs, command=python(script))
    assert seen.read_text() == "3"


def test_two_equal_sweeps_do_not_interleave(tmp_path: Path) -> None:
    sweep = toy(tmp_path, "seed=0,1", "check_only=true")
    sweep.folder.mkdir(parents=True)
    with locked(sweep.folder), pytest.raises(ArtifactError, match="in use"):
        run_sweep(sweep, command=python("pass"))
    assert not list(sweep.folder.glob("*.log"))
    run_sweep(sweep, command=python("pass"))


def finish_point(point: Point, *, config_hash: str, data: str | None = None) -> None:
    with open_run(point.run_dir, config_yaml="", config_hash=config_hash, on_existing="overwrite"):
        if data is not None:
            check_data(point.run_dir, data)
        publish(point.run_dir, config_hash=config_hash, parents={}, data={}, extra={})


def test_only_a_run_of_the_same_config_and_data_is_skipped(tmp_path: Path) -> None:
    sweep = toy(tmp_path, "name=mine")
    (point,) = sweep.points
    corpus = fingerprint(point.config.corpus)
    for config, data, status in (
        (config_hash(point.config), corpus, "skipped"),
        (config_hash(point.config), None, "skipped"),
        ("another", corpus, "failed"),
        (config_hash(point.config), "another", "failed"),
    ):
        finish_point(point, config_hash=config, data=data)
        row = attempt(sweep)
        assert row.status == status
        assert (row.error == "exit 1: ran") == (status == "failed")


@pytest.mark.parametrize("on_existing", ["refuse", "overwrite"])
def test_a_finished_point_is_left_to_its_job_unless_it_resumes(
    on_existing: str, tmp_path: Path
) -> None:
    sweep = toy(tmp_path, f"on_existing={on_existing}")
    finish_point(sweep.points[0], config_hash=config_hash(sweep.points[0].config))
    assert attempt(sweep).error == "exit 1: ran"


def attempt(sweep: Plan) -> Row:
    """The row of a sweep of one point whose job only says that it ran."""
    stop = Stop()
    sweep.folder.mkdir(parents=True, exist_ok=True)
    command = python("raise SystemExit('ran')")
    return _run_point(sweep.points[0], sweep, 0, start=command, stop=stop)


def _rows(sweep: Plan) -> dict[str, str]:
    with (sweep.folder / "table.csv").open() as file:
        return {row["point"]: row["status"] for row in csv.DictReader(file)}


# The table.


def test_a_table_survives_odd_signs() -> None:
    text = markdown([Row("a|b", "failed", "", None, "runs/x", "exit 1: x | y")])
    header, rule, row = text.splitlines()
    assert len({len(header), len(rule), len(row)}) == 1
    assert "a\\|b" in row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"objective": {"name": "acc", "value": 0.5}}', ("acc", 0.5)),
        ('{"objective": {"name": "acc", "value": NaN}}', ("acc", None)),
        ('{"objective": null}', ("", None)),
        ("[]", ("", None)),
        ("{", ("", None)),
        (None, ("", None)),
    ],
)
def test_an_objective_is_read_or_absent(
    text: str | None, expected: tuple[str, float | None], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    assert objective(tmp_path) == expected


def test_every_row_has_a_direction_and_the_heldout_loss(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"objective": null, "heldout/loss": 2.5}')
    assert heldout_loss(tmp_path) == 2.5
    assert heldout_loss(tmp_path / "nowhere") is None
    quiz = Row("a", "done", "quiz/easy", 0.5, "runs/a", "", heldout_loss(tmp_path))
    loss = Row("b", "done", "heldout/loss", 2.25, "runs/b", "", 2.25)
    assert quiz.cells()[2:5] == ("quiz/easy (higher is better)", "0.5", "2.5")
    assert loss.cells()[2:5] == ("heldout/loss (lower is better)", "2.25", "2.25")
    assert "heldout/loss" in markdown([quiz, loss]).splitlines()[0]


# The whole program.


def test_finished_jobs_are_skipped_and_failed_ones_tried_again(tmp_path: Path) -> None:
    (tmp_path / "fail_1").touch()
    command = ["-m", "seed=0,1,2", "stage.phase2.lr=1e-3"]
    code, out, err = finish(start(tmp_path, *command))
    assert (code, err) == (1, "")
    assert statuses(tmp_path) == {"seed=0": "done", "seed=1": "failed", "seed=2": "done"}
    assert "error: rows.jsonl:3: not JSON" in out
    groups = {line.split()[1] for line in attempts(tmp_path)}
    assert len(groups) == 1
    assert groups.pop().startswith("sweep-")

    (tmp_path / "fail_1").unlink()
    code, out, err = finish(start(tmp_path, *command))
    assert (code, err) == (0, "")
    assert statuses(tmp_path) == {"seed=0": "skipped", "seed=1": "done", "seed=2": "skipped"}
    assert [line.split()[0] for line in attempts(tmp_path)] == ["0", "1", "2", "1"]
    assert "easy_accuracy" in out
    assert "1.5" in out


def test_a_sweep_file_runs_without_m_and_a_job_equals_the_single_run(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(
        "defaults: [config, _self_]\nstage: {phase1: {lr: 0.01}}\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {seed: '0,1'}\n"
    )
    code, out, err = finish(start(tmp_path, "--config-dir", "sweeps", "--config-name", "mine"))
    assert (code, err) == (0, "")
    assert attempts(tmp_path) == ["0 mine", "1 mine"]
    assert (tmp_path / "runs" / "sweeps" / "mine" / "table.md").read_text() in out
    before = sorted((tmp_path / "runs" / "pit").iterdir())
    code, _, _ = finish(start(tmp_path, "stage.phase1.lr=1e-2", "seed=1"))
    assert code == 0
    assert sorted((tmp_path / "runs" / "pit").iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_job_and_the_sweep(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    process = start(tmp_path, "-m", "seed=0,1,2")
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (128 + number, "")
    assert (tmp_path / f"stopped_{int(number)}").exists()
    assert set(statuses(tmp_path).values()) == {"stopped"}
    assert len(attempts(tmp_path)) == 1


@pytest.mark.parametrize(
    "around",
    [
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    ],
    ids=["rank 0", "rank 1", "a task of srun"],
)
def test_a_sweep_is_started_once_and_not_by_every_rank(
    around: dict[str, str], tmp_path: Path
) -> None:
    code, out, err = finish(start(tmp_path, "-m", "seed=0,1", **around))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {next(iter(around))}=2: ")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_point_keeps_every_job_from_starting(tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, "-m", "seed=0,1,-1"))
    assert (code, out) == (2, "")
    assert "seed=-1: must be >= 0 [point seed=-1]" in err
    assert list(tmp_path.iterdir()) == []

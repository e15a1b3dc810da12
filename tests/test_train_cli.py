"""The program's door: one screen, exit 2, nothing written, nothing heavy imported."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from program import ROOT, attempts, finish, start

from mediphi.door import enter, forced, one_line_errors
from mediphi.errors import DataError, Interrupted, MachineError

HEAVY = {"torch", "transformers", "lightning", "datasets", "numpy", "wandb", "rich"}
SCREEN = 24


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "modules")


def imported(folder: Path) -> set[str]:
    return {name.split(".")[0] for name in (folder / "modules").read_text().splitlines()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["stage=pitt", "seed=-1"],
        ["stage.phase2.lrr=1", "hardware.micro_batch=3"],
        ["seed=[1"],
        ["--config-name", "nowhere"],
        ["--config-dir", "nowhere", "--config-name", "pit_lr"],
        ["-m", "seed=0,-1", "stage.phase1.lr=1,x"],
        ["seed=0,1"],
        ["WANDB_API_KEY=canary", "logger.entity=me"],
    ],
    ids=" ".join,
)
def test_a_bad_command_is_one_screen_and_exit_2(arguments: list[str], tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, *arguments, LIST_MODULES="modules"))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= SCREEN
    assert "Traceback" not in err
    assert "canary" not in err
    assert files(tmp_path) == []
    assert not imported(tmp_path) & HEAVY


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "python train.py stage=pit corpus=medcode"),
        (["--cfg", "job"], "phase1:"),
        (["-sc", "query=bash"], "stage="),
    ],
    ids=["help", "cfg", "completion"],
)
def test_looking_imports_nothing_heavy(arguments: list[str], expected: str, tmp_path: Path) -> None:
    look = start(tmp_path, *arguments, LIST_MODULES="modules", COMP_LINE="python train.py sta")
    code, out, err = finish(look)
    assert (code, err) == (0, "")
    assert expected in out
    assert files(tmp_path) == []
    assert not imported(tmp_path) & (HEAVY | {"pydantic"})


def test_help_names_every_group_and_fits_two_screens(tmp_path: Path) -> None:
    _, out, _ = finish(start(tmp_path, "--help"))
    for group in ("stage", "corpus", "model", "hardware", "logger", "experiment"):
        assert f"\n{group}: " in out
    assert len(out.splitlines()) <= 2 * SCREEN


def test_a_good_command_runs_once_and_writes_where_the_config_says(tmp_path: Path) -> None:
    for _ in range(2):
        code, _, err = finish(start(tmp_path, "seed=3"))
        assert (code, err) == (0, "")
    assert attempts(tmp_path) == ["3 None", "3 None"]
    (run,) = (tmp_path / "runs" / "pit").iterdir()
    assert (run / "manifest.json").exists()
    assert files(tmp_path) == ["attempts", "runs"]


def test_a_signal_ends_with_the_stages_code(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    process = start(tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, err) == (143, "")


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "--help")
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 120, 141)
    assert "Traceback" not in err


def test_a_read_only_folder_and_no_home_do_not_matter_to_looking(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    here.chmod(0o555)
    code, out, err = finish(start(here, "--cfg", "job", HOME="", LANG="C"))
    here.chmod(0o755)
    assert (code, err) == (0, "")
    assert "seed: 0" in out


STRIKE = """
import os, signal, sys
class Strike:
    def find_spec(self, name, *_):
        if name == os.environ["STRIKE"]:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Strike())
"""


@pytest.mark.parametrize("module", ["hydra", "mediphi.config.load", "mediphi.run"])
def test_ctrl_c_during_imports_ends_at_once_and_without_a_traceback(
    module: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    path = f"{tmp_path}{os.pathsep}{ROOT / 'src'}"
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "check_only=true"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "STRIKE": module},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_background_job_stays_deaf_to_ctrl_c(tmp_path: Path) -> None:
    """A shell starts `train.py &` with SIGINT ignored; that is not ours to change."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    path = f"{tmp_path}{os.pathsep}{ROOT / 'src'}"
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        env=os.environ | {"PYTHONPATH": path, "STRIKE": "hydra"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# What train.py sets before torch loads.

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRODUCTS = """
import json, os, runpy, sys
runpy.run_path(sys.argv[1])
print(json.dumps({name: os.environ.get(name) for name in sys.argv[2:]}), "torch" in sys.modules)
import torch
if torch.backends.mkldnn.is_available():
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    for length in [*range(10, 110), 10]:
        print("length", length, flush=True)
        torch.ones(length, 64, dtype=torch.bfloat16) @ weight
"""


def products(**chosen: str) -> subprocess.Popen[str]:
    """Products of 100 lengths and the first of them once more, told by oneDNN itself."""
    kept = {k: v for k, v in os.environ.items() if k not in CACHES}
    return subprocess.Popen(
        [sys.executable, "-c", PRODUCTS, str(ROOT / "train.py"), *CACHES],
        env=kept | {"ONEDNN_VERBOSE": "2", "PYTHONPATH": str(ROOT / "src")} | chosen,
        text=True,
        stdout=subprocess.PIPE,
    )


def test_kernel_caches_are_held_small_unless_the_user_says_otherwise() -> None:
    both = products(), products(**dict.fromkeys(CACHES, "1024"))
    ours, theirs = (finish(process)[1].splitlines() for process in both)
    assert ours[0] == f"{json.dumps(dict.fromkeys(CACHES, '64'))} False"
    assert theirs[0] == f"{json.dumps(dict.fromkeys(CACHES, '1024'))} False"
    if not any("create:cache_miss" in line for line in ours):
        pytest.skip("this CPU multiplies bfloat16 without oneDNN")
    last = [line for line in ours if ",create:" in line][-1]
    assert "create:cache_miss" in last  # forgotten, and compiled anew
    last = [line for line in theirs if ",create:" in line][-1]
    assert "create:cache_hit" in last


# In this process: what a stage's end becomes.


def exit_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    def task(cfg: object) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        one_line_errors(task)(SimpleNamespace())
    return caught.value.code, capsys.readouterr().err


def test_a_user_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(DataError("a:1: bad"), capsys) == (2, "error: a:1: bad\n")
    assert exit_of(MachineError("disk full"), capsys) == (1, "error: disk full\n")


def test_a_full_disk_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")
    assert exit_of(full, capsys) == (1, "error: runs/x: No space left on device\n")


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = exit_of(ZeroDivisionError("here"), capsys)
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: here" in err


def test_signals_keep_their_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(Interrupted(143), capsys) == (143, "")
    assert exit_of(KeyboardInterrupt(), capsys) == (130, "")


@pytest.mark.parametrize(
    "argument",
    [
        "logger.api_key=canary",
        "+hub_token=canary",
        "++a.b.password=canary",
        "MY_SECRET=canary",
        "x.HF_TOKEN=canary",
        "--token=canary",
        "+x={api_key: canary}",
        "+x={a: {b: {'hf_token' : canary}}}",
        '+x={"wandb_key": canary}',
        "+x=[{password:canary}]",
        "+x={private_key: canary",
        "+x=dict(secret=canary)",
        "logger={api-key: canary}",
        "logger.api_key =canary",
        "api_key:canary",
        "{api_key: canary}",
        "logger.project=wandb_api_key=canary",
        "+x.api_key@y=canary",
        "--config-name=api_key=canary",
    ],
)
def test_a_secret_on_the_command_line_is_refused_unseen(
    argument: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", argument])
    with pytest.raises(SystemExit) as caught:
        enter(lambda: pytest.fail("went on"))
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "canary" not in told
    assert re.split(r"[={:\s]", argument)[0] in told
    assert "environment" in told


@pytest.mark.parametrize(
    "argument",
    [
        "hardware.loss_chunk_tokens=8",
        "corpus.sources.mine.path=keys/tokens.jsonl",
        "logger.tags=[secretary,monkeys]",
        "+corpus.sources.a={kind: jsonl, id_field: key}",
    ],
)
def test_a_word_that_only_looks_like_a_secret_s_name_passes(
    argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", argument])
    entered: list[str] = []
    enter(lambda: entered.append(argument))
    assert entered == [argument]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("stage.phase1.lr=1", "++stage.phase1.lr=1"),
        ("stage=pit", "stage=pit"),
        ("seed=1", "seed=1"),
        ("+a.b=1", "+a.b=1"),
        ("~a.b", "~a.b"),
        ("hydra.sweeper.jobs=2", "hydra.sweeper.jobs=2"),
        ("--config-name", "--config-name"),
        ("hardware.loss_chunk_tokens=8", "++hardware.loss_chunk_tokens=8"),
    ],
)
def test_only_plain_dotted_keys_are_forced(argument: str, expected: str) -> None:
    assert forced(argument) == expected

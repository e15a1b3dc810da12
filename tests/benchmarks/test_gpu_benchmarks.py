"""The GPU benchmarks hold their own claims at a toy size on a CPU; time is nobody's claim here."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"

Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script of the folder, as it imports its neighbours; their names are free again."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(FOLDER.parent)):
            del sys.modules[name]


def options(load: Load, **changes: Any) -> Any:
    measuring = load("measuring")
    toy = measuring.Options(True, str(measuring.sides.TINY), 1.0, 2, ())
    return toy._replace(**changes)


def columns(results: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the README will show of every line that tells no failure."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("results_table")
    return set(module.COLUMNS[Path(results).stem].split()) - {"failure"}


@pytest.mark.parametrize(
    ("script", "sides"),
    [
        ("loss", {"ours, 512 positions", "torch, full logits"}),
        ("attention", {"sdpa", "masked", "prompts twice"}),
        ("generation", {"ours", "generate, arrival order"}),
    ],
)
def test_a_toy_run_proves_parity_and_gives_a_line_per_side(
    load: Load, script: str, sides: set[str], monkeypatch: pytest.MonkeyPatch
):
    module = load(script)
    lines = list(module.figures(options(load)))
    assert {line["side"] for line in lines} == sides
    shown = columns(module.RESULTS, monkeypatch)
    assert all(shown <= line.keys() for line in lines)
    for line in lines:
        assert line["figure"] and line["wall_ratio"] > 0 and "failure" not in line
        assert "parity" in line or line["same_answers"] == 1.0
    assert json.loads(json.dumps(lines)) == lines


def test_a_wrong_kernel_is_no_figure(load: Load, monkeypatch: pytest.MonkeyPatch):
    """The control: without its boundaries every document sees the ones before it."""
    attention = load("attention")
    monkeypatch.setattr(
        attention,
        "kernel_side",
        lambda row, kernel: (
            lambda q, k, v: attention.F.scaled_dot_product_attention(
                q, k, v, is_causal=True
            ).transpose(1, 2)
        ),
    )
    with pytest.raises(AssertionError, match="sdpa on documents of equal length: off by"):
        list(attention.figures(options(load)))


@pytest.mark.parametrize("side", ["ours", "transformers"])
def test_a_training_side_computes_the_loss_of_documents_one_by_one(
    load: Load, side: str, tmp_path: Path
):
    train_sides, sizes = load("train_sides"), options(load)
    (task,) = load("train_step").tasks(sizes).values()
    meters = [load("measuring").DeviceMeter(what) for what in ("parity", "time")]
    for meter in meters:
        train_sides.make(task, side, tmp_path / meter.what)(meter)
    parity, timed = meters
    assert sum(parity.losses) == pytest.approx(train_sides.one_by_one(task), abs=1e-4)
    assert timed.steps == task.steps - task.warmup_steps == 1 and timed.wall > 0
    assert 0 < timed.tokens < sum(map(len, task.documents))
    assert (timed.positions > timed.tokens) == (side == "transformers")
    assert load("train_step").floor_flops(task) > 6e6  # the tiny model's matrices, per token


def test_our_dpo_side_computes_the_loss_of_pairs_one_by_one(load: Load, tmp_path: Path):
    dpo_sides, sizes = load("dpo_sides"), options(load)
    task = load("dpo_step").make_task(sizes)
    meter = load("measuring").DeviceMeter("parity")
    dpo_sides.make(task, "ours", tmp_path)(meter)
    expected = dpo_sides.one_by_one(task)
    assert sum(meter.losses) == pytest.approx(expected, abs=1e-4) and abs(expected - 0.693) > 2e-3
    assert meter.pairs == len(task.documents) // task.steps and meter.reference.wall > 0


def test_lines_replace_older_ones_of_the_same_name_only(load: Load, tmp_path: Path):
    measuring, path = load("measuring"), tmp_path / "gpu.jsonl"

    def line(side: str, ms: int) -> dict[str, Any]:
        return {"figure": "loss", "data": "d", "side": side, "device": "H200", "ms": ms}

    measuring._keep([line("ours", 1), line("torch", 2)], path)
    measuring._keep([line("ours", 3)], path)
    kept = [json.loads(row) for row in path.read_text().splitlines()]
    assert kept == [line("torch", 2), line("ours", 3)]


def test_without_a_gpu_only_a_toy_run_starts():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/loss.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "only --toy runs here" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_step", "dpo_step"])
def test_a_toy_run_of_processes_holds_parity_with_trl(script: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, f"benchmarks/gpu/{script}.py", "--toy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"ours"} < {line["side"] for line in lines}
    shown = columns(f"gpu_{script}.jsonl", monkeypatch)
    assert all(shown <= line.keys() for line in lines)
    for line in lines:
        assert "failure" not in line and line["runs"] == 1 and line["loss_off"] < 1e-4
        assert line["timed_steps"] == 1 and line["mfu"] > 0

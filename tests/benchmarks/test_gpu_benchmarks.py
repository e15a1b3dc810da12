"""The GPU benchmarks hold their own claims at a toy size on a CPU; time is nobody's claim here."""

import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
    toy = measuring.Options(True, str(measuring.sides.TINY), measuring.Deadline(540), 2, ())
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


@pytest.mark.parametrize("name", ["generate, arrival order", "ours"])
def test_answers_from_attention_to_padding_are_no_figure(
    load: Load, name: str, monkeypatch: pytest.MonkeyPatch
):
    """The control, on any device: a peer's is its failure; ours ends the run."""
    generation = load("generation")

    def padded(model: Any, tokenizer: Any, asked: Any) -> list[str]:
        longest = max(map(len, asked.prompts))
        rows = [[3] * (longest - len(ids)) + ids for ids in asked.prompts]
        return generation.in_arrival_order(model, tokenizer, asked._replace(prompts=rows))

    monkeypatch.setitem(generation.SIDES, name, padded)
    lines = generation.figures(options(load))
    if name == "ours":
        with pytest.raises(ValueError, match="answers in float32 differ"):
            list(lines)
        return
    first, last = lines
    assert first["side"] == "ours" and first["wall_ratio"] == 1.0
    assert last["side"] == name and "wall_ratio" not in last
    assert "answers in float32 differ" in last["failure"]


def test_a_peer_without_a_model_is_a_failure_of_its_own(
    load: Load, monkeypatch: pytest.MonkeyPatch
):
    generation, peer = load("generation"), "generate, arrival order"
    build, names = generation.measuring.random_model, iter(generation.SIDES)

    def fails_for_peers(folder: str) -> Any:
        if next(names) == "ours":
            return build(folder)
        raise RuntimeError("no such attention")

    monkeypatch.setattr(generation.measuring, "random_model", fails_for_peers)
    first, last = generation.figures(options(load))
    assert first["side"] == "ours" and "failure" not in first
    assert last["side"] == peer and last["failure"] == "RuntimeError: no such attention"


COMPILED = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])
    for name in ("ours, compiled", "ours, compiled for any length")
]
"""By the C++ compiler; torch's compiler warns, and hides it by itself."""


@pytest.mark.parametrize("side", ["ours", "transformers", *COMPILED])
def test_a_training_side_computes_the_loss_of_documents_one_by_one(
    load: Load, side: str, tmp_path: Path
):
    train_sides, sizes = load("train_sides"), options(load)
    (task,) = load("train_step").tasks(sizes).values()
    meters = [load("measuring").DeviceMeter(what) for what in ("parity", "time")]
    for meter in meters:
        train_sides.make(task, side, tmp_path / meter.what)(meter)
    parity, timed = meters
    offs = train_sides.judge(parity, train_sides.reference(task), precision=task.precision)
    assert offs["loss_off"] < 1e-4 and offs["grad_off"] < 1e-3
    assert timed.gradient is None
    assert timed.steps == task.steps - task.warmup_steps == 1 and timed.wall > 0
    assert 0 < timed.tokens < sum(map(len, task.documents))
    assert (timed.positions > timed.tokens) == (side in ("transformers", "ours, compiled"))
    assert load("train_step").floor_flops(task) > 6e6  # the tiny model's matrices, per token


def parity_run(train_sides: Any, task: Any, folder: Path) -> Any:
    meter = train_sides.DeviceMeter("parity")
    train_sides.make(task, "ours", folder)(meter)
    return meter


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_rows_without_boundaries_are_no_figure(
    load: Load, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The control: the mean loss alone could not tell them from bfloat16's rounding."""
    from mediphi import attention

    load("measuring")
    (task,) = load("train_step").tasks(options(load)).values()
    train_sides = load("train_sides")
    task = task._replace(precision=precision)
    known = train_sides.reference(task)
    honest = parity_run(train_sides, task, tmp_path / "apart")
    offs = train_sides.judge(honest, known, precision=precision)
    assert (offs["grad_off"] > 1e-3) == (precision == "bf16-mixed")

    boundaries, places = attention.boundaries, torch.arange(10**4)[None]

    def leak(batch: Any, kernel: Any) -> Any:
        batch.position_ids.copy_(places[:, : batch.num_tokens])
        return boundaries(replace(batch, lengths=(batch.num_tokens,)), kernel)

    monkeypatch.setattr(attention, "boundaries", leak)
    monkeypatch.setitem(train_sides.OFF, precision, 1.0)  # the gradient alone has to see it
    leaking = parity_run(train_sides, task, tmp_path / "leaking")
    with pytest.raises(SystemExit, match=r"gradient .* of its norm off"):
        train_sides.judge(leaking, known, precision=precision)
    off = train_sides.measuring.distance(leaking.gradient, known["gradient"])
    assert off > 5 * offs["grad_off_allowed"]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_every_kind_of_data_makes_the_steps_of_its_task(load: Load, rows: int, tmp_path: Path):
    measuring, tasks = load("measuring"), load("train_step").tasks
    train_sides, dpo_sides = load("train_sides"), load("dpo_sides")
    asked = options(load, toy=False, folder=str(measuring.PHI), rows=rows)
    for number, task in enumerate(tasks(asked).values()):
        for own in (task, task.first_step):
            data = train_sides.packed_data(own, tmp_path / f"{number}-{own.steps}")
            plan = data.train_plan
            assert plan.num_steps == own.steps and data.settings.micro_batch == rows
            used, there = plan.num_tokens, sum(map(len, own.documents))
            assert used > 0.8 * there if own.steps > 1 else used == there
    task = load("dpo_step").make_task(asked)
    for own in (task, task.first_step):
        data = dpo_sides.packed_pairs(own, tmp_path / f"pairs-{own.steps}")
        assert data.train_plan.num_steps == own.steps


def test_more_rows_a_pass_than_there_are_for_a_step_are_refused(load: Load):
    load("measuring")
    passes_per_step = load("fitting").passes_per_step
    for rows, size, steps in itertools.product(range(1, 70), (1, 2, 4, 8), (1, 2, 5)):
        if steps > 1 and rows <= (steps - 1) * size:
            with pytest.raises(SystemExit, match=f"--rows {size}: {steps} optimizer steps"):
                passes_per_step(rows, size=size, steps=steps)
        else:
            passes = passes_per_step(rows, size=size, steps=steps)
            assert -(-rows // (passes * size)) >= steps
            left_over = rows - passes * size * steps
            assert left_over < steps * size  # less than a pass of each step


def test_our_dpo_side_computes_the_loss_of_pairs_one_by_one(load: Load, tmp_path: Path):
    dpo_sides, sizes = load("dpo_sides"), options(load)
    task = load("dpo_step").make_task(sizes)
    meter = load("measuring").DeviceMeter("parity")
    dpo_sides.make(task, "ours", tmp_path)(meter)
    expected = dpo_sides.one_by_one(task)
    assert sum(meter.losses) == pytest.approx(expected, abs=1e-4) and abs(expected - 0.693) > 2e-3
    assert meter.pairs == len(task.documents) // task.steps and meter.reference.wall > 0


@pytest.mark.parametrize("script", ["loss", "attention", "generation", "planner_memory"])
def test_sides_that_the_deadline_leaves_no_time_for_are_told(load: Load, script: str):
    late = options(load, deadline=load("measuring").Deadline(0))
    lines = list(load(script).figures(late))
    assert len(lines) > 1
    for line in lines:
        assert line["failure"] == "left out: its turn would not have ended within 0 s"
        assert "wall_ratio" not in line and line["side"]


def test_no_turn_begins_that_would_end_after_the_deadline(
    load: Load, monkeypatch: pytest.MonkeyPatch
):
    measuring, now = load("measuring"), [0.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])

    def side(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    deadline = measuring.Deadline(100)
    calls = {"short": side(1), "long": side(20)}  # a call that warms up and one that counts
    found = measuring.in_turns(calls, toy=False, deadline=deadline, repeat=1)
    assert [len(costs) for costs in found.values()] == [3, 2] and now[0] <= 100
    assert measuring.seconds_ratio(found["long"], []) == {}


ANSWERS = """
import json, sys, time
for line in sys.stdin:
    if sys.argv[1] == "hangs" and line == "time\\n":
        time.sleep(60)
    if sys.argv[1] == "leaks" or len(sys.argv[1]) == 4 and "ours fails" in open(sys.argv[2]).read():
        raise SystemExit("no parity: gradient off")
    print(json.dumps([0.01, 0, 1, 1, 1, 1, [0.5], 0, 0, {}, 0, 0, [0, 0, 0]]), flush=True)
"""


def test_a_side_that_runs_at_the_deadline_is_killed_and_what_was_measured_counts(
    load: Load, tmp_path: Path
):
    load("measuring")  # it knows where the CPU benchmarks are
    turns, script = load("turns"), tmp_path / "answers.py"
    script.write_text(ANSWERS)
    found = turns.processes_in_turns(
        ["ours", "hangs"], str(script), [], toy=False, deadline=turns.Deadline(3)
    )
    assert len(found["ours"].runs) == 1 and found["ours"].failure is None
    assert found["hangs"].runs == [] and "within 3 s" in found["hangs"].failure
    late = turns.processes_in_turns(
        ["ours"], str(script), [], toy=False, deadline=turns.Deadline(0)
    )
    assert "left out" in late["ours"].failure


def test_a_peer_of_another_result_is_told_and_the_others_are_measured(load: Load, tmp_path: Path):
    load("measuring")
    turns, script = load("turns"), tmp_path / "answers.py"
    script.write_text(ANSWERS)
    names = ["ours", "leaks", "honest"]
    found = turns.processes_in_turns(names, str(script), [], toy=True, deadline=turns.Deadline(60))
    assert [len(found[name].runs) for name in names] == [1, 0, 1]
    assert found["leaks"].failure.endswith("no parity: gradient off\n")
    assert turns.run_ratio(found["ours"], found["leaks"], lambda run: run.wall) == {}
    turns.raise_for_ours(found)
    found = turns.processes_in_turns(
        names, str(script), ["ours fails"], toy=True, deadline=turns.Deadline(60)
    )
    assert list(found) == ["ours"]
    with pytest.raises(SystemExit, match="no parity"):
        turns.raise_for_ours(found)


@pytest.mark.parametrize("script", ["train_step", "dpo_step"])
def test_lines_of_all_sides_come_before_ours_is_raised(
    load: Load, script: str, monkeypatch: pytest.MonkeyPatch
):
    load("measuring")
    module, turns = load(script), load("turns")
    row = [0.5, 0, 9, 9, 1, 1, [0.5], 0, 0, {}, 0, 0, turns.sides.Reference(0, 0, 0)]
    found = {
        "ours": turns.Turns({"loss_off": 0.0}, [], "out of memory"),
        "trl packed": turns.Turns({"loss_off": 0.0}, [turns.sides.Run(*row)]),
        "trl default": turns.Turns(None, [], "no parity: loss 1 off"),
    }
    abouts = dict.fromkeys(found, "")
    monkeypatch.setattr(module, "ABOUT", abouts)
    monkeypatch.setattr(module, "processes_in_turns", lambda *_, **__: found)
    lines = module.figures(options(load))
    told = [next(lines) for _ in found]
    assert ["failure" in line for line in told] == [True, False, True]
    assert told[1]["loss_off"] == 0 and told[1]["mfu"] > 0 and "wall_ratio" not in told[1]
    with pytest.raises(SystemExit, match="ours: out of memory"):
        next(lines)


def test_what_was_measured_before_a_failure_is_kept(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measuring = load("measuring")
    monkeypatch.setattr(measuring, "device", lambda: "cuda")
    monkeypatch.setattr(measuring.sides, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_step.py"])

    def figures(options: Any) -> Iterator[dict[str, Any]]:
        yield {"figure": "step", "side": "ours"}
        raise SystemExit("ours: no parity")

    with pytest.raises(SystemExit, match="no parity"):
        measuring.run_benchmark(figures, doc=None, results="gpu.jsonl")
    (line,) = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert json.loads(line)["side"] == "ours"


def test_lines_replace_older_ones_of_the_same_name_only(load: Load, tmp_path: Path):
    measuring, path = load("measuring"), tmp_path / "gpu.jsonl"

    def line(side: str, ms: int) -> dict[str, Any]:
        return {"figure": "loss", "data": "d", "side": side, "device": "H200", "ms": ms}

    measuring._keep([line("ours", 1), line("torch", 2)], path)
    measuring._keep([line("ours", 3)], path)
    kept = [json.loads(row) for row in path.read_text().splitlines()]
    assert kept == [line("torch", 2), line("ours", 3)]


def test_what_was_planned_is_told_beside_what_a_run_has_taken(
    load: Load, monkeypatch: pytest.MonkeyPatch
):
    module = load("planner_memory")
    line = next(iter(module.figures(options(load, only=("LoRA",), rows=1))))
    assert line["side"] == "LoRA" and line["steps"] == module.STEPS and "failure" not in line
    assert 0.05 < line["predicted_gib"] < 2 and line["used_gib"] > 0.05
    ratio = line["predicted_gib"] / line["used_gib"]
    assert line["ratio"] == pytest.approx(ratio, rel=0.05) and 0.5 < ratio < 2
    on_a_gpu = {"allocated_gib", "reserved_gib"}
    assert columns(module.RESULTS, monkeypatch) - on_a_gpu <= line.keys()


def test_without_a_gpu_only_a_toy_run_starts():
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

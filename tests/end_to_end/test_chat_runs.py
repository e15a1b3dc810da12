"""SFT, then DPO from its model: from the command to the artifact, as a user sees them."""

import csv
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from end_to_end.tiny_chat import (
    NUM_HELDOUT,
    NUM_TRAIN,
    SHORT,
    STEPS,
    ChatRun,
    Row,
    dpo,
    instruction,
    pair,
    sft,
    write_rows,
)
from end_to_end.tiny_run import ROOT, Place, curve, files_in, one_line, weights
from pyarrow import parquet
from safetensors.torch import load_file

from mediphi.artifacts import manifest_hash, verify
from mediphi.config import load
from mediphi.config.schema import Config
from mediphi.door import forced
from mediphi.door.compose import compose, diagnose, make_loader
from mediphi.door.files import tame_hydra
from mediphi.tracking.names import WALL_CLOCK

STAGES = ("sft", "dpo")
QUICK = ["stage.phase.max_steps=4", "stage.eval_every_steps=4", "stage.phase.warmup_steps=1"]
"""Enough where what is learnt does not matter."""
TITLES = {
    "sft": "How well are held-out instructions followed?",
    "dpo": "Is the better of two held-out answers preferred?",
}


@pytest.fixture(params=STAGES)
def run(request: pytest.FixtureRequest) -> ChatRun:
    """The finished run of either stage."""
    return request.getfixturevalue(f"{request.param}_run")


def stage_of(run: ChatRun) -> str:
    return run.run_dir.parent.name


def done(place: Place, *command: str) -> Path:
    """Run a command to its end; its run directory."""
    ended = place.run(*command)
    assert ended.code == 0, ended
    return Path(ended.out.split("\ndone    ")[1].partition("  (")[0])


# --- the artifact -------------------------------------------------------------------------------


def test_an_artifact_comes_out_whole(run: ChatRun) -> None:
    manifest = verify(run.run_dir)
    assert {"report.html", "metrics.csv", "metrics.json", "README.md", "config.yaml"} <= set(
        manifest["files"]
    )
    train, heldout = manifest["data"]["counts"].values()
    assert (train["train"], train["heldout"]) == (NUM_TRAIN, 0)
    assert (heldout["train"], heldout["heldout"]) == (0, NUM_HELDOUT)
    assert not list(run.run_dir.rglob(".*partial*")) and not list(run.run_dir.rglob(".tmp-*"))
    assert [line.split()[0] for line in run.ended.err.splitlines()] == [stage_of(run)]


def test_dpo_names_the_model_of_sft_as_its_parent(sft_run: ChatRun, dpo_run: ChatRun) -> None:
    model = sft_run.run_dir / "model"
    parent = {"path": str(model), "sha256": manifest_hash(model)}
    for folder in (dpo_run.run_dir, dpo_run.run_dir / "model"):
        assert verify(folder)["parents"] == {"model": parent}
    assert verify(sft_run.run_dir)["parents"] == {}
    assert weights(dpo_run.run_dir) != weights(sft_run.run_dir)


def test_a_stranger_loads_the_model_and_it_answers(run: ChatRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run.run_dir / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = {"<|end|>", "<|assistant|>", "<|endoftext|>"}
    assert set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == stops
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which drug was begun?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert 0 < written.shape[1] - inputs["input_ids"].shape[1] <= 4


def test_the_exam_is_told_before_and_after(run: ChatRun) -> None:
    stage = stage_of(run)
    assert run.ended.out.count(TITLES[stage]) == 1
    metrics = json.loads((run.run_dir / "metrics.json").read_text())
    assert metrics["objective"]["name"] == "exam/all"
    exam = metrics["exams"]["exam"]
    assert list(exam["results"]) == ["before", f"after {stage}"]
    table = run.ended.out.split(TITLES[stage])[1].splitlines()
    assert "before" in table[1] and f"after {stage}" in table[1]
    assert len(table[3:6]) == 3 and table[5].startswith("all ")


def test_every_column_of_the_curve_is_filled(run: ChatRun) -> None:
    with (run.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    filled = {name for row in rows for name, cell in row.items() if cell}
    assert set(rows[0]) - set(WALL_CLOCK) <= filled
    assert {row["phase"] for row in rows} == {stage_of(run)}
    assert rows[-1]["step"] == str(STEPS)
    ours = {
        "sft": ("loss", "accuracy", "loss/kind/answer", "loss/task/summarization"),
        "dpo": ("margin", "kl", "reward/chosen", "margin/error/omission", "logps/rejected"),
    }[stage_of(run)]
    wanted = {f"{side}/{name}" for side in ("train", "heldout") for name in ours}
    assert wanted | {"exam/all"} <= filled


def test_samples_are_kept_before_and_at_every_evaluation_of_sft(
    sft_run: ChatRun, dpo_run: ChatRun
) -> None:
    text = (sft_run.run_dir / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and set(steps) == {0, 5, 10, STEPS}
    assert len({(row["step"], row["id"]) for row in rows}) == len(rows) == 2 * 4
    assert {row["task_type"] for row in rows} == {"summarization", "question-answering"}
    notes = {row["input"]: row["output"] for row in map(instruction, range(100, 108))}
    for row in rows:
        (note,) = [note for note in notes if note in row["prompt"]]
        assert notes[note] == row["reference"]
    assert not (dpo_run.run_dir / "samples.jsonl").exists()


def test_the_reference_pass_is_told_once(dpo_run: ChatRun) -> None:
    (told,) = [line for line in dpo_run.ended.out.splitlines() if line.startswith("reference")]
    assert f"{NUM_TRAIN + NUM_HELDOUT} pairs in " in told
    assert Path(told.rpartition(" kept in ")[2]).is_file()


def judged(command: str) -> list[Config]:
    """The configs of a command as the last line gives it, one, or those of a sweep."""
    program, *arguments = shlex.split(command)[1:]
    assert program == "train.py"
    tame_hydra()
    if arguments[0] != "--config-dir":
        return [load(compose(make_loader(ROOT / "conf"), "config", [*map(forced, arguments)]))]
    loader = make_loader(ROOT / "conf", ROOT / arguments[1])
    assert diagnose(loader, arguments[3], [*map(forced, arguments[4:])]) == []
    points = ["stage=dpo", "corpus=mediflow_dpo", *arguments[4:]]
    return [load(compose(loader, "config", [*map(forced, points)]))]


def test_the_next_command_is_a_valid_one_from_this_model(run: ChatRun, sft_run: ChatRun) -> None:
    (told,) = [line for line in run.ended.out.splitlines() if line.startswith("next ")]
    (config,) = judged(told.split(maxsplit=1)[1])
    assert config.stage.kind == "dpo"
    assert config.model.path == str(sft_run.run_dir) and config.model.is_pretrained


def test_the_same_command_again_answers_at_once(run: ChatRun, shared: Place) -> None:
    """Without PyTorch, and without touching a file."""
    before = files_in(run.run_dir)
    watched = replace(shared, starter=[sys.executable, "-X", "importtime"])
    ended = watched.program(*run.command).wait()
    assert ended.code == 0 and ended.out and run.ended.out.endswith(ended.out)
    assert files_in(run.run_dir) == before
    imported = {line.rpartition("|")[2].strip() for line in ended.err.splitlines()}
    assert "pydantic" in imported and not {"torch", "transformers", "lightning"} & imported


# --- low-rank adapters --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("export", [pytest.param("merged", marks=pytest.mark.slow), "adapter"])
def test_adapters_are_trained_and_the_next_stage_starts_from_them(export: str, near: Place) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = f"stage.lora={{rank: 4, alpha: 8, export: {export}}}"
    first = done(near, *sft(near.assets), lora, *QUICK)
    second = done(near, *dpo(near.assets, first), lora, *QUICK)
    for run_dir in (first, second):
        verify(run_dir)
        assert (run_dir / "model" / "adapter").exists() == (export == "adapter")
    before, after = (load_file(d / "model" / "model.safetensors") for d in (first, second))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("_proj" in name for name in moved)
    if export == "merged":
        return
    plain = AutoModelForCausalLM.from_pretrained(first / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, str(second / "model" / "adapter")).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor.to(after[name].dtype), after[name], rtol=0.01, atol=1e-6)


# --- the options of DPO -------------------------------------------------------------------------


def margins(run_dir: Path) -> list[float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(r["heldout/margin"]) for r in csv.DictReader(file) if r["heldout/margin"]]


def test_a_live_reference_and_separate_prompts_give_the_cached_curve(
    near: Place, dpo_run: ChatRun
) -> None:
    cached = margins(dpo_run.run_dir)
    for option in ("stage.reference=live", "stage.share_prompt=false"):
        ended = near.run(*dpo_run.command, option)
        assert ended.code == 0, ended
        assert ended.out.count("\nreference ") == (option == "stage.share_prompt=false")
    for run_dir in (near.runs / "dpo").iterdir():
        # measured: 0.02 of 0.6, bfloat16
        assert margins(run_dir) == pytest.approx(cached, abs=0.1)
        verify(run_dir)


def test_without_a_reference_nothing_is_computed_beforehand(alone: Place, dpo_run: ChatRun) -> None:
    ended = alone.run(*dpo_run.command, "stage.reference=none")
    assert ended.code == 0 and "\nreference " not in ended.out
    assert not (alone.cache / "references").exists()
    assert abs(margins(alone.run_dir("dpo"))[0] - margins(dpo_run.run_dir)[0]) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        ["stage.loss=hinge"],
        ["stage.loss=ipo", "stage.length_normalised=true"],
        ["stage.loss=robust", "stage.label_smoothing=0.1"],
        ["stage.loss=sigmoid", "stage.label_smoothing=0.1", "stage.sft_weight=0.5"],
    ],
    ids=lambda options: options[0].partition("=")[2],
)
def test_every_loss_trains_another_model(options: list[str], near: Place, dpo_run: ChatRun) -> None:
    run_dir = done(near, *dpo_run.command, *options)
    verify(run_dir)
    assert weights(run_dir) != weights(dpo_run.run_dir)
    assert margins(run_dir)[-1] > margins(run_dir)[0]


# --- files of one's own -------------------------------------------------------------------------


def messages(number: int) -> Row:
    """A conversation, every third with a second question."""
    row = instruction(number)
    turns = [("system", row["instruction"]), ("user", row["input"]), ("assistant", row["output"])]
    if number % 3 == 0:
        turns += [("user", "Is that all?"), ("assistant", f"Yes, on day {number * 7}.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def prompt_completion(number: int) -> Row:
    row = instruction(number)
    return {"prompt": f"{row['input']} {row['instruction']}", "completion": f" {row['output']}"}


def preference(number: int) -> Row:
    """An explicit prompt of messages."""
    row = pair(number)
    prompt = messages(number)["messages"][:2]
    answers = {"chosen": row["output"], "rejected": row["rejected_output"]}
    chosen = {n: [{"role": "assistant", "content": text}] for n, text in answers.items()}
    return {"prompt": prompt, **chosen}


MAKERS = {"messages": messages, "prompt_completion": prompt_completion, "preference": preference}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("messages", "parquet"),
        ("prompt_completion", "jsonl"),
        ("preference", "parquet"),
        pytest.param("messages", "jsonl", marks=pytest.mark.slow),
        pytest.param("prompt_completion", "parquet", marks=pytest.mark.slow),
        pytest.param("preference", "jsonl", marks=pytest.mark.slow),
    ],
)
def test_files_in_trl_s_formats_are_trained_on(
    layout: str, kind: str, near: Place, sft_run: ChatRun
) -> None:
    path = near.cwd / f"mine.{kind}"
    rows: list[dict[str, Any]] = [MAKERS[layout](number) for number in range(30)]
    write_rows(path, rows)
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    run_dir = done(
        near,
        "stage=dpo" if layout == "preference" else "stage=sft",
        *SHORT,
        "corpus=local",
        f"corpus.sources.mine.kind={kind}",
        f"corpus.sources.mine.path={path.name}",
        f"corpus.sources.mine.format={layout}",
        "corpus.heldout_fraction=0.2",
        "corpus.deduplicate.near=false",
        f"model.path={sft_run.run_dir}",
        *QUICK,
    )
    counts = verify(run_dir)["data"]["counts"]["mine"]
    assert counts["train"] + counts["heldout"] == 30 and counts["heldout"] > 0
    assert curve(run_dir)
    assert not (run_dir / "samples.jsonl").exists()  # corpus=local may hold health information


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_what_does_not_fit_is_dropped_and_told_or_refused(
    stage: str, near: Place, sft_run: ChatRun
) -> None:
    make, name = (instruction, "mediflow") if stage == "sft" else (pair, "mediflow_dpo")
    shutil.copytree(near.assets / name, near.folder / name)
    long = {**make(7), "input": "The patient came back. " * 60}
    write_rows(near.folder / name / "train.jsonl", [*map(make, range(20)), long])
    command = sft(near.folder) if stage == "sft" else dpo(near.folder, sft_run.run_dir)
    refused = near.run(*command, "stage.too_long=refuse")
    assert refused.code == 2, refused
    noun = "conversations" if stage == "sft" else "pairs"
    what = f"1 of 21 training {noun} exceed stage.max_length=128 tokens"
    assert f"{what}, the first is {name}/" in one_line(refused)
    assert "train:21" in one_line(refused)
    assert not near.runs.exists()
    ended = near.run(*command, *QUICK)
    assert ended.code == 0, ended
    assert f"left out    {what}\n" in ended.out
    run_dir = Path(ended.out.split("\ndone    ")[1].partition("  (")[0])
    counts = verify(run_dir)["data"]["counts"][name]
    assert (counts["train"], counts["train_too_long"], counts["heldout_too_long"]) == (21, 1, 0)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["too_long"] == {"train": 1, "heldout": 0}
    card = (run_dir / "README.md").read_text()
    assert "left out, longer than max_length" in card and " | 20 | 0 | 1 | 0 |" in card
    front = yaml.safe_load(card.split("---\n")[1])  # of random weights there is no base
    assert front.get("base_model") == {"sft": None, "dpo": [sft_run.run_dir.name]}[stage]

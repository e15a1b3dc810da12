"""What SFT and DPO refuse: one line, exit 2, and no run begins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from end_to_end.test_chat_runs import messages, preference
from end_to_end.tiny_chat import (
    DPO_STAGE,
    SHORT,
    ChatRun,
    Row,
    dpo,
    instruction,
    pair,
    sft,
    write_rows,
)
from end_to_end.tiny_run import CODES, Place, files_in, one_line

from mediphi.artifacts import publish

SECRET = "kanari-patient"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["stage=sft", *CODES], ["stage=sft reads conversations", "take corpus=mediflow"]),
        (["stage=dpo", *CODES], ["yields plain text; take corpus=mediflow_dpo"]),
        (["stage=dpo", "corpus=mediflow"], ["yields conversations; take corpus=mediflow_dpo"]),
        (["stage=sft", "corpus=mediflow_dpo"], ["preference pairs; take corpus=mediflow"]),
        (["stage=pit", "corpus=mediflow"], ["reads plain text", "take corpus=medcode"]),
        (["stage=dapt", "corpus=mediflow_dpo"], ["reads plain text", "take corpus=medcode"]),
        ([*DPO_STAGE, "stage.loss=robust"], ["stage.label_smoothing: loss=robust needs"]),
        ([*DPO_STAGE, "+stage.betta=1"], ["stage.betta=1: unknown key; did you mean stage.beta?"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_a_config_that_cannot_be_is_refused(
    command: list[str], told: list[str], near: Place
) -> None:
    ended = near.run(*command)
    assert (ended.code, ended.out) == (2, ""), ended
    heading, line = ended.err.splitlines()
    assert heading == "error: 1 problem in the config"
    assert all(words in line for words in told), line
    assert not near.runs.exists()


def refused(place: Place, *command: str) -> str:
    """The one line of a command that is refused and leaves no run directory."""
    ended = place.run(*command)
    assert ended.code == 2, ended
    assert not place.runs.exists() or not list(place.runs.glob("*/*")), list(place.runs.rglob("*"))
    assert SECRET not in ended.out + ended.err
    return one_line(ended)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_unknown_layer_for_adapters_is_named_with_those_there_are(
    stage: str, near: Place, sft_run: ChatRun, dpo_run: ChatRun
) -> None:
    command = sft_run.command if stage == "sft" else dpo_run.command
    said = refused(near, *command, "stage.lora={target_modules: [q_proj]}")
    assert "stage.lora.target_modules: q_proj: no such linear layers" in said
    assert "qkv_proj" in said and "all-linear" in said


def test_a_run_that_is_not_finished_is_no_parent(near: Place) -> None:
    parent = near.folder / "parent"
    parent.mkdir()
    (parent / "config.yaml").touch()
    said = refused(near, *dpo(near.assets, parent))
    assert f"model.path={parent}: this run is not finished" in said


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json"])
def test_a_parent_whose_files_were_changed_is_refused(
    name: str, near: Place, sft_run: ChatRun
) -> None:
    parent = Path(shutil.copytree(sft_run.run_dir, near.folder / "parent"))
    raw = bytearray((parent / name).read_bytes())
    raw[-9] ^= 1
    (parent / name).write_bytes(raw)
    assert f"{parent / name}: damaged" in refused(near, *dpo(near.assets, parent))


def test_another_parent_is_refused_by_a_finished_and_by_a_resumed_run(
    near: Place, sft_run: ChatRun
) -> None:
    parent = Path(shutil.copytree(sft_run.run_dir, near.folder / "parent"))
    command = dpo(near.assets, parent)
    assert near.run(*command).code == 0
    run_dir = near.run_dir("dpo")
    publish(parent / "model", config_hash="another", parents={}, data={}, extra={})
    publish(parent, config_hash="another", parents={}, data={}, extra={})
    before = files_in(run_dir)
    for _ in ("finished", "resumed"):
        ended = near.run(*command)
        told = f"{run_dir}: the model at {parent / 'model'} changed since this run began"
        assert ended.code == 2 and told in one_line(ended)
        (run_dir / "manifest.json").unlink(missing_ok=True)
        assert files_in(run_dir) | before == before


def test_another_plain_model_folder_is_refused_by_a_finished_and_by_a_resumed_run(
    near: Place, sft_run: ChatRun
) -> None:
    """Weights of the same shapes, in files of the same size."""
    parent = Path(shutil.copytree(sft_run.run_dir / "model", near.folder / "plain"))
    (parent / "manifest.json").unlink()
    command = dpo(near.assets, parent)
    first = near.run(*command)
    assert first.code == 0
    again = near.run(*command)
    assert again.code == 0 and first.out.endswith(again.out), again  # control
    run_dir, weights = near.run_dir("dpo"), parent / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2:] = b"\0\0"
    weights.write_bytes(raw)
    for _ in ("finished", "resumed"):
        ended = near.run(*command)
        told = f"{run_dir}: the model at {parent} changed since this run began"
        assert ended.code == 2 and told in one_line(ended)
        (run_dir / "manifest.json").unlink(missing_ok=True)


def test_a_finished_run_stands_without_its_parent(near: Place, sft_run: ChatRun) -> None:
    parent = Path(shutil.copytree(sft_run.run_dir, near.folder / "parent"))
    command = dpo(near.assets, parent)
    first = near.run(*command)
    (parent / "model" / "manifest.json").unlink()
    (parent / "manifest.json").unlink()
    for _ in ("no manifest", "gone"):
        again = near.run(*command)
        assert again.code == 0 and first.out.endswith(again.out), again
        shutil.rmtree(parent, ignore_errors=True)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_foreign_chat_template_is_refused(stage: str, near: Place, sft_run: ChatRun) -> None:
    model = Path(shutil.copytree(sft_run.run_dir / "model", near.folder / "foreign"))
    (model / "manifest.json").unlink()
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|user|>Patient: "))
    command = dpo(near.assets, model) if stage == "dpo" else sft(near.assets)
    said = refused(near, *command, f"model.path={model}")  # though the rows' tokens are cached
    assert "chat template gives other tokens than Phi-3.5's" in said


def test_a_damaged_file_of_references_is_named_and_the_advice_works(
    alone: Place, dpo_run: ChatRun
) -> None:
    assert alone.run(*dpo_run.command, "stage.beta=0.2").code == 0
    shutil.rmtree(alone.runs)
    (kept,) = (alone.cache / "references").glob("*.bin")
    raw = kept.read_bytes()
    for damaged in (raw[:-1], raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], b""):
        kept.write_bytes(damaged)
        said = refused(alone, *dpo_run.command)
        assert f"{kept}: damaged reference log-probabilities; delete it" in said
        assert kept.read_bytes() == damaged
    kept.unlink()
    assert alone.run(*dpo_run.command).code == 0
    assert kept.read_bytes() == raw
    ours, theirs = (files_in(d / "model") for d in (alone.run_dir("dpo"), dpo_run.run_dir))
    assert ours["model.safetensors"] == theirs["model.safetensors"]


# --- rows ---------------------------------------------------------------------------------------


def no_answer(number: int) -> Row:
    return {"messages": messages(number)["messages"][:2]}


def no_output(number: int) -> Row:
    row = instruction(number)
    del row["output"]
    return row


def equal_answers(number: int) -> Row:
    row = pair(number)
    return {**row, "rejected_output": f" {row['output']}\n"}


def equal_messages(number: int) -> Row:
    row = preference(number)
    return {**row, "rejected": row["chosen"]}


@pytest.mark.parametrize(
    ("layout", "make", "bad", "told"),
    [
        ("messages", messages, no_answer, "must end with a message of the assistant"),
        ("mediflow", instruction, no_output, "field 'output' is missing"),
        ("mediflow_dpo", pair, equal_answers, "the chosen and the rejected answer are the same"),
        ("preference", preference, equal_messages, "chosen and the rejected answer are the same"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    layout: str,
    make: Callable[[int], Row],
    bad: Callable[[int], Row],
    told: str,
    near: Place,
) -> None:
    rows = [*map(make, range(6)), bad(6), *map(make, range(7, 20))]
    text = json.dumps(rows[6]).replace("mg was begun", f"mg was begun by {SECRET}")
    path = write_rows(near.cwd / "mine.jsonl", rows)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], text, *lines[7:]]) + "\n")
    is_pair = layout in ("preference", "mediflow_dpo")
    stage = ["stage=dpo" if is_pair else "stage=sft", *SHORT, "corpus=local"]
    source = ["corpus.sources.mine.path=mine.jsonl", f"corpus.sources.mine.format={layout}"]
    said = refused(near, *stage, *source, "corpus.deduplicate.near=false")
    assert "mine.jsonl:7: " in said and told in said


def test_nothing_that_fits_is_told_with_the_shortest(near: Place) -> None:
    said = refused(near, *sft(near.assets), "stage.max_length=16")
    assert "corpus 'mediflow': no training conversation fits into stage.max_length=16" in said
    assert "the shortest has " in said and str(near.runs.parent) not in said

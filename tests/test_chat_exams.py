"""Exams of SFT and DPO: what a score is made of, and which items have one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import write_small_folder
from small_runs import first_backbone, set_up, write_rows
from small_training import ERRORS, random_pairs, spec_of
from transformers import PreTrainedTokenizerFast

from mediphi import training
from mediphi.backbone import build_model, load_tokenizer
from mediphi.chat_exams import PreferenceAccuracy, TaskScores, prompt_clusters
from mediphi.data.corpora import read_documents
from mediphi.data.heldout_prompts import HeldoutPrompt
from mediphi.data.tokens import TokenStore
from mediphi.engine import Device
from mediphi.evaluate.scores import summarise
from mediphi.evaluate.text_scores import rouge_1
from mediphi.generation import stop_ids
from mediphi.phases import Training

CPU = Device(type="cpu", name="test", precision="32-true", kernel="sdpa")
NOBODY: Any = None
"""A backbone that nobody builds: log-probabilities are given."""


# --- preferences


SIZES = [(3, 2, 4)] * 4 + [(3, 10, 1), (9, 9, 9)]
NEW = np.array(
    [[-5, -9], [-9, -5], [-7, -7], [-4, -8], [-10, -2], [np.nan, np.nan]], dtype=np.float32
)
OLD = np.array(
    [[-5, -8], [-8, -5], [-7, -7], [-2, -6], [-14, -3], [np.nan, np.nan]], dtype=np.float32
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return random_pairs(tmp_path_factory.mktemp("pairs"), SIZES)


def scores(store: TokenStore, reference: np.ndarray | None, **changes: bool) -> dict[str, float]:
    exam = PreferenceAccuracy(
        store=store,
        logps=lambda backbone: NEW,
        reference=lambda: reference,
        tokens=np.array([sizes[1:] for sizes in SIZES]),
        length_normalised=changes.get("length_normalised", False),
    )
    scored = exam.sit(NOBODY)
    assert {one.chance for one in scored} == {0.5}
    for one in scored:  # the rule's score, of a tie one half
        _, chosen, rejected = SIZES[int(one.id[-1])]
        assert one.baseline == (0.5 if chosen == rejected else float(chosen < rejected))
    assert {one.group for one in scored} <= set(exam.groups) == set(ERRORS)
    return {one.id: one.score for one in scored}


def test_the_larger_gain_over_the_reference_is_preferred_and_a_tie_is_one_half(store: TokenStore):
    """Gains 0/-1, -1/0, 0/0, -2/-2, 4/1; the last pair has no numbers and no score."""
    expected = {"a/0": 1.0, "a/1": 0.0, "a/2": 0.5, "a/3": 0.5, "a/4": 1.0}
    assert scores(store, OLD) == expected


def test_length_normalised_gains_are_per_token(store: TokenStore):
    """-2/2 tokens against -2/4 and 4/10 against 1/1: the other one of both now."""
    changed = {"a/3": 0.0, "a/4": 0.0}
    assert scores(store, OLD, length_normalised=True) == {**scores(store, OLD), **changed}


def test_without_a_reference_the_likelier_answer_is_preferred(store: TokenStore):
    expected = {"a/0": 1.0, "a/1": 0.0, "a/2": 0.5, "a/3": 1.0, "a/4": 0.0}
    assert scores(store, None) == expected


def test_groups_are_types_of_error_and_their_items_lie_together(store: TokenStore):
    exam = PreferenceAccuracy(
        store=store,
        logps=lambda backbone: NEW,
        reference=lambda: OLD,
        tokens=np.ones((len(SIZES), 2), dtype=np.int64),
        length_normalised=False,
    )
    results = summarise(exam.sit(NOBODY), overall=exam.overall)
    assert [(one.group, one.num_items) for one in results] == [
        ("brevity", 2),
        ("spelling errors", 3),
        ("all", 5),
    ]
    assert results[0].score == 0.25 and results[1].score == pytest.approx(2.5 / 3)


# --- instructions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small", initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(folder))


def prompt(number: int, task: str, reference: str) -> HeldoutPrompt:
    return HeldoutPrompt(f"a/{number}", "a", task, [300 + number, 400, 500 + number], reference)


def greedy(folder: Path, tokenizer: PreTrainedTokenizerFast, ids: list[int], *, new: int) -> str:
    """Token by token, the whole text every time."""
    import torch

    model: Any = build_model(spec_of(folder)).eval()
    model.set_attn_implementation("eager")
    text = list(ids)
    for _ in range(new):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if text[-1] in stop_ids(model, tokenizer):
            break
    return tokenizer.decode(text[len(ids) :], skip_special_tokens=True)


def test_answers_are_scored_by_the_metric_of_their_task(
    folder: Path, tokenizer: PreTrainedTokenizerFast
):
    """A model that gives the reference itself scores 1; half of it, ROUGE's share."""
    said = [greedy(folder, tokenizer, prompt(n, "", "").prompt_ids, new=9) for n in range(5)]
    assert all(len(text) > 10 for text in said) and len(set(said)) == 5
    prompts = [
        prompt(0, "summarization", said[0]),
        prompt(1, "summarization", said[1] + " and some more words of the reference"),
        prompt(2, "classification", said[2]),
        prompt(3, "classification", said[3] + " not"),
        prompt(4, "", '["fever", "cough"]'),
    ]
    exam = TaskScores(tokenizer, prompts, 9, CPU)
    scored = exam.sit(spec_of(folder))
    share = rouge_1(said[1], prompts[1].reference)
    assert [one.score for one in scored] == [1.0, share, 1.0, 0.0, 0.0] and 0 < share < 1
    assert [one.id for one in scored] == [own.id for own in prompts]
    assert [one.group for one in scored] == ["summarization"] * 2 + ["classification"] * 2 + [
        "other"
    ]
    assert exam.groups == ("summarization", "classification", "other")
    assert all(one.chance is None for one in scored)
    assert exam.sit(spec_of(folder)) == scored


def test_answers_end_after_max_new_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast):
    nine = prompt(0, "summarization", "")
    nine = nine._replace(reference=greedy(folder, tokenizer, nine.prompt_ids, new=9))
    results = [TaskScores(tokenizer, [nine], new, CPU).sit(spec_of(folder)) for new in (9, 3)]
    assert results[0][0].score == 1.0 > results[1][0].score


# --- clusters


def set_up_with_kin(folder: Path, stage: str, *, model: Path) -> Training:
    """Three held-out rows about each of five texts: other worse answers, or other instructions."""
    path = write_rows(folder / f"{stage}_heldout.jsonl", stage, count=12, start=3)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kin = {"dpo": "rejected_output", "sft": "instruction"}[stage]
    with_text = [row for row in rows if row["input"].strip()][:5]
    more = [{**row, kin: f"{row[kin]} {word}"} for row in with_text for word in ("Now.", "Why?")]
    lines = [json.dumps(row) + "\n" for row in (*rows, *more)]
    path.write_text("".join(lines), encoding="utf-8")
    return set_up(folder, stage, model=model)


def group_ids(run: Training, folder: Path) -> dict[str, str]:
    """What the records themselves say, by id."""
    corpus = run.config.corpus
    with read_documents(corpus, quarantine=folder / "bad.txt", spool_folder=folder) as reading:
        return {record.id: record.group_id for record in reading.records("heldout")}


def partition(names: dict[str, str]) -> set[frozenset[str]]:
    """Which ids share a name."""
    return {frozenset(i for i, own in names.items() if own == name) for name in names.values()}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_clusters_of_rows_are_their_records_groups(tmp_path: Path, folder: Path, stage: str):
    run = set_up_with_kin(tmp_path, stage, model=folder)
    groups, store = group_ids(run, tmp_path), run.data.heldout
    found = {store.document_id(row): own for row, own in prompt_clusters(store).items()}
    assert partition(found) == partition(groups)
    assert {len(own) for own in partition(groups)} >= {1, 3}
    exams = training._exams(run)
    assert len(exams) == (2 if stage == "sft" else 1)
    for exam in exams:
        scored = exam.sit(first_backbone(run))
        assert len(scored) > 12
        assert {one.id: one.cluster for one in scored} == {one.id: found[one.id] for one in scored}


def test_without_task_scores_the_loss_of_held_out_answers_stays(tmp_path: Path, folder: Path):
    run = set_up(tmp_path, "sft", "stage.exam=null", model=folder)
    assert [exam.metric for exam in training._exams(run)] == ["loss"]


def test_the_loss_of_answers_is_one_number_whether_or_not_prompts_are_trained_on(
    tmp_path: Path, folder: Path
):
    scored = []
    for learnt in ("false", "true"):
        options = ("stage.exam=null", f"stage.train_on_prompt={learnt}")
        run = set_up(tmp_path, "sft", *options, model=folder)
        (exam,) = training._exams(run)
        scored.append(exam.sit(first_backbone(run)))
    assert len(scored[0]) > 5 and scored[0] == scored[1]


def test_prompts_out_of_reach_are_told_in_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    run = set_up(tmp_path, "sft", "stage.exam.max_new_tokens=600", model=folder)
    capsys.readouterr()
    full, _ = training._exams(run)
    assert "not asked" not in capsys.readouterr().out
    run = set_up(tmp_path, "sft", "stage.exam.max_new_tokens=8", model=folder)
    capsys.readouterr()
    few, _ = training._exams(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert "stage.exam.max_new_tokens=8: " in line and "(left out of the exam)" in line
    assert set(few.groups) < set(full.groups)
    for group in set(full.groups) - set(few.groups):
        assert f" {group} (left out of the exam)" in line
    run = set_up(tmp_path, "sft", "stage.exam.max_new_tokens=1", model=folder)
    assert [exam.metric for exam in training._exams(run)] == ["loss"]


def test_a_cluster_is_a_digest_that_names_neither_row_nor_text(store: TokenStore):
    clusters = prompt_clusters(store)
    assert sorted(clusters) == list(range(len(SIZES))) and len(set(clusters.values())) == len(SIZES)
    assert all(len(name) == 16 and int(name, 16) for name in clusters.values())

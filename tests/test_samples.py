"""Samples: answers to be read, which change nothing of the training that they show."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from small_models import write_small_folder
from small_runs import set_up, set_up_bundled
from small_training import CPU, differs, fit

from mediphi import phases
from mediphi.data.heldout_prompts import HeldoutPrompt, heldout_prompts
from mediphi.generation import answer
from mediphi.phases import Training
from mediphi.samples import GreedySamples
from scripts.build_mediflow.families.consumer_questions import SHORT_QUESTION


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough to say something."""
    return write_small_folder(tmp_path_factory.mktemp("model") / "small", initializer_range=0.3)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return set_up(tmp_path_factory.mktemp("runs"), "sft", model=folder)


def drawn(run: Training, *, per_task: int = 1) -> list[HeldoutPrompt]:
    return heldout_prompts(
        run.data.heldout, run.tokenizer, per_task=per_task, max_prompt_tokens=512, seed=0
    )


def sampling(run: Training, path: Path) -> GreedySamples:
    options: Any = {"tokenizer": run.tokenizer, "max_new_tokens": 8, "device": CPU}
    return GreedySamples(path, prompts=drawn(run)[:3], **options)


def fit_run(run: Training, folder: Path, *callbacks: Callback) -> Any:
    """Four steps with noise and dropout's generator in use, validated after the last."""
    plan = run.phases[0].data
    return fit(
        folder,
        run.data.train,
        settings=plan.settings,
        heldout=run.data.heldout,
        callbacks=callbacks,
        sgd=False,
        neftune_alpha=5.0,
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class RandomState(Callback):
    """The generator's state before and after the callbacks of a validation."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = torch.get_rng_state()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.after = torch.get_rng_state()
        self.training = all(module.training for module in pl_module.backbone.modules())


def test_samples_show_the_model_and_leave_its_training_bitwise_as_it_was(
    run: Training, folder: Path, tmp_path: Path
):
    state = RandomState()
    with_samples = fit_run(run, folder, sampling(run, tmp_path / "samples.jsonl"), state)
    without = fit_run(run, folder)
    assert differs(with_samples.weights, without.weights) == 0.0
    assert with_samples.heldout == without.heldout and with_samples.train == without.train
    assert torch.equal(state.before, state.after) and state.training
    rows = rows_of(tmp_path / "samples.jsonl")
    prompts = drawn(run)[:3]
    texts = answer(
        with_samples.module.backbone,
        run.tokenizer,
        [prompt.prompt_ids for prompt in prompts],
        max_new_tokens=8,
        device=CPU,
    )
    assert any(texts)
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        assert row == {
            "step": with_samples.data.train_plan.num_steps,
            "id": prompt.id,
            "task_type": prompt.task_type,
            "prompt": run.tokenizer.decode(prompt.prompt_ids),
            "reference": prompt.reference,
            "answer": text,
        }


def at(step: int) -> Any:
    return SimpleNamespace(is_global_zero=True, global_step=step, strategy=None)


def test_a_step_that_is_repeated_is_written_once(run: Training, folder: Path, tmp_path: Path):
    """Also the steps behind it: a run that goes on from a checkpoint makes them again."""
    module = fit_run(run, folder).module.train()
    samples = sampling(run, tmp_path / "samples.jsonl")
    contents = []
    for step in (2, 4, 6, 4, 6):
        samples.on_validation_end(at(step), module)
        contents.append(samples.path.read_bytes())
    assert [row["step"] for row in rows_of(samples.path)] == [2] * 3 + [4] * 3 + [6] * 3
    assert contents[3] == contents[1] and contents[4] == contents[2]
    assert all(one.training for one in module.backbone.modules())
    other = SimpleNamespace(is_global_zero=False, global_step=8, strategy=None)
    samples.on_validation_end(other, module)
    assert samples.path.read_bytes() == contents[4]


def test_line_separators_in_a_text_stay_in_their_row(run: Training, folder: Path, tmp_path: Path):
    module = fit_run(run, folder).module
    samples = sampling(run, tmp_path / "samples.jsonl")
    odd = "one\u2028two\u0085three\x1cfour\nfive"
    samples.prompts = [prompt._replace(reference=odd) for prompt in samples.prompts]
    for step in (2, 4):
        samples.on_validation_end(at(step), module)
    rows = rows_of(samples.path)
    assert [row["step"] for row in rows] == [2] * 3 + [4] * 3
    assert {row["reference"] for row in rows} == {odd}


# --- which prompts


def test_only_sources_without_health_information_are_shown(folder: Path, tmp_path: Path):
    open_run = set_up(tmp_path, "sft", model=folder)
    (samples,) = phases._samples(open_run)
    assert isinstance(samples, GreedySamples)
    assert {prompt.source for prompt in samples.prompts} == {"mediflow_heldout"}
    assert samples.path == open_run.folder / "samples.jsonl"
    closed = "corpus.sources.mediflow_heldout.licence.contains_phi=true"
    assert phases._samples(set_up(tmp_path, "sft", closed, model=folder)) == []


def test_samples_of_the_bundled_corpus_never_show_a_real_question(folder: Path, tmp_path: Path):
    """Of as many prompts as there are; the training side is cut, it is not shown."""
    few = [f"corpus.sources.{name}.max_documents=20" for name in ("mediflow", "questions")]
    run = set_up_bundled(tmp_path, "sft", *few, "stage.num_samples=2000", model=folder)
    (samples,) = phases._samples(run)
    shown = [run.tokenizer.decode(prompt.prompt_ids) for prompt in samples.prompts]  # type: ignore[attr-defined]
    every = [run.tokenizer.decode(prompt.prompt_ids) for prompt in drawn(run, per_task=2000)]

    def questions(prompts: list[str]) -> int:
        return sum(asked in prompt for prompt in prompts for asked in SHORT_QUESTION.phrasings)

    assert questions(every) > 30 and len(shown) > 500
    assert questions(shown) == 0


def test_of_two_sources_the_open_one_alone_is_shown(folder: Path, tmp_path: Path):
    """Both sides are split here, so that both sources are held out in part."""
    sides = [f"corpus.sources.mediflow{name}.side=split" for name in ("", "_heldout")]
    options = [*sides, "corpus.heldout_fraction=0.5", "stage.num_samples=9"]
    closed = "corpus.sources.mediflow.licence.contains_phi=true"
    both, one = (
        phases._samples(set_up(tmp_path, "sft", *options, *more, model=folder))[0]
        for more in ((), (closed,))
    )
    sources = [{prompt.source for prompt in own.prompts} for own in (both, one)]  # type: ignore[attr-defined]
    assert sources == [{"mediflow", "mediflow_heldout"}, {"mediflow_heldout"}]


@pytest.mark.parametrize("number", [1, 3, 9])
def test_samples_are_different_prompts_of_as_many_task_types(
    folder: Path, tmp_path: Path, number: int
):
    run = set_up(tmp_path, "sft", f"stage.num_samples={number}", model=folder)
    (samples,) = phases._samples(run)
    prompts = samples.prompts  # type: ignore[attr-defined]
    tasks = {prompt.task_type for prompt in drawn(run)}
    assert len({prompt.id for prompt in prompts}) == len(prompts) == number
    assert len({prompt.task_type for prompt in prompts}) == min(number, len(tasks))


def test_no_samples_are_written_where_none_are_wanted(folder: Path, tmp_path: Path):
    assert phases._samples(set_up(tmp_path, "sft", "stage.num_samples=0", model=folder)) == []

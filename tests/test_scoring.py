"""The quiz's packed log-probabilities are those of a plain padded batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_documents, small_model, write_small_folder

from mediphi.backbone import BackboneSpec, build_model, load_tokenizer
from mediphi.engine import Device
from mediphi.evaluate.multiple_choice import padded_logps, score
from mediphi.examination import CodeQuiz
from mediphi.records import MultipleChoice
from mediphi.scoring import packed_logps, score_quiz

CPU = Device(type="cpu", name="test", precision="32-true", kernel="sdpa")


def both(lengths: list[int], seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    sequences = [d.tolist() for d in random_documents(lengths, seed=seed)]
    ours = packed_logps(small_model().eval(), CPU)(sequences)
    theirs = padded_logps(small_model("sdpa").eval())(sequences)
    return list(ours), list(theirs)


@settings(deadline=None, max_examples=12)
@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_packed_equals_padded_to_1e_4_in_float32(lengths: list[int], seed: int):
    for ours, theirs in zip(*both(lengths, seed), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)  # measured: 2e-6


def test_bf16_autocast_stays_near_float32():
    sequences = [d.tolist() for d in random_documents([30, 12, 50])]
    exact = packed_logps(small_model().eval(), CPU)(sequences)
    half = Device(type="cpu", name="test", precision="bf16-mixed", kernel="sdpa")
    rounded = packed_logps(small_model().eval(), half)(sequences)
    error = max(float(np.abs(a - b).max()) for a, b in zip(exact, rounded, strict=True))
    assert 1e-4 < error < 0.25  # measured: 0.06; autocast is on, and harmless


QUESTIONS = [
    MultipleChoice(
        id=f"q{i}",
        group="easy",
        prompt=f"What does code {code} mean?",
        options=("fever", "acute heart failure", "cough, unspecified", "hypertension"),
        answer=i % 4,
    )
    for i, code in enumerate(["I10", "R50.9", "R05.9", "I50.9", "J45"])
]


def test_the_quiz_gives_the_answers_of_the_padded_reference(tmp_path: Path):
    folder = str(write_small_folder(tmp_path / "model"))
    spec = BackboneSpec(folder, init="random", revision="main", kernel="sdpa")
    tokenizer = load_tokenizer(folder)
    ours = score_quiz(spec, tokenizer=tokenizer, questions=QUESTIONS, device=CPU)
    model = build_model(spec)
    model.set_attn_implementation("sdpa")
    scored = score(QUESTIONS, tokenizer=tokenizer, token_logps=padded_logps(model))
    for got, expected in zip(ours, scored, strict=True):
        assert got.option_logps == pytest.approx(expected.option_logps, abs=1e-5)
        assert got._replace(option_logps=()) == expected._replace(option_logps=())
    assert CodeQuiz(tokenizer, QUESTIONS, CPU).sit(spec) == [one.scored() for one in scored]


def test_scoring_needs_no_gradient_and_no_dropout(tmp_path: Path):
    model = small_model(resid_pdrop=0.5)
    logps = packed_logps(model.eval(), CPU)
    (first,), (second,) = logps([[5, 6, 7, 8]]), logps([[5, 6, 7, 8]])
    assert np.array_equal(first, second)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_a_leak_between_sequences_would_show():
    """The control: the same tokens as one sequence have other log-probabilities."""
    a, b = (d.tolist() for d in random_documents([9, 14]))
    logps = packed_logps(small_model().eval(), CPU)
    (joined,) = logps([a + b])
    apart = logps([a, b])
    assert np.abs(joined[9:] - apart[1]).max() > 0.1
    assert joined[:8] == pytest.approx(apart[0], abs=1e-4)

"""The learning rate of every update, in numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mediphi.config.stages import Phase
from mediphi.modules.schedules import lr_factor


def factors(num_steps: int, **phase: object) -> list[float]:
    chosen = Phase.model_validate({"lr": 1.0, **phase})
    return [lr_factor(chosen, step, num_steps) for step in range(num_steps)]


def test_golden_values():
    assert factors(6, schedule="linear", warmup_steps=2) == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    )
    assert factors(4, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert factors(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert factors(4, schedule="constant", warmup_steps=1) == [0.5, 1.0, 1.0, 1.0]


PHASES = {
    "schedule": st.sampled_from(["cosine", "linear", "constant"]),
    "warmup_steps": st.integers(0, 12),
    "min_lr_ratio": st.floats(0, 1),
}


@settings(deadline=None)
@given(num_steps=st.integers(1, 60), phase=st.fixed_dictionaries(PHASES))
def test_up_to_the_peak_then_down_to_the_floor(num_steps: int, phase: dict):
    values = factors(num_steps, **phase)
    warmup = phase["warmup_steps"]
    assert values[0] > 0 and max(values) <= 1
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if warmup < num_steps:
        assert values[warmup] == 1.0
        assert min(values[warmup:]) >= phase["min_lr_ratio"] - 1e-12


@settings(deadline=None, max_examples=30)
@given(warmup=st.integers(0, 9), left=st.integers(1, 30), cosine=st.booleans())
def test_the_decay_is_transformers_own(warmup: int, left: int, cosine: bool):
    """Only the warm-up differs: theirs gives the first update a learning rate of 0."""
    make = get_cosine_schedule_with_warmup if cosine else get_linear_schedule_with_warmup
    num_steps = warmup + left
    theirs = make(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, num_steps).lr_lambdas[0]
    ours = factors(num_steps, schedule="cosine" if cosine else "linear", warmup_steps=warmup)
    assert ours[warmup:] == pytest.approx([theirs(step) for step in range(warmup, num_steps)])
    assert warmup == 0 or theirs(0) == 0.0 < ours[0]


@given(num_steps=st.integers(1, 40))
def test_beyond_the_end_the_floor_stays(num_steps: int):
    phase = Phase(lr=1.0, schedule="cosine", min_lr_ratio=0.1)
    for step in range(num_steps, num_steps + 5):
        assert lr_factor(phase, step, num_steps) == pytest.approx(0.1)

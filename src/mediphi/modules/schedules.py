"""Learning-rate schedules as a pure function of the step."""

import math

from mediphi.config.stages import Phase


def lr_factor(phase: Phase, step: int, num_steps: int) -> float:
    """Multiple of `phase.lr` for the update that follows `step` finished ones.

    Linear warm-up from `1 / (warmup_steps + 1)`, so that the first update is not lost, then the
    schedule, which would reach `min_lr_ratio` at the update after the last, as in transformers.
    """
    if step < phase.warmup_steps:
        return (step + 1) / (phase.warmup_steps + 1)
    if phase.schedule == "constant":
        return 1.0
    progress = (step - phase.warmup_steps) / max(1, num_steps - phase.warmup_steps)
    progress = min(1.0, progress)
    left = (
        1.0 - progress if phase.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )
    return phase.min_lr_ratio + (1.0 - phase.min_lr_ratio) * left

"""What the winner's score is worth: the best of many scores is too high by chance."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mediphi.merge.search.evaluation import Items

CONFIDENCE = 0.95
CHUNK = 100
"""Resamples at a time: 100 of 10,000 items take 4 MB."""


class Estimate(NamedTuple):
    """A score with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def corrected_score(
    candidates: Sequence[Items], *, seed: int, num_resamples: int = 1000
) -> Estimate | None:
    """Score to expect on new items of the candidate that was the best of all on these.

    Bootstrap bias correction of Tsamardinos, Greasidou & Borboudakis (2018, Machine Learning 107,
    "Bootstrapping the out-of-sample predictions for efficient and accurate cross-validation"): the
    items of each set are drawn with replacement, the best candidate on those drawn is chosen, and
    scored on those not drawn. The mean over resamples is the estimate, their percentiles the
    interval. It is a little low where one candidate is truly the best, as a resample holds 63 % of
    the items, and its interval is wide, as 37 % are left to score on. A set that was drawn whole,
    as tiny ones are, is drawn again: each resample is scored on all sets, as the score itself is.

    It corrects the choice among these candidates. That later candidates were proposed because of
    earlier scores on the same items it does not see: the hold-out split does.

    Args:
        candidates: all that could have won, with the same items in the same order.
        seed: of the draws.

    Returns:
        None where there is no candidate or no set, and where a set has a single item, of which none
        can be left out.
    """
    sizes = [len(of_set) for of_set in candidates[0].values()] if candidates else []
    if min(sizes, default=0) < 2:
        return None
    right = np.concatenate(
        [np.array([own[name] for own in candidates], np.float32) for name in candidates[0]], axis=1
    )
    scores: list[float] = []
    for counts in _resamples(sizes, seed=seed, num_resamples=num_resamples, leave_some=True):
        best = np.argmax(_set_means(counts, sizes) @ right.T, axis=1)
        left_out = _set_means((counts == 0).astype(np.float32), sizes)
        scores += np.einsum("bi,bi->b", left_out, right[best]).tolist()
    return _estimate(float(np.mean(scores)), scores)


def score_interval(items: Items, *, seed: int, num_resamples: int = 2000) -> Estimate:
    """Mean over sets of their accuracy, with its percentile bootstrap interval (Efron 1979).

    Items are drawn within their set. For a split that was not used for choosing, the mean is
    unbiased.
    """
    right = np.concatenate([np.asarray(of_set, np.float32) for of_set in items.values()])
    sizes = [len(of_set) for of_set in items.values()]
    scores: list[float] = []
    for counts in _resamples(sizes, seed=seed, num_resamples=num_resamples):
        scores += (_set_means(counts, sizes) @ right).tolist()
    means = [float(np.mean(of_set)) for of_set in items.values()]
    return _estimate(float(np.mean(means)), scores)


def _resamples(
    sizes: Sequence[int], *, seed: int, num_resamples: int, leave_some: bool = False
) -> Iterator[NDArray[np.float32]]:
    """How often each item is drawn, `[resamples of this chunk, items]`.

    With `leave_some` a set of two items or more is never drawn whole.
    """
    random = np.random.default_rng(seed)
    for first in range(0, num_resamples, CHUNK):
        num = min(CHUNK, num_resamples - first)
        drawn = [_draws(random, size, num, leave_some=leave_some) for size in sizes]
        yield np.concatenate(drawn, axis=1).astype(np.float32)


def _draws(
    random: np.random.Generator, size: int, num: int, *, leave_some: bool
) -> NDArray[np.int64]:
    """How often each item of a set is drawn, `[num, size]`."""
    chances = np.full(size, 1 / size)
    drawn = random.multinomial(size, chances, num)
    while leave_some and (whole := drawn.all(axis=1)).any():  # half of them at most
        drawn[whole] = random.multinomial(size, chances, int(whole.sum()))
    return drawn


def _set_means(counts: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Weights of the items `[resamples, items]`: times right or wrong, the mean over the sets.

    Every set has an item in every resample.
    """
    pieces = np.split(counts, np.cumsum(sizes)[:-1], axis=1)
    totals = [piece.sum(axis=1, keepdims=True, dtype=np.float64) for piece in pieces]
    shares = [piece / (len(sizes) * total) for piece, total in zip(pieces, totals, strict=True)]
    return np.concatenate(shares, axis=1).astype(np.float32)


def _estimate(mean: float, scores: Sequence[float]) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, (tail, 1 - tail))
    return Estimate(mean, float(low), float(high))

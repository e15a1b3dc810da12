"""What a search asks of its candidates: the fitness, its answer, and when to give up on one."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mediphi.merge.search.space import Genome

Hopeless = Callable[[Sequence[int], Sequence[int], Sequence[int]], bool]
"""(right answers, items done, all items), each with one number per validation set -> give up?"""

Items = Mapping[str, Sequence[bool]]
"""By validation set: whether each item was answered right, always in the same order."""


class CandidateError(Exception):
    """This candidate cannot be scored, and the search goes on; the message is one line."""


class Evaluation(NamedTuple):
    """A candidate's answer on one split.

    Attributes:
        fitness: more is better; where `items` are given, the mean over sets of their accuracy.
        by_set: score per validation set.
        items: what corrected scores and intervals are made of; {}: there are none.
        stopped: given up as hopeless: `fitness` is an estimate from the items done.
    """

    fitness: float
    by_set: Mapping[str, float] = MappingProxyType({})
    items: Items = MappingProxyType({})
    stopped: bool = False


Fitness = Callable[[Genome, Hopeless | None], Evaluation]
"""Scores a genome on the search split; raises CandidateError where it cannot be scored."""

Holdout = Callable[[Genome], Evaluation]
"""Scores a genome on the hold-out split, right after the search split of the same genome."""


def accuracy(items: Items) -> float:
    """Mean over the sets of the share of right answers."""
    return fmean(fmean(of_set) for of_set in items.values())


def make_hopeless(best: float, *, risk: float, ties_win: bool = False) -> Hopeless:
    """A test whether a candidate can still beat `best`, the highest fitness so far.

    It gives up when an upper bound of the candidate's final fitness, the mean over sets of their
    accuracy, is not above `best`, or below it where ties win. Two bounds, the lower counts:

    - all items left are answered right. It is certain.
    - with `risk` above 0: the mean so far plus sqrt(ln(1 / d) / 2 * sum_s (1 - (n_s - 1) / N_s) /
      (S^2 n_s)), n_s of N_s items done in each of S sets: Hoeffding's inequality (Hoeffding 1963,
      theorem 2) with Serfling's factor for drawing without replacement (Serfling 1974, corollary
      1.1). d = risk * 6 / (pi^2 * look^2), so that the union bound over all looks holds, however
      many there will be: who would become the best is given up with probability `risk` at most.
      That is so for each candidate; of several such in one search each runs its own risk.

    The second needs, at every look, a number of items done in each set that does not depend on the
    order of the items, and that order drawn at random for each candidate anew: one order for all
    would be known, by what was given up, to a strategy that proposes the next.
    A candidate given up is told to the strategy with its estimate, which is never above `best`:
    the order of candidates behind the best may differ from that of their full scores.

    Args:
        best: highest fitness of an earlier candidate with all items.
        risk: chance that a candidate that would become the best is given up.
        ties_win: whether one as good as `best` becomes the best.
    """
    looks = 0

    def hopeless(correct: Sequence[int], done: Sequence[int], total: Sequence[int]) -> bool:
        nonlocal looks
        looks += 1
        right, seen, size = (np.asarray(x, np.float64) for x in (correct, done, total))
        bound = fmean(((right + size - seen) / size).tolist())  # to the bit what `accuracy` gives
        if risk > 0 and (seen > 0).all():
            chance = risk * 6 / (math.pi**2 * looks**2)
            spread = np.sum((1 - (seen - 1) / size) / seen) / len(size) ** 2
            mean = float(np.mean(right / seen))
            bound = min(bound, mean + math.sqrt(-math.log(chance) / 2 * float(spread)))
        return bound < best or (bound == best and not ties_win)

    return hopeless

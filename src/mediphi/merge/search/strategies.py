"""Who proposes candidates: CMA-ES, random points, or all combinations of a grid.

A strategy is a function of its seed and of what it was told. Nothing else: a search that was killed
is rebuilt by telling it again what the ledger holds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mediphi.errors import UserError
from mediphi.merge.search.space import Coordinate, Space

StrategyName = Literal["cmaes", "random", "grid", "greedy"]
Point = NDArray[np.float64]
"""`[coordinates]` in the unit cube."""

LARGEST_GRID = 100_000


class Strategy(Protocol):
    """Ask, evaluate all, tell, ask again."""

    def ask(self) -> list[Point]:
        """The next generation; []: there is nothing more to try."""
        ...

    @property
    def ties_win(self) -> bool:
        """Whether a candidate of this generation that is as good as the best becomes the best."""
        ...

    def tell(self, points: Sequence[Point], fitness: Sequence[float], *, best: int | None) -> None:
        """The fitness of the generation last asked for, all finite; more is better.

        Args:
            best: place of the candidate that is now the best of the search; None: an earlier one.
        """
        ...


class Cmaes:
    """CMA-ES of the library `cma` (Hansen & Ostermeier 2001; Hansen, Akimoto & Baudis, pycma).

    It samples the unit cube, kept within it by the library's `BoundTransform`. Where the library
    finds that it has converged (all of a generation equal, or steps below its tolerances), it
    starts anew from a point drawn uniformly, until the budget ends.

    Args:
        seed: of a `RandomState` of its own: the global one of numpy is neither read nor touched.
        sigma: first standard deviation, as a share of every coordinate's bounds.
        population: candidates in a generation; None: 4 + 3 ln(coordinates), the library's default.
    """

    ties_win = False

    def __init__(self, space: Space, *, seed: int, sigma: float, population: int | None) -> None:
        self._num, self._sigma, self._population = len(space.coordinates), sigma, population
        self._random = np.random.RandomState(seed)
        self._begin(space.start)

    def _begin(self, start: Point) -> None:
        import cma  # half a second

        # The library fails in one dimension: the second is idle.
        idle = [0.5] * (2 - len(start))
        options = {
            "bounds": [0, 1],
            "randn": self._random.randn,
            "seed": math.nan,  # leave the global generator alone
            "popsize": self._population,
            "verbose": -10,  # above, a file in the working directory changes options
            "verb_log": 0,
            "verb_disp": 0,
        }
        if self._population is None:
            del options["popsize"]
        self._es = cma.CMAEvolutionStrategy([*start, *idle], self._sigma, options)

    def ask(self) -> list[Point]:
        if self._es.stop():
            self._begin(self._random.uniform(size=self._num))
        self._asked = self._es.ask()
        return [point[: self._num] for point in self._asked]

    def tell(self, points: Sequence[Point], fitness: Sequence[float], *, best: int | None) -> None:
        self._es.tell(self._asked, [-value for value in fitness])  # the library minimises


class Random:
    """Points drawn uniformly: what a search must beat."""

    ties_win = False

    def __init__(self, space: Space, *, seed: int, population: int) -> None:
        self._random = np.random.default_rng(seed)
        self._shape = population, len(space.coordinates)

    def ask(self) -> list[Point]:
        return list(self._random.uniform(size=self._shape))

    def tell(self, points: Sequence[Point], fitness: Sequence[float], *, best: int | None) -> None:
        """Nothing is learned."""


class Grid:
    """All combinations of given values, the last coordinate fastest; one generation.

    Args:
        values: by coordinate (`weight/pubmed`) or, for all its coordinates, by parameter
            (`weight`), in the parameter's own unit.

    Raises:
        UserError: a coordinate has no values, or one that lies outside its bounds or has more
            decimals than a genome.
    """

    ties_win = False

    def __init__(self, space: Space, values: Mapping[str, Sequence[float]]) -> None:
        axes = grid_axes(space, values)
        if (size := math.prod(map(len, axes))) > LARGEST_GRID:
            raise UserError(f"the grid has {size:,} combinations; at most {LARGEST_GRID:,}")
        self._points = [
            space.encode(dict(zip(space.names, combination, strict=True)))
            for combination in itertools.product(*axes)
        ]

    def ask(self) -> list[Point]:
        points, self._points = self._points, []
        return points

    def tell(self, points: Sequence[Point], fitness: Sequence[float], *, best: int | None) -> None:
        """Nothing is learned."""


class GreedySoup:
    """Wortsman et al. 2022 (arXiv 2203.05482), recipe 1: which models a plain mean is made of.

    Every model alone first; then, from the best on, each is taken where the mean with it is no
    worse than without: it becomes the best of the search then, so that the winner is the last soup
    that was taken. A weight is 1 or 0, and the merge divides by their sum.

    Raises:
        UserError: the search moves anything but one weight of every model.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        if space.names != tuple(f"weight/{model}" for model in space.models):
            raise UserError(
                "strategy=greedy chooses models by their weights: take merge=linear, with "
                f"stage.layer_groups=1; here the search moves {', '.join(space.names)}"
            )
        self._waiting: list[int] | None = None
        self._taken: list[int] = []

    @property
    def ties_win(self) -> bool:
        return self._waiting is not None  # of models alone the first

    def ask(self) -> list[Point]:
        if self._waiting is None:
            return [self._point([place]) for place in range(len(self._space.models))]
        return [self._point([*self._taken, self._waiting[0]])] if self._waiting else []

    def tell(self, points: Sequence[Point], fitness: Sequence[float], *, best: int | None) -> None:
        if self._waiting is None:
            assert best is not None  # a generation that failed whole ends the search
            order = sorted(range(len(fitness)), key=lambda place: -fitness[place])
            self._taken, self._waiting = [best], [place for place in order if place != best]
            return
        place = self._waiting.pop(0)
        if best is not None:
            self._taken.append(place)

    def _point(self, places: Sequence[int]) -> Point:
        chosen = (float(place in places) for place in range(len(self._space.names)))
        return self._space.encode(dict(zip(self._space.names, chosen, strict=True)))


def grid_axes(space: Space, values: Mapping[str, Sequence[float]]) -> list[Sequence[float]]:
    """Each coordinate's values, equal ones once; raises what `Grid` raises."""
    known = {name for own in space.coordinates for name in (own.name, own.parameter)}
    if unknown := [name for name in values if name not in known]:
        raise UserError(
            f"grid has values for {unknown[0]}; the search moves {', '.join(space.names)}"
        )
    return [_axis(own, values, digits=space.options.digits) for own in space.coordinates]


def _axis(
    own: Coordinate, values: Mapping[str, Sequence[float]], *, digits: int
) -> Sequence[float]:
    axis = values.get(own.name, values.get(own.parameter, ()))
    if not axis:
        raise UserError(
            f"grid has no values for {own.name}; give some for {own.name} or {own.parameter}"
        )
    for value in axis:
        if not own.low <= value <= own.high:
            raise UserError(
                f"grid value {own.name}={value:g} lies outside its bounds "
                f"[{own.low:g}, {own.high:g}]"
            )
        if (near := own.rounded(value, digits)) != value:
            raise UserError(
                f"grid value {own.name}={value} must have at most {digits} decimals, such as {near}"
            )
    return tuple(dict.fromkeys(axis))

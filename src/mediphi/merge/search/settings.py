"""How to search, and the strategy that it makes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mediphi.errors import UserError
from mediphi.merge.search.space import Space
from mediphi.merge.search.strategies import Cmaes, GreedySoup, Grid, Random, Strategy, StrategyName

DEFAULT_POPULATION = 16
"""Of the random strategy, where it changes nothing but the numbers of generations."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search.

    Attributes:
        seed: of the strategy.
        sigma, population: of CMA-ES, see `Cmaes`.
        num_evaluations, minutes: the budget; None: without that limit. Minutes are those of
            evaluations that ended, resumed runs included.
        grid: values to combine, see `Grid`.
        risk: None: every candidate is scored to the end. 0: those that cannot win any more are
            given up. Above: also those that will not win, with this chance for each that would to
            be among them; see `make_hopeless`.
        identity: what the fitness is made of, such as a hash over models and validation sets.
    """

    strategy: StrategyName = "cmaes"
    seed: int = 0
    sigma: float = 1 / 6
    population: int | None = None
    num_evaluations: int | None = 500
    minutes: float | None = None
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    risk: float | None = None
    identity: str = ""

    def description(self) -> dict[str, Any]:
        """What the history depends on: all but the budget, which may grow on a resume."""
        own = asdict(self)
        return {key: own[key] for key in own if key not in ("num_evaluations", "minutes")}


def make_strategy(space: Space, settings: SearchSettings) -> Strategy:
    """Raises UserError, in one line, for settings that do not fit."""
    if settings.population is not None and settings.population < 4:
        raise UserError(f"population={settings.population} is too small; it must be at least 4")
    if not 0 < settings.sigma <= 1:
        raise UserError(f"sigma={settings.sigma:g} must lie within (0, 1]")
    if settings.risk is not None and not 0 <= settings.risk < 1:
        raise UserError(f"risk={settings.risk:g} must lie within [0, 1)")
    if settings.strategy == "grid":
        return Grid(space, settings.grid)
    if settings.strategy == "greedy":
        return GreedySoup(space)
    if settings.grid:
        raise UserError(f"a grid was given and strategy={settings.strategy}; set strategy=grid")
    if settings.num_evaluations is None and settings.minutes is None:
        raise UserError("a search needs a budget: give num_evaluations, minutes or both")
    if settings.strategy == "random":
        return Random(
            space, seed=settings.seed, population=settings.population or DEFAULT_POPULATION
        )
    return Cmaes(space, seed=settings.seed, sigma=settings.sigma, population=settings.population)

"""The search: ask a strategy, evaluate, write down, tell; and once more from the ledger."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mediphi.errors import ArtifactError, UserError
from mediphi.merge.search.evaluation import (
    CandidateError,
    Evaluation,
    Fitness,
    Holdout,
    Hopeless,
    accuracy,
    make_hopeless,
)
from mediphi.merge.search.ledger import Ledger, Record
from mediphi.merge.search.progress import Budget, Progress, Standing, make_progress
from mediphi.merge.search.result import Ended, SearchResult
from mediphi.merge.search.selection_bias import Estimate, corrected_score, score_interval
from mediphi.merge.search.settings import SearchSettings, make_strategy
from mediphi.merge.search.space import Space
from mediphi.merge.search.strategies import Strategy

IDLE_GENERATIONS = 50
"""After so many generations without a new genome there is nothing left to find."""


def search(
    space: Space,
    fitness: Fitness,
    *,
    settings: SearchSettings,
    ledger_path: Path,
    holdout: Holdout | None = None,
    on_evaluation: Callable[[Record], None] | None = None,
    on_known: Callable[[Record], None] | None = None,
) -> SearchResult:
    """Find the genome with the highest fitness, or go on where a killed search was.

    What the ledger holds is not evaluated again: the strategy is asked and told as before, and
    must ask for the recorded genomes. So the history of a search that was killed at any point is
    that of one that was not. Failed candidates count as evaluations; the strategy is told the
    lowest fitness that any candidate had so far.

    Args:
        fitness: on the search split, by which the winner is chosen.
        holdout: scores every new best on a split that is never used for choosing; a candidate that
            fails there has failed.
        on_evaluation: called with every new record once it is on the disk.
        on_known: called with those of earlier runs, in their order, before the new ones.

    Raises:
        UserError: the settings do not fit, or a whole generation failed before any candidate was
            scored.
        ArtifactError: the ledger is damaged, or of another search.
        MachineError: the disk is full.
    """
    strategy = make_strategy(space, settings)
    budget = Budget(settings.num_evaluations, settings.minutes)
    identity = {**space.description(), **settings.description()}
    with Ledger(ledger_path, identity) as ledger, make_progress(budget) as progress:
        run = _Search(strategy, space, fitness, holdout, settings=settings, ledger=ledger)
        ended = run.go(budget, _Watch(progress, on_evaluation, on_known))
        return run.result(ended)


class _Watch(NamedTuple):
    """Who is told how it goes."""

    progress: Progress
    on_evaluation: Callable[[Record], None] | None
    on_known: Callable[[Record], None] | None


class _Search:
    """The state of a search: what was tried, in order."""

    def __init__(
        self,
        strategy: Strategy,
        space: Space,
        fitness: Fitness,
        holdout: Holdout | None,
        *,
        settings: SearchSettings,
        ledger: Ledger,
    ) -> None:
        self._strategy = strategy
        self._space, self._fitness, self._holdout = space, fitness, holdout
        self._settings, self._ledger = settings, ledger
        self._tried: dict[tuple[float, ...], Record] = {}
        self._winner: Record | None = None
        self._num_repeated = self._num_failed = 0
        self._seconds = 0.0

    def go(self, budget: Budget, watch: _Watch) -> Ended:
        """Generation after generation, until the budget is spent or nothing is new."""
        generation = idle = 0
        while idle < IDLE_GENERATIONS:
            points = self._strategy.ask()
            genomes = [self._space.decode(point) for point in points]
            before = len(self._tried)
            for genome in genomes:
                if not self._try(genome, generation, budget, watch):
                    return "budget"
            if not points:
                break
            self._refuse_all_failed()
            self._strategy.tell(points, self._told(genomes), best=self._place_of_best(genomes))
            idle = idle + 1 if len(self._tried) == before else 0
            generation += 1
        if len(self._tried) < len(self._ledger.records):
            raise self._other_history(self._ledger.records[len(self._tried)])
        return "exhausted"

    def result(self, ended: Ended) -> SearchResult:
        """The winner, and what its score is worth."""
        winner, seed = self._winner, self._settings.seed
        if winner is None:
            raise UserError(self._nothing_found())
        whole = [r.evaluation for r in self._tried.values() if r.status == "ok" and r.evaluation]
        corrected = holdout = None
        if not any(r.status == "stopped" for r in self._tried.values()) and all(
            own.items for own in whole
        ):
            corrected = corrected_score([own.items for own in whole], seed=seed)
        if winner.holdout is not None:
            score = winner.holdout.fitness
            items = winner.holdout.items
            holdout = score_interval(items, seed=seed) if items else Estimate(score, score, score)
        records = tuple(self._tried.values())
        return SearchResult(winner, records, self._num_repeated, ended, corrected, holdout)

    def _try(
        self, genome: dict[str, float], generation: int, budget: Budget, watch: _Watch
    ) -> bool:
        """Have a genome's record: known, from the ledger, or new; False: the budget is spent."""
        key, number = tuple(genome.values()), len(self._tried)
        if key in self._tried:
            self._num_repeated += 1
            return True
        if is_new := number == len(self._ledger.records):
            if budget.is_spent(number, self._seconds):
                return False
            self._ledger.append(self._evaluate(genome, generation))
        record = self._ledger.records[number]
        if record.genome != genome or record.generation != generation:
            raise self._other_history(record)
        self._take(key, record)
        best = None if self._winner is None else self._winner.fitness
        done = len(self._tried)
        watch.progress.show(Standing(done, record.fitness, best, self._num_failed, self._seconds))
        if (tell := watch.on_evaluation if is_new else watch.on_known) is not None:
            tell(record)
        return True

    def _take(self, key: tuple[float, ...], record: Record) -> None:
        self._tried[key] = record
        self._seconds += record.seconds
        self._num_failed += record.status == "failed"
        if record.evaluation is not None and self._is_best(record.evaluation):
            self._winner = record

    def _is_best(self, evaluation: Evaluation) -> bool:
        best = -math.inf if self._winner is None else self._winner.fitness
        assert best is not None
        return not evaluation.stopped and (
            evaluation.fitness > best or (self._strategy.ties_win and evaluation.fitness == best)
        )

    def _place_of_best(self, genomes: Sequence[dict[str, float]]) -> int | None:
        """Of the winner in a generation; None: it is of an earlier one."""
        found = self._winner and self._winner.genome
        return next((n for n, genome in enumerate(genomes) if genome == found), None)

    def _evaluate(self, genome: dict[str, float], generation: int) -> Record:
        number, begun = len(self._tried) + 1, time.monotonic()
        evaluation = holdout = None
        reason = ""
        try:
            evaluation = _checked(self._fitness(genome, self._hopeless()))
            if self._holdout is not None and self._is_best(evaluation):
                holdout = _checked(self._holdout(genome))
        except CandidateError as error:
            evaluation, reason = None, " ".join(str(error).split())
        status = "failed" if evaluation is None else "stopped" if evaluation.stopped else "ok"
        seconds = round(time.monotonic() - begun, 6)
        return Record(number, generation, genome, status, evaluation, holdout, seconds, reason)

    def _hopeless(self) -> Hopeless | None:
        risk, best = self._settings.risk, self._winner and self._winner.fitness
        if risk is None or best is None:
            return None
        return make_hopeless(best, risk=risk, ties_win=self._strategy.ties_win)

    def _told(self, genomes: Sequence[dict[str, float]]) -> list[float]:
        """Fitness of a generation; failed ones get the lowest that any candidate had so far."""
        known = [r.fitness for r in self._tried.values() if r.fitness is not None]
        worst = min(known)
        own = [self._tried[tuple(genome.values())].fitness for genome in genomes]
        return [worst if value is None else value for value in own]

    def _refuse_all_failed(self) -> None:
        if self._num_failed == len(self._tried):
            raise UserError(self._nothing_found())

    def _nothing_found(self) -> str:
        reasons = [record.reason for record in self._tried.values() if record.reason]
        if not reasons:
            return "the search ended before any candidate was scored; give it a larger budget"
        return f"all {len(self._tried)} candidates failed, the first with: {reasons[0]}"

    def _other_history(self, record: Record) -> ArtifactError:
        return ArtifactError(
            f"{self._ledger.path}:{record.number + 1}: the search would not try this candidate "
            f"now; it was written with other code or another version of cma: delete the ledger "
            f"to search anew"
        )


def _checked(given: Evaluation) -> Evaluation:
    """An evaluation in plain Python numbers, as it will be read again.

    Raises:
        CandidateError: the fitness is not finite.
        ValueError: it is not what the items say.
    """
    if not math.isfinite(given.fitness):
        raise CandidateError(f"the fitness is {given.fitness}")
    items = {name: tuple(map(bool, of_set)) for name, of_set in given.items.items()}
    if items and not given.stopped and abs(accuracy(items) - given.fitness) > 1e-6:
        raise ValueError(f"fitness {given.fitness} is not the items' mean {accuracy(items)}")
    by_set = {name: float(score) for name, score in given.by_set.items()}
    return Evaluation(float(given.fitness), by_set, items, bool(given.stopped))

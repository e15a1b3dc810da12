"""What a search found."""

from typing import Literal, NamedTuple

from mediphi.merge.search.ledger import Record
from mediphi.merge.search.selection_bias import Estimate

Ended = Literal["budget", "exhausted"]


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        winner: the highest fitness on the search split; of equal ones the first, but of a greedy
            soup's the last that was taken.
        records: all evaluations, in order.
        num_repeated: candidates asked for again and told from the ledger.
        ended: budget: it is spent; exhausted: there was nothing new to try.
        corrected: score on new items to expect of a winner chosen so, from the search split alone;
            None without items, where candidates were given up, as it needs every item of each, and
            where a set has a single item. See `corrected_score`.
        holdout: the winner's score on the hold-out split, which chose nothing; None without one.
    """

    winner: Record
    records: tuple[Record, ...]
    num_repeated: int
    ended: Ended
    corrected: Estimate | None
    holdout: Estimate | None

    @property
    def gap(self) -> float | None:
        """The winner's score on the search split less that on the hold-out split."""
        if self.winner.fitness is None or self.holdout is None:
            return None
        return self.winner.fitness - self.holdout.mean

    @property
    def correction(self) -> float | None:
        """What the corrected score adds to the winner's on the search split; mostly below 0."""
        if self.winner.fitness is None or self.corrected is None:
            return None
        return self.corrected.mean - self.winner.fitness

    @property
    def seconds(self) -> float:
        """Spent in evaluations."""
        return sum(record.seconds for record in self.records)

    def count(self, status: str) -> int:
        """Evaluations that ended so."""
        return sum(record.status == status for record in self.records)

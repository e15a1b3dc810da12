"""Where magnitudes are cut, measured in the data."""

from collections.abc import Sequence

from mediphi.merge.brackets import Magnitudes, by_brackets
from mediphi.merge.pieces import Flat, Operands
from mediphi.merge.windows import (
    Cut,
    Ranks,
    Window,
    by_sorting,
    cuts_of_whole,
    inner_ranks,
    window_of,
)

__all__ = ["MeasuredRanks", "Ranks", "Window"]

WHOLE = 1 << 16
"""Up to this many elements are sorted at once."""
TOGETHER = 1 << 26
"""Elements of deltas searched in one pass: what is gathered of them stays small."""


class MeasuredRanks:
    """Ranks found in the data; on a GPU by sorting there."""

    def __init__(self, operands: Operands) -> None:
        self._magnitudes = Magnitudes(Flat(operands))
        self._found: dict[tuple[int, int], Cut] = {}

    def window(self, model: int, first: int, last: int) -> Window:
        size = self._magnitudes.size
        ranks = inner_ranks(first, last, size)
        self.find([(model, rank) for rank in ranks if (model, rank) not in self._found])
        return window_of(first, last, size, {rank: self._found[model, rank] for rank in ranks})

    def find(self, cuts: Sequence[tuple[int, int]]) -> None:
        """Finds the cuts at some (model, rank) together, which reads the base less often."""
        magnitudes = self._magnitudes
        models = sorted({model for model, _ in cuts})
        together = max(1, TOGETHER // max(1, magnitudes.size))
        if magnitudes.device.type == "cpu" and magnitudes.size > WHOLE:
            for start in range(0, len(models), together):
                group = models[start : start + together]
                self._found |= by_brackets(magnitudes, [cut for cut in cuts if cut[0] in group])
            return
        for model in models:
            ranks = [rank for other, rank in cuts if other == model]
            whole = magnitudes.whole(model)
            found = (
                cuts_of_whole(whole.numpy(), ranks) if whole.is_cpu else by_sorting(whole, ranks)
            )
            self._found |= {(model, rank): cut for rank, cut in found.items()}

"""Cuts by rank against a full stable sort."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mediphi.errors import MergeError
from mediphi.merge import brackets, pieces, selection, statistics, windows
from mediphi.merge.pieces import Operands
from mediphi.merge.selection import MeasuredRanks, Ranks, Window
from mediphi.merge.statistics import Delta, OrderStatistics

SIZE = 20_000


def normal(seed: int = 0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


DELTAS = {
    "no ties": normal(),
    "tied as bfloat16": (normal() * 0.01).bfloat16().float(),
    "few values": (normal() * 2).round(),
    "mostly zero": normal() * (normal(1) > 1.2),
    "all equal": torch.full((SIZE,), -0.25),
    "zeros": torch.zeros(SIZE),
    "denormal": normal() * 1e-39,
    "huge spread": normal() * torch.exp(20 * normal(1)).clamp(max=1e30),
    "sorted": normal().abs().sort().values,
    "one tie among many values": torch.where(normal(1) > 0, 0.5, normal()),
}


@pytest.fixture(params=[1000, 1 << 16])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces far smaller than the tensors, and no tensor sorted whole."""
    monkeypatch.setattr(pieces, "PIECE", request.param)
    monkeypatch.setattr(selection, "WHOLE", 0)
    monkeypatch.setattr(statistics, "WHOLE", 0)
    monkeypatch.setattr(statistics, "CHUNK", request.param)


def kept(window: Window, delta: Tensor, length: int) -> Tensor:
    """The delta as a window leaves it, piece by piece."""
    out, spare = torch.empty(length), torch.empty(length)
    parts = []
    for start in range(0, delta.numel(), length):
        piece = delta[start : start + length]
        parts.append(window.keep(piece, start, out[: len(piece)], spare[: len(piece)]).clone())
    return torch.cat(parts)


def expected(delta: Tensor, first: int, last: int) -> Tensor:
    """The delta with all but the ranks first..last-1 set to zero, by a stable sort."""
    order = torch.sort(delta.abs(), stable=True).indices[first:last]
    return torch.zeros_like(delta).index_copy(0, order, delta[order])


def rank_pairs() -> Iterator[tuple[int, int]]:
    for first in (0, 1, 777, SIZE // 2, SIZE - 1):
        for last in (0, 778, SIZE // 2 + 5, SIZE):
            yield first, last


def measured(delta: Tensor) -> Ranks:
    return MeasuredRanks(Operands(None, (delta,), deltas=True))


@pytest.mark.parametrize("ranks", [measured, lambda delta: OrderStatistics([Delta(delta)])])
@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS.keys())
@pytest.mark.usefixtures("small_pieces")
def test_windows_are_those_of_a_stable_sort(delta: Tensor, ranks) -> None:
    found = ranks(delta)
    for first, last in rank_pairs():
        window = found.window(0, first, last)
        assert torch.equal(kept(window, delta, 999), expected(delta, first, last))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=60),
    cut=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    length=st.integers(1, 64),
)
def test_windows_of_small_tied_tensors(
    values: list[int], cut: tuple[int, int], length: int
) -> None:
    delta = torch.tensor(values, dtype=torch.float32) / 4
    first, last = (min(rank, len(values)) for rank in cut)
    window = measured(delta).window(0, first, last)
    assert torch.equal(kept(window, delta, length), expected(delta, first, last))
    assert window == OrderStatistics([Delta(delta)]).window(0, first, last)


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS.keys())
@pytest.mark.parametrize("sample", [[0.0] * 50, [1e30] * 50, [0.2], [1e-3, 0.5, 0.5, 9.0]])
def test_a_misleading_sample_costs_passes_but_not_exactness(
    delta: Tensor, sample: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "WHOLE", 0)
    misled = np.asarray(sample, np.float32)
    monkeypatch.setattr(brackets.Magnitudes, "sample", lambda self, model: misled)
    for first, last in ((777, SIZE - 3), (SIZE // 2, SIZE)):
        window = measured(delta).window(0, first, last)
        assert torch.equal(kept(window, delta, SIZE), expected(delta, first, last))


def test_the_delta_is_the_difference_in_float32() -> None:
    base, model = normal(1).bfloat16(), normal(2).bfloat16()
    delta = model.float() - base.float()
    ranks = MeasuredRanks(Operands(base, (base, model)))
    window = ranks.window(1, 500, 9000)
    assert torch.equal(kept(window, delta, SIZE), expected(delta, 500, 9000))


def test_sorting_on_a_device_finds_the_same_cuts() -> None:
    delta = DELTAS["tied as bfloat16"]
    for rank in (1, 777, SIZE - 1):
        found = windows.by_sorting(delta.abs(), [rank])
        assert found == windows.cuts_of_whole(delta.abs().numpy(), [rank])


def test_values_that_are_not_finite_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WHOLE", 0)
    delta = torch.full((SIZE,), torch.nan)
    with pytest.raises(MergeError, match="NaN or infinity"):
        measured(delta).window(0, 5, 9)

"""The merge methods: algebra, hand-worked cases of the papers, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mediphi.config.methods import METHODS, Semantics
from mediphi.errors import MergeError
from mediphi.merge import pieces
from mediphi.merge.operators import DELTA_METHODS, Operands, merge_tensor
from mediphi.merge.statistics import Delta, OrderStatistics

SPARSE = sorted(DELTA_METHODS - {"task_arithmetic"})
SIZES = st.integers(1, 70)
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def tensors(count: int, size: int = 300, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def merged(
    method: str,
    base: Tensor | None,
    models: list[Tensor],
    *,
    semantics: Semantics = "mergekit",
    seed: int = 0,
    **values: Any,
) -> Tensor:
    if "lam" in values:
        values["lambda"] = values.pop("lam")
    out = torch.full_like(models[0], torch.nan, dtype=torch.float32)
    operands = Operands(base, tuple(models))
    merge_tensor(method, operands, values, out=out, semantics=semantics, seed=seed)
    assert out.isfinite().all()
    return out


def given_to(method: str, count: int) -> dict[str, Any]:
    """Values without a default."""
    per_model: dict[str, Any] = {"weight": tuple(0.1 + 0.2 * i for i in range(count)), "t": 0.3}
    return {p.name: per_model[p.name] for p in METHODS[method].parameters if p.default is None}


def operands_of(method: str, models: list[Tensor]) -> Operands:
    """As many models as the method takes, with the first as base where there is one."""
    known = METHODS[method]
    if known.base == "none":
        return Operands(None, tuple(models))
    return Operands(models[0], tuple(models[1:][: known.max_models]))


@settings(max_examples=25, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99))
def test_slerp_at_zero_is_the_base_and_at_one_the_model(size: int, seed: int) -> None:
    base, model = (tensor.abs() for tensor in tensors(2, size, seed))  # not opposite
    torch.testing.assert_close(merged("slerp", base, [model], t=0.0), base, **NEAR)
    torch.testing.assert_close(merged("slerp", base, [model], t=1.0), model, **NEAR)


def test_slerp_halfway_between_unit_vectors_is_a_unit_vector() -> None:
    base, model = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    result = merged("slerp", base, [model], t=1 / 3)
    torch.testing.assert_close(result, torch.tensor([3**0.5 / 2, 0.5]))


@pytest.mark.parametrize("method", METHODS.keys())
def test_equal_models_stay_as_they_are(method: str) -> None:
    (model,) = tensors(1)
    operands = operands_of(method, [model] * 4)
    values = given_to(method, len(operands.models))
    if method == "multislerp":
        operands = operands._replace(base=None)
    out = torch.empty_like(model)
    merge_tensor(method, operands, values, out=out)
    torch.testing.assert_close(out, model, **NEAR)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), method=st.sampled_from(sorted(METHODS)), size=SIZES)
def test_the_order_of_the_models_does_not_matter(order: list[int], method: str, size: int) -> None:
    if method in ("slerp", "dare_linear", "dare_ties"):  # one model; a mask for every place
        return
    base, *models = (tensor.abs() for tensor in tensors(5, size))
    models = [base + model for model in models]  # neither models nor deltas are opposite
    known = {p.name for p in METHODS[method].parameters}
    ways = []
    for chosen in (range(4), order):
        values: dict[str, Any] = {
            "weight": tuple(0.1 + 0.2 * i for i in chosen),
            "density": tuple(0.2 + 0.2 * i for i in chosen),
            "gamma": tuple(0.1 * i for i in chosen),
        }
        given = {name: value for name, value in values.items() if name in known}
        start = None if METHODS[method].base == "none" else base
        ways.append(merged(method, start, [models[i] for i in chosen], **given))
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["breadcrumbs", "dare_linear"])
@pytest.mark.parametrize("semantics", ["mergekit", "paper"])
def test_density_one_is_task_arithmetic(method: str, semantics: Semantics) -> None:
    base, *models = tensors(4)
    values: dict[str, Any] = {"weight": (0.2, 0.5, -0.3), "lam": 0.8}
    gammas = {"gamma": (0.0, 0.01, 0.5)} if method == "breadcrumbs" else {}
    dense = merged(
        method, base, models, semantics=semantics, density=(1.0,) * 3, **gammas, **values
    )
    assert torch.equal(dense, merged("task_arithmetic", base, models, **values))


@settings(max_examples=40, deadline=None)
@given(size=SIZES, density=st.floats(0, 1), gamma=st.floats(0, 2))
def test_breadcrumbs_keep_exactly_the_asked_count(size: int, density: float, gamma: float) -> None:
    """mergekit up to 0.1.4 kept nothing where gamma * size is below 1."""
    (model,) = tensors(1, size)
    result = merged(
        "breadcrumbs", torch.zeros(size), [model], weight=(1.0,), density=(density,), gamma=(gamma,)
    )
    assert torch.count_nonzero(result) == int(density * size)
    assert ((result == model) | (result == 0)).all()


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 400), method=st.sampled_from(sorted(METHODS)), kind=st.booleans())
def test_no_result_depends_on_the_pieces(length: int, method: str, kind: bool) -> None:
    models = [model.view(4, 75).bfloat16() for model in tensors(4)]
    operands = operands_of(method, models)
    values = given_to(method, len(operands.models))
    if any(p.name == "rescale" for p in METHODS[method].parameters):
        values |= {"rescale": True, "density": (0.4,) * len(operands.models)}
    semantics: Semantics = "paper" if kind else "mergekit"
    usual, other = torch.empty(4, 75), torch.empty(4, 75)
    merge_tensor(method, operands, values, out=usual, semantics=semantics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", length)
        merge_tensor(method, operands, values, out=other, semantics=semantics)
    assert torch.equal(usual, other)


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher", "model_stock"])
def test_no_sum_depends_on_the_pieces(method: str) -> None:
    """Sums are of blocks, whether a piece holds one, several, or the last of them in part."""
    operands = operands_of(method, [t.bfloat16() for t in tensors(4, 300_001)])
    values, results = given_to(method, len(operands.models)), []
    for length in (1, 3 * pieces.BLOCK, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE", length)
            results.append(torch.empty(300_001))
            merge_tensor(method, operands, values, out=results[-1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("method", METHODS.keys())
def test_no_result_depends_on_the_threads(method: str) -> None:
    operands = operands_of(method, [t.bfloat16() for t in tensors(4, 200_001)])
    values = given_to(method, len(operands.models))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.empty(200_001))
            merge_tensor(method, operands, values, out=results[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("method", sorted(DELTA_METHODS))
@pytest.mark.parametrize("rescale", [False, True])
def test_deltas_with_statistics_give_the_same_to_the_bit(method: str, rescale: bool) -> None:
    base, *models = [t.bfloat16() for t in tensors(4, 200_001)]
    deltas = tuple(model.float() - base.float() for model in models)
    values: dict[str, Any] = {"weight": (0.2, 0.5, 0.3)}
    if method != "task_arithmetic":
        values |= {"density": (0.3, 0.5, 0.7), "rescale": rescale}
    usual, quick = torch.empty(200_001), torch.empty(200_001)
    merge_tensor(method, Operands(base, tuple(models)), values, out=usual, seed=3)
    operands = Operands(base, deltas, deltas=True)
    ranks = OrderStatistics([Delta(delta) for delta in deltas])
    copies = [delta.clone() for delta in deltas]
    merge_tensor(method, operands, values, out=quick, seed=3, ranks=ranks)
    assert torch.equal(usual, quick)
    assert all(torch.equal(*pair) for pair in zip(deltas, copies, strict=True))  # only read


@pytest.mark.parametrize("method", sorted(DELTA_METHODS))
def test_a_delta_method_may_overwrite_its_base(method: str) -> None:
    base, *models = tensors(3, 70_000)
    values = given_to(method, 2)
    expected = merged(method, base, models, **values)
    merge_tensor(method, Operands(base, tuple(models)), values, out=base)
    assert torch.equal(base, expected)


@pytest.mark.parametrize("method", METHODS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(method: str, dtype: torch.dtype) -> None:
    operands = operands_of(method, [t.to(dtype) for t in tensors(4)])
    values = given_to(method, len(operands.models))
    exact, rounded = torch.empty(300), torch.empty(300, dtype=dtype)
    merge_tensor(method, operands, values, out=exact)
    merge_tensor(method, operands, values, out=rounded)
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("method", METHODS.keys())
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1)])
def test_smallest_shapes_and_zeros_are_defined(method: str, shape: tuple[int, ...]) -> None:
    operands = operands_of(method, [torch.zeros(shape)] * 4)
    out = torch.full(shape, torch.nan)
    merge_tensor(method, operands, given_to(method, len(operands.models)), out=out)
    assert torch.equal(out, torch.zeros(shape))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), method=st.sampled_from(sorted(METHODS)))
def test_no_method_loses_a_number_that_is_not_finite(data: st.DataObject, method: str) -> None:
    """So the engine looks for them in the result alone: NaN and infinity of every operand show,
    also where a weight is zero or nothing is kept, and where cuts are found by brackets."""
    size = data.draw(st.sampled_from([6, 90, 70_000]))
    drawn = tensors(4, size, seed=data.draw(st.integers(0, 9)))
    operands = operands_of(method, drawn)
    found = drawn[: len(operands.models) + (operands.base is not None)]
    for _ in range(data.draw(st.integers(1, 3))):
        bad = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        place = data.draw(st.integers(0, size - 1))
        data.draw(st.sampled_from(found))[place] = bad
    values: dict[str, Any] = {}
    for own in METHODS[method].parameters:
        near = st.sampled_from([v for v in (own.low, 0.0, 0.3, 1.0, own.high) if abs(v) < 5])
        if own.name in ("max_iter", "tol"):
            continue
        many = [data.draw(near) for _ in operands.models]
        values[own.name] = tuple(many) if own.per_model else many[0]
    semantics: Semantics = data.draw(st.sampled_from(["mergekit", "paper"]))
    out = torch.zeros(size)
    try:
        merge_tensor(method, operands, values, out=out, semantics=semantics)
    except MergeError:
        return
    assert not out.isfinite().all()


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("semantics", ["mergekit", "paper"])
def test_density_zero_is_the_base(method: str, semantics: Semantics) -> None:
    base, *models = tensors(3)
    result = merged(
        method, base, models, semantics=semantics, weight=(1.0, 2.0), density=(0.0,) * 2
    )
    assert torch.equal(result, base)


@pytest.mark.parametrize("method", sorted(DELTA_METHODS))
def test_weights_of_zero_are_the_base_also_when_normalized(method: str) -> None:
    base, *models = tensors(3)
    result = merged(method, base, models, weight=(0.0, 0.0), normalize=True)
    assert torch.equal(result, base)


def test_ties_of_the_paper_elects_signs_before_weights() -> None:
    """Trimmed to two: (3, -2, 0), (-1, 0, 4), (-1.5, 0, 4). The elected signs are +, -, +."""
    base = torch.tensor([1.0, 1.0, 1.0])
    deltas = [
        torch.tensor([3.0, -2.0, 0.5]),
        torch.tensor([-1.0, 0.5, 4.0]),
        torch.tensor([-1.5, 0.5, 4.0]),
    ]
    values: dict[str, Any] = {"weight": (0.1, 1.0, 1.0), "density": (0.7,) * 3}
    models = [base + delta for delta in deltas]
    paper = merged("ties", base, models, semantics="paper", **values)
    torch.testing.assert_close(paper, base + torch.tensor([3.0, -2.0, 4.0]))
    weighted = merged("ties", base, models, **values)
    torch.testing.assert_close(weighted, base + torch.tensor([-1.25, -2.0, 4.0]))
    summed = merged("ties", base, models, semantics="paper", normalize=False, lam=0.5, **values)
    torch.testing.assert_close(summed, base + 0.5 * torch.tensor([0.3, -0.2, 8.0]))


def test_breadcrumbs_of_the_paper_cut_every_row() -> None:
    """Of each row of five the largest goes, then the two smallest; equals by the lower index."""
    delta = torch.tensor([[5.0, -4, 3, 2, 1], [-10, 30, 20, 50, 40], [1, 1, 1, 1, 1]])
    kept = torch.tensor([[0.0, -4, 3, 0, 0], [0, 30, 0, 0, 40], [0, 0, 1, 1, 0]])
    values: dict[str, Any] = {"weight": (1.0,), "density": (0.4,), "gamma": (0.2,)}
    zeros = torch.zeros(3, 5)
    assert torch.equal(merged("breadcrumbs", zeros, [delta], semantics="paper", **values), kept)
    whole = merged("breadcrumbs", zeros, [delta], **values)  # 6 of 15, without the 3 largest
    assert torch.equal(whole[1], torch.tensor([-10.0, 0, 20, 0, 0]))
    assert torch.equal(whole[0], torch.tensor([5.0, -4, 3, 2, 0]))
    row = merged("breadcrumbs", zeros[0], [delta[0]], semantics="paper", **values)
    assert torch.equal(row, kept[0])


def test_dare_of_the_paper_divides_what_is_kept_by_the_density() -> None:
    size = 100_000
    values: dict[str, Any] = {"weight": (1.0,), "density": (0.25,)}
    zeros, ones = torch.zeros(size), torch.ones(size)
    paper = merged("dare_linear", zeros, [ones], semantics="paper", **values)
    assert paper.unique().tolist() == [0.0, 4.0]
    share = float(torch.count_nonzero(paper) / size)
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / size) ** 0.5
    measured = merged("dare_linear", zeros, [ones], **values)
    torch.testing.assert_close(measured.sum(), torch.tensor(float(size)))
    plain = merged("dare_linear", zeros, [ones], rescale=False, **values)
    assert plain.unique().tolist() == [0.0, 1.0]
    other = merged("dare_linear", zeros, [ones], seed=1, rescale=False, **values)
    agreement = float((plain == other).float().mean())
    assert abs(agreement - (0.25**2 + 0.75**2)) < 0.01


def test_the_masks_of_two_models_are_drawn_apart() -> None:
    values: dict[str, Any] = {"density": (0.5, 0.5), "rescale": False}
    zeros, ones = torch.zeros(50_000), torch.ones(50_000)
    result = merged("dare_linear", zeros, [ones, ones], weight=(1.0, 2.0), **values)
    counts = [int((result == value).sum()) for value in (0, 1, 2, 3)]
    assert all(abs(count - 12_500) < 500 for count in counts)


@pytest.mark.parametrize(
    ("method", "models", "values", "message"),
    [
        ("slerp", [[-1.0, 1e-3]], {"t": 0.5}, "opposite directions"),
        ("multislerp", [[3.0, 2.0], [-1.0, -2.0]], {"weight": (1.0, 1.0)}, "cancel"),
        ("model_stock", [[2.0, 1.0], [0.0, -1.0]], {}, "opposite directions"),
        ("linear", [[1.0, 0.0]] * 2, {"weight": (1.0, -1.0)}, "sum to 0"),
        ("multislerp", [[1.0, 0.0]] * 2, {"weight": (1.0, -1.0)}, "sum to 0"),
        ("slerp", [[1.0, 0.0]] * 2, {"t": 0.5}, "takes 1 model, the base not counted; these are 2"),
        ("model_stock", [[1.0, 0.0]], {}, "takes at least 2 models"),
        ("slerp", [[1.0, 0.0]], {"t": 1.5}, "t is 1.5, allowed are 0 to 1"),
        ("ties", [[1.0, 0.0]], {}, "needs a value for weight"),
        ("ties", [[1.0, 0.0]], {"weight": (1.0, 2.0)}, "weight has 2 values, needed are 1"),
        ("ties", [[1.0, 0.0]], {"weight": (1.0,), "density": (1.1,)}, "density is 1.1"),
    ],
)
def test_what_is_undefined_is_refused_in_one_line(
    method: str, models: list[list[float]], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(MergeError, match=message) as refused:
        merged(method, torch.tensor([1.0, 0.0]), [torch.tensor(m) for m in models], **values)
    assert "\n" not in str(refused.value)


def test_karcher_refuses_opposite_models_and_a_base_must_be_there() -> None:
    one = torch.tensor([1.0, 2.0])
    with pytest.raises(MergeError, match="opposite directions"):
        merged("karcher", None, [one, -2 * one])
    with pytest.raises(MergeError, match="needs a base"):
        merged("ties", None, [one], weight=(1.0,))
    with pytest.raises(MergeError, match="not their deltas"):
        merge_tensor("slerp", Operands(one, (one,), deltas=True), {"t": 0.5}, out=one.clone())


def test_a_row_of_opposite_deltas_stays_the_bases_in_model_stock() -> None:
    base = torch.zeros(2, 2)
    models = [torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[-1.0, 0.0], [1.0, 1.0]])]
    result = merged("model_stock", base, models, filter_wise=True)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))

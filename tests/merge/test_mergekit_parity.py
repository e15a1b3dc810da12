"""Every shared method against mergekit 0.1.5, called on the same tensors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor

from mediphi.config.methods import METHODS
from mediphi.merge.operators import Operands, merge_tensor

api = pytest.importorskip("mergekit.merge_methods.api")

SHAPES = [(64, 256), (3, 5, 64), (512,)]  # multiples of 64: torch then adds models one by one
ODD = (37, 41)
WEIGHTS = [(0.2, 0.5, 0.3), (1.0, 1.0, 1.0), (0.7, -0.4, 1.3)]
SUMS = [
    {},
    {"normalize": True},
    {"normalize": False, "lambda": 0.7},
    {"normalize": True, "lambda": -1.5},
]
ULP = torch.finfo(torch.float32).eps
RESCALED = 4 * ULP
"""The sums of magnitudes that scale a delta are added in another order. Measured: 1.5 ULP of the
largest element."""
EXACT = 3 * ULP
"""Our coefficients are float64 numbers: against mergekit in float64. Measured: slerp 0.8,
multislerp 1.1, Karcher 1.0, model stock 2.0 ULP of the largest element."""
ANGLES = 40 * ULP
"""Against mergekit in float32, whose angles are float32. Measured: slerp 2, multislerp 37, Karcher
10, model stock 7 ULP; its Karcher means of nearly equal models are 1900 ULP off."""
ODD_SIZED = 2 * ULP
"""At the end of a tensor whose size is no multiple of 64, torch's sum adds the models in another
order."""


def models(
    shape: tuple[int, ...], count: int = 3, seed: int = 0, apart: float = 0.01
) -> list[Tensor]:
    """A base and models near it, float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.05
    return [base] + [base + torch.randn(shape, generator=generator) * apart for _ in range(count)]


def theirs(
    method: str,
    tensors: list[Tensor],
    based: bool,
    values: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    names = ["base", *"abcdefgh"] if based else list("abcdefgh")
    ids = names[: len(tensors)]
    inputs = ids[1:] if based else ids
    given = {
        name: dict(zip(inputs, value, strict=True)) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return api.merge_tensors(
        tensors,
        method,
        parameters=given,
        ids=ids,
        base_index=0 if based else None,
        dtype=dtype,
    )


def ours(method: str, tensors: list[Tensor], based: bool, values: dict[str, Any]) -> Tensor:
    out = torch.empty_like(tensors[0], dtype=torch.float32)
    operands = Operands(tensors[0] if based else None, tuple(tensors[based:]))
    merge_tensor(method, operands, values, out=out)
    return out


def distance(
    method: str, tensors: list[Tensor], values: dict[str, Any], based: bool = True
) -> float:
    """Largest difference relative to the largest element of mergekit's result; 0: the same."""
    reference = theirs(method, tensors, based, values)
    result = ours(method, tensors, based, values)
    assert result.dtype == reference.dtype and result.isfinite().all()
    return float((result - reference).abs().max() / reference.abs().max())


def sparse_cases(method: str) -> list[dict[str, Any]]:
    densities = [(1.0,) * 3, (0.3,) * 3, (0.1, 0.55, 0.9), (1e-9, 1.0, 0.5)]
    if method == "ties":
        return [{"density": density} for density in densities]
    gammas = [(0.0,) * 3, (0.01,) * 3, (0.05, 0.2, 0.9), (1.5,) * 3]
    return [{"density": d, "gamma": g} for d in densities for g in gammas]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("how", SUMS, ids=str)
def test_sparse_methods_are_mergekits_to_the_bit(
    method: str, weight: tuple[float, ...], how: dict[str, Any]
) -> None:
    for shape in SHAPES:
        for case in sparse_cases(method):
            values = {"weight": weight, **case, **how}
            assert distance(method, models(shape), values) == 0, (shape, case)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("how", SUMS, ids=str)
def test_task_arithmetic_is_mergekits_to_the_bit(
    weight: tuple[float, ...], how: dict[str, Any]
) -> None:
    for shape in SHAPES:
        assert distance("task_arithmetic", models(shape), {"weight": weight, **how}) == 0


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_mergekits_to_the_bit(weight: tuple[float, ...], normalize: bool) -> None:
    for shape in [*SHAPES, ODD]:
        values = {"weight": weight, "normalize": normalize}
        assert distance("linear", models(shape, 2), values, based=False) == 0


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescaled_methods_are_mergekits_within_the_order_of_a_sum(method: str) -> None:
    for case in sparse_cases(method):
        values = {"weight": WEIGHTS[0], "rescale": True, **case}
        assert distance(method, models((300, 256)), values) <= RESCALED, case


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"])
def test_odd_sizes_differ_by_the_order_of_a_sum(method: str) -> None:
    values = {"weight": (0.3,) * 7}
    if method != "task_arithmetic":
        values["density"] = (0.6,) * 7
    assert distance(method, models(ODD, 7), values) <= ODD_SIZED


def on_spheres() -> Iterator[tuple[str, dict[str, Any], int, bool]]:
    """Method, values, models beside a base, whether the base is one."""
    for t in (0.0, 0.1, 0.5, 1.0):
        yield "slerp", {"t": t}, 1, True
    for weight in ((0.2, 0.5, 0.3), (1.0, 1.0, 2.0)):
        for normalize in (True, False):
            values = {"weight": weight, "normalize_weights": normalize}
            yield "multislerp", values, 3, True
            yield "multislerp", values, 2, False
    for count in (0, 1, 4):
        yield "karcher", {}, count, False
    for filter_wise in (True, False):
        yield "model_stock", {"filter_wise": filter_wise}, 3, True


@pytest.mark.parametrize(("method", "values", "count", "based"), list(on_spheres()))
@pytest.mark.parametrize("apart", [1e-4, 0.01, 1.0])
def test_methods_on_spheres_are_mergekits(
    method: str, values: dict[str, Any], count: int, based: bool, apart: float
) -> None:
    for shape in [*SHAPES, ODD]:
        tensors = models(shape, count, apart=apart)
        if method == "model_stock":  # far from right angles
            tensors[2] = tensors[1] + 0.3 * (tensors[2] - tensors[0])
        exact = theirs(method, tensors, based, values, torch.float64)
        error = (ours(method, tensors, based, values) - exact).abs().max() / exact.abs().max()
        assert float(error) <= EXACT
        if apart > 1e-4:
            assert distance(method, tensors, values, based) <= ANGLES


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_one_is_mergekits_to_the_bit(method: str) -> None:
    for how in SUMS:
        values = {"weight": WEIGHTS[2], "density": (1.0,) * 3, **how}
        assert distance(method, models((64, 256)), values) == 0


def our_masks(shape: tuple[int, ...], density: float) -> list[Tensor]:
    """Ones where DARE keeps a delta of each of three models."""
    masks = []
    for number in range(3):
        ones = [torch.ones(shape) for _ in range(3)]
        alone = tuple(float(number == other) for other in range(3))
        values = {"weight": alone, "density": (density,) * 3, "rescale": False}
        masks.append(ours("dare_linear", [torch.zeros(shape), *ones], True, values))
        assert set(masks[-1].unique().tolist()) <= {0, 1}
    assert 0 < sum(float(mask.mean()) for mask in masks) / 3 <= density + 0.3
    return masks


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_with_our_mask_is_mergekits(
    method: str, rescale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsify = pytest.importorskip("mergekit.sparsify")
    tensors, weight, density = models((64, 256)), (0.2, 0.5, 0.3), 0.4
    drawn = iter(our_masks((64, 256), density))
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda _: next(drawn))
    values = {"weight": weight, "density": (density,) * 3, "rescale": rescale}
    assert distance(method, tensors, values) <= (RESCALED if rescale else 0)


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.0), (0.3, 0.01), (0.9, 0.05), (0.5, 1.5)])
def test_tied_bfloat16_magnitudes_are_cut_at_the_same_count(density: float, gamma: float) -> None:
    base = torch.zeros(64, 256, dtype=torch.bfloat16)
    model = (models((64, 256))[0] * 100).round().bfloat16() / 128
    values = {"weight": (1.0,), "density": (density,), "gamma": (gamma,)}
    result = ours("breadcrumbs", [base, model], True, values)
    reference = theirs("breadcrumbs", [base, model], True, values)
    assert len(model.abs().unique()) < 50
    assert torch.equal(result.abs().view(-1).sort().values, reference.abs().view(-1).sort().values)
    assert ((result == model) | (result == 0)).all()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("linear", torch.float32),
        ("linear", torch.bfloat16),
        ("task_arithmetic", torch.float32),
        ("task_arithmetic", torch.bfloat16),
        ("breadcrumbs", torch.float32),
        ("ties", torch.float32),
    ],
)
def test_phi3_checkpoints_merge_as_with_mergekit(method: str, dtype: torch.dtype) -> None:
    """All tensors of small Phi-3 models; bfloat16 results are rounded from float32 in both."""
    base = {name: t.to(dtype) for name, t in small_model(vocab_size=128).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    experts = [
        {n: t + 0.03 * torch.randn(t.shape, generator=generator).to(dtype) for n, t in base.items()}
        for _ in range(3)
    ]
    values: dict[str, Any] = {"weight": WEIGHTS[0]}
    if method in ("breadcrumbs", "ties"):
        values["density"] = (0.5, 0.3, 0.9)
    based = method != "linear"
    for name in base:
        tensors = [model[name] for model in ([base, *experts] if based else experts)]
        reference = theirs(method, tensors, based, values)
        if tensors[0].numel() % 64 == 0:
            result = torch.empty_like(tensors[0])
            operands = Operands(base[name] if based else None, tuple(tensors[based:]))
            merge_tensor(method, operands, values, out=result)
            assert torch.equal(result, reference.to(dtype)), name
        else:  # norms of 32 elements
            assert distance(method, tensors, values, based) <= ODD_SIZED, name


def checkpoints(seed: int) -> list[dict[str, Tensor]]:
    """State dicts of a small Phi-3 and three experts; norms are no longer ones."""
    generator = torch.Generator().manual_seed(seed)
    state = small_model(vocab_size=128).state_dict()
    base = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    return [base] + [
        {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(3)
    ]


def summed_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for weight in WEIGHTS:
        yield "linear", {"weight": weight}
        yield "task_arithmetic", {"weight": weight}
        for density in (1.0, 0.3):
            sparse = {"weight": weight, "density": (density,) * 3}
            for method in ("ties", "dare_linear", "dare_ties"):
                yield method, sparse
            for gamma in (0.0, 0.01, 1.5):
                for method in ("breadcrumbs", "breadcrumbs_ties"):
                    yield method, {**sparse, "gamma": (gamma,) * 3}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("method", "values"), list(summed_cases()), ids=str)
def test_whole_checkpoints_sum_as_with_mergekit(
    method: str, values: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; norms of 32 elements and rescaled deltas by the order of a sum."""
    sparsify = pytest.importorskip("mergekit.sparsify")
    models, random = checkpoints(seed), method.startswith("dare")
    based = method != "linear"
    for name in models[0]:
        tensors = [model[name] for model in models[not based :]]
        if random:
            drawn = iter(our_masks(tuple(tensors[0].shape), values["density"][0]))
            monkeypatch.setattr(sparsify.torch, "bernoulli", lambda _, own=drawn: next(own))
        bound = RESCALED if random else 0 if tensors[0].numel() % 64 == 0 else ODD_SIZED
        assert distance(method, tensors, values, based) <= bound, name


SPHERES: list[tuple[str, dict[str, Any], int, bool]] = [
    ("slerp", {"t": 0.3}, 1, True),
    ("multislerp", {"weight": WEIGHTS[0], "normalize_weights": True}, 3, True),
    ("multislerp", {"weight": (0.3, 0.7, 0.5), "normalize_weights": True}, 3, False),
    ("karcher", {}, 3, False),
    ("model_stock", {"filter_wise": False}, 3, True),
    ("model_stock", {"filter_wise": True}, 3, True),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("method", "values", "count", "based"), SPHERES, ids=str)
def test_whole_checkpoints_on_spheres_are_mergekits(
    method: str, values: dict[str, Any], count: int, based: bool, seed: int
) -> None:
    models = checkpoints(seed)
    for name in models[0]:
        tensors = [model[name] for model in models[not based : count + 1]]
        exact = theirs(method, tensors, based, values, torch.float64)
        error = (ours(method, tensors, based, values) - exact).abs().max() / exact.abs().max()
        assert float(error) <= EXACT, name


def test_every_method_that_mergekit_has_is_compared() -> None:
    from mergekit.merge_methods.registry import registered_methods

    shared = METHODS.keys() & {method.spec.name for method in registered_methods()}
    assert METHODS.keys() - shared == {"uniform_soup"}

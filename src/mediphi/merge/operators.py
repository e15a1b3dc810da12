"""Merge methods on one tensor: pure functions in float32, rounded once at the end.

What a method is and which values steer it stands in `mediphi.config.methods`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mediphi.config.methods import METHODS, Parameter, Semantics
from mediphi.errors import MergeError
from mediphi.merge.deltas import Sum, add_deltas
from mediphi.merge.pieces import Flat, Operands
from mediphi.merge.selection import MeasuredRanks, Ranks, Window
from mediphi.merge.sparsity import Kept, RandomSparsity, Sparsifier, with_kept_size
from mediphi.merge.spheres import karcher, multislerp, slerp, weighted_mean
from mediphi.merge.stock import model_stock
from mediphi.merge.storage import InMemory, Target

__all__ = ["Operands", "Ranks", "Semantics", "Values", "Window", "merge_tensor"]

Values = Mapping[str, float | bool | tuple[float, ...]]
"""Parameters by name; those per model hold one number for every model, in order."""

DELTA_METHODS = frozenset(
    ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")
)
"""The methods that read nothing of a model but its delta: they take `Operands.deltas`."""


@torch.no_grad()
def merge_tensor(
    method: str,
    operands: Operands,
    values: Values,
    *,
    out: Tensor | Target,
    semantics: Semantics = "mergekit",
    seed: int = 0,
    ranks: Ranks | None = None,
) -> None:
    """Merges one tensor of several models into `out`.

    Args:
        method: a name of METHODS.
        values: what is missing has the table's default.
        out: of the operands' shape; float32, bfloat16 or float16. A tensor is contiguous and
            shares no memory with the operands, but may be the base itself for delta methods.
        seed: of DARE's mask; give every tensor another.
        ranks: where magnitudes are cut, if somebody knows already; None: measured.

    Raises:
        MergeError: a value is missing or out of bounds, or the method is undefined for these
            tensors. The message names no tensor.
    """
    filled = _filled(method, values, len(operands.models))
    if operands.deltas and method not in DELTA_METHODS:
        raise MergeError(f"{method} needs the models, not their deltas")
    if METHODS[method].base == "required" and operands.base is None:
        raise MergeError(f"{method} needs a base model; name one")
    if out.shape.numel() == 0:
        return
    target = InMemory(out) if isinstance(out, Tensor) else out
    if method not in DELTA_METHODS:
        _merge_models(method, operands, filled, target)
        return
    by_rows = semantics == "paper" and method.startswith("breadcrumbs") and len(out.shape) > 0
    found = MeasuredRanks(operands) if ranks is None else ranks
    sparsifier = Sparsifier(
        method,
        filled,
        seed,
        found,
        operands.size,
        out.shape[-1] if by_rows else None,
    )
    if isinstance(found, MeasuredRanks):
        found.find(sparsifier.cuts())
    _merge_deltas(operands, sparsifier, paper=semantics == "paper", out=target)


def _filled(method: str, values: Values, count: int) -> dict[str, list[float]]:
    """All values of a method as lists: one number, or one for every model."""
    known = METHODS[method]
    if not known.min_models <= count <= (known.max_models or count):
        allowed = "1 model" if known.max_models == 1 else f"at least {known.min_models} models"
        raise MergeError(f"{method} takes {allowed}, the base not counted; these are {count}")
    return {own.name: _numbers(method, own, values, count) for own in known.parameters}


def _numbers(method: str, own: Parameter, values: Values, count: int) -> list[float]:
    given = values.get(own.name, own.default)
    if given is None:
        raise MergeError(f"{method} needs a value for {own.name}")
    wanted = count if own.per_model else 1
    numbers: list[float] = list(given) if isinstance(given, tuple) else [given] * wanted
    if len(numbers) != wanted:
        raise MergeError(f"{method}: {own.name} has {len(numbers)} values, needed are {wanted}")
    for number in numbers:
        if not own.low <= number <= own.high:
            raise MergeError(
                f"{method}: {own.name} is {number}, allowed are {own.low:g} to {own.high:g}"
            )
    return numbers


def _merge_models(
    method: str, operands: Operands, values: dict[str, list[float]], out: Target
) -> None:
    """Methods that work on whole models."""
    match method:
        case "linear":
            normalize = bool(values["normalize"][0])
            weighted_mean(operands, values["weight"], normalize=normalize, out=out)
        case "uniform_soup":
            weighted_mean(operands, [1.0] * len(operands.models), normalize=True, out=out)
        case "slerp":
            slerp(operands, values["t"][0], out=out)
        case "multislerp":
            normalize = bool(values["normalize_weights"][0])
            multislerp(operands, values["weight"], normalize=normalize, out=out)
        case "karcher":
            karcher(operands, max_iter=int(values["max_iter"][0]), tol=values["tol"][0], out=out)
        case "model_stock":
            model_stock(operands, filter_wise=bool(values["filter_wise"][0]), out=out)
        case _:
            raise KeyError(method)


def _merge_deltas(operands: Operands, sparsifier: Sparsifier, *, paper: bool, out: Target) -> None:
    """Methods that sum deltas."""
    values = sparsifier.values
    kept = [Kept(weight, sparsifier.of(model)) for model, weight in enumerate(values["weight"])]
    unit = sparsifier.row_width or 1
    if values.get("rescale", [False])[0]:
        kept = [_rescaled(operands, model, part, unit, paper) for model, part in enumerate(kept)]
    elects = sparsifier.method.endswith("ties")
    how = Sum(
        ("unweighted" if paper else "weighted") if elects else "none",
        normalize=bool(values["normalize"][0]),
        factor=values["lambda"][0],
    )
    add_deltas(operands, kept, how, out=out, unit=unit)


def _rescaled(operands: Operands, model: int, part: Kept, unit: int, paper: bool) -> Kept:
    """The part with what is kept scaled up: by the measured loss, or as DARE's paper does."""
    if paper and isinstance(part.sparsity, RandomSparsity):
        return part._replace(scale=1 / part.sparsity.density)
    return with_kept_size(Flat(operands), model, part, unit)

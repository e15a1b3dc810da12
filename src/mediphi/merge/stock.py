"""Model stock: how far to go from the base to the models' average, by the angle between deltas.

Jang et al. 2024, arXiv 2403.19522, eq. 7: t = n cos / (1 + (n - 1) cos), cos the mean cosine of all
pairs of n deltas; the merged tensor is t * average + (1 - t) * base.
"""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from mediphi.errors import MergeError
from mediphi.merge import pieces
from mediphi.merge.pieces import Flat, Operands, Scratch, longest, spans
from mediphi.merge.spheres import PARALLEL, from_base, gram
from mediphi.merge.storage import Target

SMALLEST_PRODUCT = 1e-6
"""Products of norms are not taken below, as in mergekit."""


def model_stock(operands: Operands, *, filter_wise: bool, out: Target) -> None:
    """Writes t * average + (1 - t) * base.

    Args:
        filter_wise: an angle for every row (of the first axes) instead of one for the tensor; rows
            whose deltas cancel stay the base's.

    Raises:
        MergeError: the deltas of the tensor cancel: they point in opposite directions.
    """
    flat = Flat(operands)
    width = out.shape[-1] if filter_wise and out.shape else 1
    ratio = None if filter_wise else _ratio_of_tensor(operands)
    count = len(flat.models)
    piece = pieces.length_on(flat.device)
    scratch = Scratch(count + 2, longest(flat.size, piece, width), flat.device)
    for span in spans(flat.size, piece, width):
        room, total, *buffers = scratch.take(span)
        base = flat.read_base(span, room)
        models = [m.read(span, b) for m, b in zip(flat.models, buffers, strict=True)]
        total.copy_(models[0])
        for model in models[1:]:
            total.add_(model)
        total.div_(count)
        if ratio is None:
            ratios = _ratios_of_rows([(m - base).view(-1, width) for m in models])
            total = (ratios * total.view(-1, width) + (1 - ratios) * base.view(-1, width)).view(-1)
            out.write(span, total)
        else:
            out.write(span, total.mul_(ratio).add_(base * (1 - ratio)))


def _ratio_of_tensor(operands: Operands) -> float:
    products = gram(from_base(operands))
    norms = np.sqrt(products.diagonal())
    pairs = list(combinations(range(len(norms)), 2))
    cosines = [products[i, j] / max(norms[i] * norms[j], SMALLEST_PRODUCT) for i, j in pairs]
    cosine = float(np.clip(cosines, -1, 1).mean())
    divisor = 1 + (len(norms) - 1) * cosine
    if divisor < 1 - PARALLEL:
        raise MergeError(
            f"the models' deltas point in opposite directions (mean cosine {cosine:.5f}); "
            "model stock is undefined there, use linear"
        )
    return len(norms) * cosine / divisor


def _ratios_of_rows(deltas: list[Tensor]) -> Tensor:
    """t of every row; float32 [rows, 1] from deltas [rows, width]."""
    norms = [torch.linalg.vector_norm(delta, dim=1) for delta in deltas]
    cosines = [
        ((deltas[i] * deltas[j]).sum(dim=1) / (norms[i] * norms[j]).clamp(min=SMALLEST_PRODUCT))
        for i, j in combinations(range(len(deltas)), 2)
    ]
    cosine = torch.stack(cosines).clamp(-1, 1).mean(dim=0)
    divisor = 1 + (len(deltas) - 1) * cosine
    cancelled = divisor < 1 - PARALLEL
    ratio = len(deltas) * cosine / divisor.masked_fill(cancelled, 1.0)
    return ratio.masked_fill(cancelled, 0.0).unsqueeze(1)

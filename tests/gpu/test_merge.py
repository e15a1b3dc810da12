"""A merge on a CUDA device is that of a CPU; `pytest -m gpu tests/gpu`."""

import pytest
import torch

from mediphi.config.methods import METHODS
from mediphi.merge.operators import Operands, Values, merge_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VALUES: dict[str, Values] = {
    "slerp": {"t": 0.3},
    "linear": {"weight": (0.5, 0.2, 0.3)},
    "multislerp": {"weight": (0.5, 0.2, 0.3)},
}
DELTAS: Values = {"weight": (0.5, 0.2, 0.3), "density": (0.4, 0.7, 1.0), "gamma": (0.01, 0.0, 0.1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_merges_as_a_cpu(method: str, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    base = (torch.randn(300, 257, generator=drawn) * 0.02).to(dtype)
    count = METHODS[method].max_models or 3
    noise = (torch.randn(300, 257, generator=drawn) * 1e-3 for _ in range(count))
    models = tuple((base.float() + one).to(dtype) for one in noise)
    start = None if METHODS[method].base == "none" else base
    known = {own.name for own in METHODS[method].parameters}
    values = VALUES.get(method) or {k: v for k, v in DELTAS.items() if k in known}
    found = {}
    for device in ("cpu", "cuda"):
        out = torch.empty_like(base, device=device)
        there = None if start is None else start.to(device)
        operands = Operands(there, tuple(model.to(device) for model in models))
        merge_tensor(method, operands, values, out=out, seed=7)
        found[device] = out.cpu()
    allowed = {torch.float32: 1e-7, torch.bfloat16: 2e-4}[dtype]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-2, atol=allowed)

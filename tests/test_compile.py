"""Layers compiled for speed give the numbers of plain ones, and compile once for all rows."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import packed, random_documents, write_small_folder
from small_training import (
    differs,
    fit,
    make_dpo_module,
    make_module,
    pair_settings,
    random_pairs,
    spec_of,
    unequal_store,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mediphi import attention
from mediphi.backbone import build_model
from mediphi.modules.causal_lm import hidden_states

# torch's compiler warns, and hides it by itself
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [[9, 30, 12], [40], [3, 5, 50, 8, 7], [21, 20], [60, 2], [11] * 6, [35, 34, 1], [5, 64]]
"""Lengths of the documents of each row."""

PAIRS = [(7, 3, 2), (4, 1, 5), (20, 9, 12), (3, 6, 1), (9, 4, 4), (12, 30, 4)]
"""Lengths of prompt, chosen and rejected answer."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_folder(tmp_path / "model", initializer_range=0.2)


@pytest.fixture(autouse=True)
def no_compiled_code_is_left() -> Iterator[None]:
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """inductor is what runs, through the C++ compiler; aot_eager makes the same graphs at once."""
    if request.param != "inductor":
        chosen = partialmethod(nn.Module.compile, backend=request.param)
        monkeypatch.setattr(nn.Module, "compile", chosen)
    return request.param


def step(model: Any, lengths: list[int], *, bf16: bool = False) -> Tensor:
    """All gradients of a row, end to end."""
    batch = packed(random_documents(lengths, vocab=4000))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = hidden_states(model, batch, "sdpa")
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.get_decoder().parameters()])


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_rows_compile_nothing_anew_and_change_no_number(
    folder: Path, backend: str, bf16: bool
):
    plain, compiled = (build_model(replace(spec_of(folder), compile=c)) for c in (False, True))
    exact = [step(plain, lengths) for lengths in ROWS]
    eager = [step(plain, lengths, bf16=bf16) for lengths in ROWS]
    first = step(compiled, ROWS[0], bf16=bf16)
    with torch.compiler.set_stance("fail_on_recompile"):
        rest = [step(compiled, lengths, bf16=bf16) for lengths in ROWS[1:]]
    for got, near, want in zip([first, *rest], eager, exact, strict=True):
        # measured: 1.4e-6 and, in bf16, at most 1.1 times what plain layers are off
        assert off(got, want) < (1.3 * off(near, want) if bf16 else 1e-5)
    assert counters["stats"]["unique_graphs"] > 0  # the control: other code has run


@pytest.mark.slow
def test_deeper_models_compile_no_more(tmp_path: Path, backend: str):
    """Otherwise the ninth layer would silently run uncompiled: torch gives up after eight."""
    graphs = []
    for layers in (2, 10):
        deep = write_small_folder(tmp_path / str(layers), num_hidden_layers=layers)
        model = build_model(replace(spec_of(deep), compile=True))
        counters.clear()
        torch.compiler.reset()
        for lengths in ROWS[:2]:
            step(model, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_recomputed_layers_stay_plain_beside_compiled_ones(folder: Path, backend: str):
    spec = spec_of(folder)
    mixed, recomputed = (
        build_model(replace(spec, compile=True, recomputed_layers=n)) for n in (1, 2)
    )
    want = step(build_model(spec), ROWS[0])
    assert off(step(recomputed, ROWS[0]), want) < 1e-5
    assert counters["stats"]["unique_graphs"] == 0
    assert off(step(mixed, ROWS[0]), want) < 1e-5
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_boundaries_that_a_layer_looks_into_would_compile_anew(
    folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
):
    """The control: as plain arguments, the number of blocks is part of the compiled code."""
    sealed = attention.boundaries

    def open_boundaries(batch: Any, kernel: attention.Kernel) -> dict[str, Any]:
        blocks = sealed(batch, kernel)["blocks"]
        return {"blocks": blocks, "shapes": list(blocks.row_shapes)}

    monkeypatch.setattr(attention, "boundaries", open_boundaries)
    compiled = build_model(replace(spec_of(folder), compile=True))
    step(compiled, [9, 30, 12])
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        step(compiled, [40])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["text", "shared_pairs"])
def test_a_compiled_training_ends_where_a_plain_one_does(folder: Path, tmp_path: Path, layout: str):
    """Steps, accumulation, clipping, validation; with masks where pairs share prompts."""
    store = unequal_store(tmp_path / "cache")
    options: dict[str, Any] = {"make": make_module, "heldout": store}
    if layout == "shared_pairs":
        store = random_pairs(tmp_path / "cache", PAIRS)
        settings = pair_settings(global_batch=2, epochs=3, max_steps=4)
        other = replace(spec_of(folder), seed=1)  # no margin is 0, where rounding would decide
        options = {"make": make_dpo_module, "settings": settings, "live_reference": other}
    plain, compiled = (
        fit(folder, store, clip=0.5, backbone=replace(spec_of(folder), compile=c), **options)
        for c in (False, True)
    )
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled.train == pytest.approx(plain.train, rel=1e-4, abs=1e-5)
    assert compiled.heldout == [pytest.approx(own, rel=1e-4) for own in plain.heldout]
    assert differs(compiled.weights, plain.weights) < 1e-4

"""Layers compiled for speed give the numbers of plain ones, and compile once for all rows."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from small_models import packed, random_documents, reference_varlen, write_small_folder
from small_training import (
    SETTINGS,
    assert_same_gradients,
    differs,
    fit,
    gradients,
    make_dpo_module,
    make_module,
    pair_settings,
    random_pairs,
    spec_of,
    unequal_store,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from mediphi import attention
from mediphi.backbone import build_model
from mediphi.data.datamodule import PackedDataModule, References
from mediphi.modules.causal_lm import hidden_states

# torch's compiler warns, and hides it by itself
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [[9, 30, 12], [40], [3, 5, 50, 8, 7], [21, 20], [60, 2], [11] * 6, [35, 34, 1], [5, 64]]
"""Lengths of the documents of each row."""
TOKENS = 73
"""Of the longest of them, which all are padded to."""

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
    choose(request.param, monkeypatch)
    return request.param


def choose(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "inductor":
        chosen = partialmethod(nn.Module.compile, backend=backend)
        monkeypatch.setattr(nn.Module, "compile", chosen)


@contextmanager
def nothing_compiles() -> Iterator[None]:
    before = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
    assert counters["stats"]["unique_graphs"] == before


@contextmanager
def recompiling_is_refused() -> Iterator[None]:
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        yield


def step(
    model: Any,
    lengths: list[int],
    *,
    bf16: bool = False,
    compiled_tokens: int | None = TOKENS,
    kernel: attention.Kernel = "sdpa",
) -> Tensor:
    """All gradients of a row, end to end."""
    batch = packed(random_documents(lengths, vocab=4000))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = hidden_states(model, batch, kernel, compiled_tokens=compiled_tokens)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.get_decoder().parameters()])


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def both(folder: Path, **changes: Any) -> list[Any]:
    """The model as it is, and compiled."""
    spec = replace(spec_of(folder), **changes)
    return [build_model(replace(spec, compiled_tokens=n)) for n in (None, TOKENS)]


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_rows_compile_nothing_anew_and_change_no_number(
    folder: Path, backend: str, bf16: bool
):
    plain, compiled = both(folder)
    exact = [step(plain, lengths, compiled_tokens=None) for lengths in ROWS]
    eager = [step(plain, lengths, bf16=bf16, compiled_tokens=None) for lengths in ROWS]
    first = step(compiled, ROWS[0], bf16=bf16)
    assert counters["stats"]["unique_graphs"] > 0  # the control: other code has run
    with nothing_compiles():
        rest = [step(compiled, lengths, bf16=bf16) for lengths in ROWS[1:]]
    for got, near, want in zip([first, *rest], eager, exact, strict=True):
        # measured: 1.4e-6 and, in bf16, at most 1.1 times what plain layers are off
        assert off(got, want) < (1.3 * off(near, want) if bf16 else 1e-5)


def test_rows_of_their_own_length_would_compile_anew(folder: Path, backend: str):
    """The control."""
    _, compiled = both(folder)
    step(compiled, [9, 30, 12])
    before = counters["stats"]["unique_graphs"]
    with recompiling_is_refused():
        step(compiled, [40], compiled_tokens=None)
    step(compiled, [40], compiled_tokens=None)
    assert counters["stats"]["unique_graphs"] > before > 0


def test_a_longer_row_goes_through_uncompiled(folder: Path, backend: str):
    plain, compiled = both(folder)
    step(compiled, ROWS[0])
    with nothing_compiles():
        got = step(compiled, [50, 40])
    assert torch.equal(got, step(plain, [50, 40], compiled_tokens=None))


def test_a_row_of_less_than_half_goes_through_uncompiled_and_without_padding(
    folder: Path, backend: str
):
    """As the one token of a rank that has no rows left in a step."""
    plain, compiled = both(folder)
    step(compiled, ROWS[0])
    lengths = []
    layer = compiled.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    with nothing_compiles():
        got = step(compiled, [1, 20])
    hook.remove()
    assert lengths == [21]
    assert torch.equal(got, step(plain, [1, 20], compiled_tokens=None))


def test_validation_before_and_in_training_compiles_once(folder: Path, backend: str):
    """Lightning validates by itself and inside a fit; rows with and without padding alike."""
    _, compiled = both(folder)

    def look(lengths: list[int]) -> None:
        batch = packed(random_documents(lengths, vocab=4000))
        with torch.no_grad():
            hidden_states(compiled, batch, "sdpa", compiled_tokens=TOKENS)

    look(ROWS[0])
    for_validation = counters["stats"]["unique_graphs"]
    step(compiled, ROWS[0])
    assert counters["stats"]["unique_graphs"] > for_validation > 0  # a form for each
    with nothing_compiles():
        for lengths in (ROWS[1], [TOKENS]):
            look(lengths)
            step(compiled, lengths)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_stands_in_the_padding_moves_no_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_compiled: bool
):
    choose("aot_eager", monkeypatch)
    model = both(folder)[is_compiled]
    want = step(model, [9, 30, 12])

    def fill(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings, positions = kwargs["inputs_embeds"].clone(), kwargs["position_ids"].clone()
        assert embeddings.shape[1] == positions.shape[1] == TOKENS
        assert not embeddings[:, 51:].any() and not positions[:, 51:].any()
        embeddings[:, 51:], positions[:, 51:] = 1e3, torch.arange(TOKENS - 51)
        return args, {**kwargs, "inputs_embeds": embeddings, "position_ids": positions}

    hook = model.get_decoder().register_forward_pre_hook(fill, with_kwargs=True)
    assert torch.equal(step(model, [9, 30, 12]), want)
    hook.remove()
    assert want.isfinite().all() and want.any()


def test_no_gradient_reaches_the_padding_and_none_is_undefined(folder: Path):
    model, _ = both(folder)
    seen: list[Tensor] = []

    def watch(module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(seen.append)

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(watch)
    step(model, [9, 30, 12])
    assert len(seen) == 2
    for gradient in seen:
        assert gradient[0, :51].any() and not gradient[0, 51:].any()
        assert gradient.isfinite().all()


def test_all_layers_share_what_one_compiles(tmp_path: Path, backend: str):
    """Otherwise the ninth layer would silently run uncompiled: torch gives up after eight."""
    graphs = []
    for layers in (1, 10):
        deep = write_small_folder(tmp_path / str(layers), num_hidden_layers=layers)
        _, model = both(deep)
        counters.clear()
        torch.compiler.reset()
        for lengths in ROWS[:2]:
            step(model, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_recomputed_layers_stay_plain_beside_compiled_ones(folder: Path, backend: str):
    plain, mixed = both(folder, recomputed_layers=1)
    _, recomputed = both(folder, recomputed_layers=2)
    want = step(plain, ROWS[0], compiled_tokens=None)
    assert off(step(recomputed, ROWS[0]), want) < 1e-5
    assert counters["stats"]["unique_graphs"] == 0
    assert off(step(mixed, ROWS[0]), want) < 1e-5
    assert counters["stats"]["unique_graphs"] > 0


# --- the kernels of a GPU: what is around them runs here, they themselves are stood in for


@pytest.fixture(params=["varlen", "flash"])
def gpu_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """flash-attn's function under transformers' own wrapper, and PyTorch's under ours."""

    def flash_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        assert causal
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1).bfloat16() for x in (k, v))
        places = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = {"scale": softmax_scale, "window_size": (-1, 0)}
        return reference_varlen(q.bfloat16(), k, v, *places, **window).to(q.dtype)

    arguments = flash_utils._lazy_define_process_function(flash_varlen)
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", flash_varlen)
    monkeypatch.setattr(flash_utils, "_process_flash_kwargs_fn", arguments)
    return request.param


def taken_for(model: Any, kernel: attention.Kernel) -> Any:
    """The kernel's name, past the check that flash-attn is installed."""
    model.config._attn_implementation_internal = attention.IMPLEMENTATIONS[kernel]
    return model


def test_varlen_kernels_see_no_padding_and_compile_nothing_anew(
    folder: Path, gpu_kernel: attention.Kernel, monkeypatch: pytest.MonkeyPatch
):
    """The stand-in refuses queries that no sequence covers, which the real ones leave undefined."""
    choose("aot_eager", monkeypatch)
    plain, compiled = (taken_for(model, gpu_kernel) for model in both(folder))
    exact = [step(build_model(spec_of(folder)), row, compiled_tokens=None) for row in ROWS[:4]]
    eager = [step(plain, row, kernel=gpu_kernel, compiled_tokens=None) for row in ROWS[:4]]
    first = step(compiled, ROWS[0], kernel=gpu_kernel)
    assert counters["stats"]["unique_graphs"] > 0
    with nothing_compiles():
        rest = [step(compiled, row, kernel=gpu_kernel) for row in ROWS[1:4]]
    for got, near, want in zip([first, *rest], eager, exact, strict=True):
        assert off(got, near) < 1e-4  # measured: 8.4e-6
        assert off(near, want) < 5e-2  # the kernel rounds to bf16


def test_the_longest_row_of_shared_prompts_needs_no_padding_and_others_take_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Keys that stand twice are chosen from real tokens only."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    model = taken_for(build_model(spec_of(folder)), "varlen")
    data = layout_data(tmp_path, "shared_pairs")
    for batch in (data.train_dataloader()[i] for i in range(3)):
        plain, full, padded = (
            hidden_states(model, batch, "varlen", compiled_tokens=n)
            for n in (None, batch.num_tokens, data.max_tokens)
        )
        assert torch.equal(plain, full) and batch.num_tokens < data.max_tokens
        torch.testing.assert_close(padded, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_boundaries_that_a_layer_looks_into_would_compile_anew(
    folder: Path, kernel: attention.Kernel, monkeypatch: pytest.MonkeyPatch
):
    """The control: in the open, numbers of blocks and lengths are part of the compiled code."""
    choose("aot_eager", monkeypatch)
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    sealed = attention.boundaries

    def open_boundaries(batch: Any, kernel: attention.Kernel) -> dict[str, Any]:
        made = sealed(batch, kernel)
        if kernel == "varlen":
            return made["sealed"].arguments
        return {**made, "shapes": list(made["blocks"].row_shapes)}

    monkeypatch.setattr(attention, "boundaries", open_boundaries)
    compiled = taken_for(both(folder)[1], kernel)
    step(compiled, [9, 30, 12], kernel=kernel)
    before = counters["stats"]["unique_graphs"]
    with recompiling_is_refused():
        step(compiled, [40], kernel=kernel)
    step(compiled, [40], kernel=kernel)
    assert counters["stats"]["unique_graphs"] > before > 0


# --- batches of a plan


def layout_data(tmp_path: Path, layout: str) -> PackedDataModule:
    if layout == "text":
        return PackedDataModule(unequal_store(tmp_path / "cache"), heldout=None, settings=SETTINGS)
    store = random_pairs(tmp_path / "cache", PAIRS)
    settings: Any = pair_settings(layout, global_batch=2, epochs=3)  # type: ignore[arg-type]
    logps = torch.full((len(PAIRS), 2), -40.0).numpy()
    return PackedDataModule(
        store, heldout=None, settings=settings, references=References(logps, logps)
    )


@pytest.mark.parametrize("layout", ["text", "pairs", "shared_pairs"])
def test_loss_and_gradients_of_padded_batches_are_those_of_plain_ones(
    folder: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
):
    choose("aot_eager", monkeypatch)
    data = layout_data(tmp_path, layout)
    make = make_module if layout == "text" else make_dpo_module
    plain, compiled = (
        make(folder, data, backbone=replace(spec_of(folder), compiled_tokens=n))
        for n in (None, data.max_tokens)
    )
    batches = [data.train_dataloader()[i] for i in range(6)]
    shapes = {(batch.num_tokens, len(batch.lengths)) for batch in batches}
    assert len(shapes) >= 4 and max(shapes)[0] <= data.max_tokens
    for number, batch in enumerate(batches):
        found = []
        for module in (plain, compiled):
            module.configure_model()
            module.zero_grad()
            with nothing_compiles() if number else nullcontext():
                loss = module.training_step(batch, number)
                loss.backward()
            found.append((float(loss), gradients(module)))
        (want, expected), (got, own) = found
        assert got == pytest.approx(want, rel=1e-5)
        assert_same_gradients(own, expected)
    assert counters["stats"]["unique_graphs"] > 0


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
        fit(
            folder, store, clip=0.5, backbone=replace(spec_of(folder), compiled_tokens=n), **options
        )
        for n in (None, 48)
    )
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled.train == pytest.approx(plain.train, rel=1e-4, abs=1e-5)
    assert compiled.heldout == [pytest.approx(own, rel=1e-4) for own in plain.heldout]
    assert differs(compiled.weights, plain.weights) < 1e-4

"""Adapters: what trains, what an export holds, and what peft makes of it."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import phi3_config, small_model, write_small_folder
from small_training import CPU, SETTINGS, fit, make_module, unequal_store
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from mediphi import engine, export
from mediphi.backbone import (
    BackboneSpec,
    build_model,
    float32_buffers,
    load_tokenizer,
)
from mediphi.checkpointing import PeriodicCheckpoint, SafeCheckpointIO, step_folder
from mediphi.config.schema import Hardware
from mediphi.config.stages import Lora
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.tokens import TokenStore
from mediphi.errors import ArtifactError, UserError
from mediphi.export import export_model, reload_and_compare
from mediphi.lora import add_adapters, merged_state, save_adapter

LORA = Lora(rank=4, alpha=6.0)
IDS = torch.arange(3, 63)[None]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return unequal_store(tmp_path_factory.mktemp("cache"))


def spec(folder: Path, **changes: Any) -> BackboneSpec:
    options = {"init": "random", "revision": "main", "kernel": "sdpa", "lora": LORA, **changes}
    return BackboneSpec(folder=str(folder), **options)


def trained(model: Any) -> Any:
    """As after a training: no `B` is zero."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """By transformers' own attention; leaves the model in eval mode."""
    model.eval().set_attn_implementation("sdpa")
    return model(IDS, use_cache=False).logits


def adapters(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- building


def test_new_adapters_change_nothing_and_trained_ones_do(architecture: Path):
    plain = logits(build_model(spec(architecture, lora=None)))
    model = build_model(spec(architecture))
    assert torch.equal(logits(model), plain)
    assert (logits(trained(model)) - plain).abs().max() > 0.1


def test_an_adapted_model_keeps_its_class_train_mode_and_float32(architecture: Path):
    model = build_model(spec(architecture, lora=Lora(rank=2, dropout=0.1)))
    assert type(model) is Phi3ForCausalLM
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert float32_buffers(model) == []


def test_the_weights_are_frozen_and_every_linear_layer_but_the_head_has_an_adapter(
    architecture: Path,
):
    model = build_model(spec(architecture))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapters(model).keys()
    adapted = {name.partition(".lora_")[0] for name in adapters(model)}
    layers = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    assert adapted == {f"model.layers.{i}.{name}" for i in (0, 1) for name in layers}
    assert {min(p.shape) for p in adapters(model).values()} == {LORA.rank}


def test_named_target_modules_alone_get_an_adapter(architecture: Path):
    model = build_model(spec(architecture, lora=Lora(target_modules=("o_proj",))))
    assert all(".o_proj." in name for name in adapters(model)) and adapters(model)


def test_adapters_follow_their_seed_and_leave_the_random_state_alone():
    def drawn(seed: int) -> dict[str, Tensor]:
        model = small_model()
        before = torch.get_rng_state()
        add_adapters(model, LORA, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return adapters(model)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_adapters_fit_a_model_without_weights():
    """What sizes a run up before anything is loaded."""
    with torch.device("meta"):
        model = Phi3ForCausalLM(phi3_config())
    add_adapters(model, LORA, seed=0)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(UserError, match="no such linear layers"):
        add_adapters(model, Lora(target_modules=("query",)), seed=0)


# --- refused


@pytest.mark.parametrize("name", ["q_proj", "lm_head", "model.layers.0", ""])
def test_an_unknown_target_module_is_refused_with_the_names_that_exist(
    architecture: Path, name: str
):
    """The head too: the loss multiplies with its weight, past any adapter."""
    with pytest.raises(UserError, match=r"target_modules.*no such linear layers") as error:
        build_model(spec(architecture, lora=Lora(target_modules=("o_proj", name))))
    told = one_line(error)
    assert f": {name}: " in told
    assert "down_proj, gate_up_proj, o_proj, qkv_proj (or all-linear)" in told


def test_without_peft_the_extra_is_named(architecture: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'mediphi\[lora\]'") as error:
        build_model(spec(architecture))
    one_line(error)
    build_model(spec(architecture, lora=None))


# --- training


def test_training_changes_every_adapter_and_not_one_bit_of_the_weights(
    architecture: Path, store: TokenStore
):
    before = build_model(spec(architecture)).state_dict()
    run = fit(architecture, store, sgd=False, clip=0.5, backbone=spec(architecture))
    after = run.module.backbone.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (".lora_" not in name), name
    assert run.train["grad_norm"] > 0


def test_the_optimizer_holds_the_adapters_alone(architecture: Path, store: TokenStore):
    data = PackedDataModule(store, heldout=None, settings=SETTINGS)
    module = make_module(architecture, data, sgd=False, backbone=spec(architecture))
    module.configure_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for p in adapters(module.backbone).values()}


def test_recomputed_layers_change_no_gradient_of_an_adapter(architecture: Path):
    def gradients(count: int) -> dict[str, Tensor]:
        model = trained(build_model(spec(architecture, recomputed_layers=count)))
        model.set_attn_implementation("sdpa")
        model(IDS, use_cache=False).logits.square().mean().backward()
        return {n: p.grad for n, p in adapters(model).items()}

    plain, recomputed = gradients(0), gradients(1)
    assert min(float(g.abs().max()) for g in plain.values()) > 0
    torch.testing.assert_close(plain, recomputed)


def test_a_resumed_training_of_adapters_ends_with_the_same_bits(
    architecture: Path, store: TokenStore, tmp_path: Path
):
    def run(checkpoint: Path | None) -> dict[str, Tensor]:
        data = PackedDataModule(store, heldout=None, settings=SETTINGS)
        noisy = spec(architecture, lora=Lora(rank=4, dropout=0.2))
        module = make_module(architecture, data, sgd=False, backbone=noisy)
        trainer = engine.make_trainer(
            Hardware(accelerator="cpu"),
            CPU,
            checkpoint_io=SafeCheckpointIO(),
            callbacks=[PeriodicCheckpoint(tmp_path, every_steps=2, keep=9)],
            loggers=[],
            loop={
                "max_steps": data.train_plan.num_steps,
                "accumulate_grad_batches": data.train_plan.accumulate,
                "limit_val_batches": 0,
            },
        )
        trainer.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint))
        return module.backbone.state_dict()

    whole, resumed = run(None), run(step_folder(tmp_path, 2))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- merging


def test_merged_weights_are_the_formula_of_the_paper(architecture: Path):
    """W + alpha / rank * B A (Hu et al. 2021), on the keys and shapes of the plain model."""
    plain = build_model(spec(architecture, lora=None)).state_dict()
    model = trained(build_model(spec(architecture)))
    merged, state = merged_state(model), model.state_dict()
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in plain.items()}
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        expected = plain[name].double()
        if f"{layer}.base_layer.weight" in state:
            a, b = (state[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            expected = expected + 6 / 4 * b @ a
        assert (tensor - expected).abs().max() <= 1e-6, name


def test_merging_leaves_the_adapted_model_as_it_is(architecture: Path):
    model = trained(build_model(spec(architecture)))
    before = copy.deepcopy(model.state_dict())
    merged_state(model, dtype=torch.bfloat16)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_plain_models_merged_state_is_its_state(architecture: Path):
    model = build_model(spec(architecture, lora=None))
    merged, state = merged_state(model), model.state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[n], t) for n, t in state.items())


def test_biases_and_tied_embeddings_are_merged_too():
    """Phi-3 has neither; other architectures do."""
    model = small_model(tie_word_embeddings=True)
    projection = model.model.layers[0].mlp.down_proj
    projection.bias = torch.nn.Parameter(torch.randn(32))
    plain = copy.deepcopy(model)
    add_adapters(model, LORA, seed=0)
    trained(model)
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=0)


# --- export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_a_plain_model_with_the_adapted_models_logits(
    architecture: Path, tmp_path: Path, dtype: torch.dtype
):
    model = trained(build_model(spec(architecture)))
    export_model(model, load_tokenizer(str(architecture)), tmp_path / "m", dtype=dtype)
    assert reload_and_compare(model, tmp_path / "m", dtype=dtype) >= 0
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert not [n for n in written if "lora" in n or "base_layer" in n]
    assert {t.dtype for t in written.values()} == {dtype}
    assert not (tmp_path / "m" / "adapter").exists()
    if dtype == torch.float32:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        # measured: 1.5e-6 on logits of up to 0.5
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)


def test_the_next_stage_goes_on_from_an_export_with_adapters_of_its_own(
    architecture: Path, tmp_path: Path
):
    model = trained(build_model(spec(architecture)))
    export_model(model, load_tokenizer(str(architecture)), tmp_path / "m", with_adapter=True)
    following = build_model(spec(tmp_path / "m", init="pretrained", seed=1))
    torch.testing.assert_close(logits(following), logits(model), atol=1e-4, rtol=0)
    trained(following)
    export_model(following, load_tokenizer(str(architecture)), tmp_path / "n")
    assert reload_and_compare(following, tmp_path / "n", dtype=torch.float32) <= 1e-4


@pytest.mark.parametrize("fault", ["the base model", "other adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_of_other_weights_is_found(
    architecture: Path, tmp_path: Path, fault: str, dtype: torch.dtype
):
    model = trained(build_model(spec(architecture)))
    other = build_model(spec(architecture))
    if fault == "other adapters":
        other = trained(trained(other))
    export_model(other, load_tokenizer(str(architecture)), tmp_path / "m", dtype=dtype)
    with pytest.raises(ArtifactError, match="is not the trained model's") as error:
        reload_and_compare(model, tmp_path / "m", dtype=dtype)
    one_line(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_merge_is_found_by_its_logits(
    architecture: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Adapters forgotten alike in writing and in comparing the tensors."""
    base = build_model(spec(architecture, lora=None))
    monkeypatch.setattr(
        export, "merged_state", lambda model, dtype: merged_state(base, dtype=dtype)
    )
    model = trained(build_model(spec(architecture)))
    export_model(model, load_tokenizer(str(architecture)), tmp_path / "m", dtype=dtype)
    with pytest.raises(ArtifactError, match="logits differ"):
        reload_and_compare(model, tmp_path / "m", dtype=dtype)


# --- peft reads what we write


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_peft_loads_the_adapter_on_the_base_model_with_equal_logits(
    architecture: Path, tmp_path: Path
):
    tokenizer = load_tokenizer(str(architecture))
    export_model(build_model(spec(architecture, lora=None)), tokenizer, tmp_path / "base")
    model = trained(build_model(spec(tmp_path / "base", init="pretrained")))
    export_model(model, tokenizer, tmp_path / "m", with_adapter=True)
    folder = tmp_path / "m" / "adapter"
    names = {p.name for p in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    loaded = PeftModel.from_pretrained(base, folder)
    assert (logits(loaded) - plain).abs().max() > 0.1
    assert torch.equal(logits(loaded), logits(model))
    merged = loaded.merge_and_unload().state_dict()
    ours = merged_state(model)
    assert merged.keys() == ours.keys()
    assert all(torch.equal(merged[name], ours[name]) for name in ours)


def test_an_adapters_files_name_its_base_and_are_the_same_every_time(
    architecture: Path, tmp_path: Path
):
    export_model(
        build_model(spec(architecture, lora=None)), load_tokenizer(str(architecture)), tmp_path
    )
    model = build_model(spec(tmp_path, init="pretrained"))
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 6.0) and config["inference_mode"]
    names = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert config["target_modules"] == names
    assert not model.peft_config["default"].inference_mode

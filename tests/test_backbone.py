"""Model folders: what is loaded, what is refused, and what an export gives back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import ASSETS, phi3_config, write_small_folder
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from mediphi.backbone import (
    STOP_TOKENS,
    BackboneSpec,
    build_model,
    check_weights,
    float32_buffers,
    load_tokenizer,
    original_positions,
    resolve_folder,
)
from mediphi.errors import ArtifactError, UserError
from mediphi.export import export_model, reload_and_compare


def spec(folder: Path | str, **changes: Any) -> BackboneSpec:
    options = {"init": "random", "revision": "main", "kernel": "sdpa", **changes}
    return BackboneSpec(folder=str(folder), **options)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def exported(architecture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    export_model(build_model(spec(architecture)), load_tokenizer(str(architecture)), folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be damaged."""
    return shutil.copytree(exported, tmp_path / "copy")


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- building


def test_a_built_model_is_in_train_mode_in_float32_whatever_the_init(
    architecture: Path, exported: Path
):
    for chosen in (spec(architecture), spec(exported, init="pretrained")):
        model = build_model(chosen)
        assert all(module.training for module in model.modules())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert float32_buffers(model) == []


def test_from_pretrained_alone_would_leave_it_in_eval_mode(exported: Path):
    assert not AutoModelForCausalLM.from_pretrained(exported).training


def test_random_init_follows_its_seed(architecture: Path):
    def weights(seed: int) -> torch.Tensor:
        return build_model(spec(architecture, seed=seed)).lm_head.weight

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_a_bfloat16_checkpoint_is_trained_in_float32(architecture: Path, tmp_path: Path):
    model, tokenizer = build_model(spec(architecture)), load_tokenizer(str(architecture))
    export_model(model, tokenizer, tmp_path / "m", dtype=torch.bfloat16)
    loaded = build_model(spec(tmp_path / "m", init="pretrained"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert float32_buffers(loaded) == []


def test_bfloat16_rotary_buffers_are_found_and_their_angles_are_wrong(architecture: Path):
    """Trap: casting a whole model casts `inv_freq` too, and far positions turn by radians."""
    model = build_model(spec(architecture))
    names = {n for n, _ in model.named_buffers() if "inv_freq" in n}
    assert float32_buffers(model) == [] and names
    assert set(float32_buffers(model.bfloat16())) == names
    rotary = Phi3RotaryEmbedding(AutoConfig.from_pretrained(ASSETS / "phi35_mini"))
    exact = rotary.inv_freq.clone()
    angle = 4096 * (rotary.bfloat16().inv_freq.float() - exact).abs().max()
    assert angle > 3  # radians; measured: 6.6


@pytest.mark.parametrize("count", [1, 2])
def test_recomputed_layers_change_no_gradient(architecture: Path, count: int):
    from small_models import packed, random_documents

    from mediphi import attention

    batch = packed(random_documents([20, 11]))

    def gradients(recomputed: int) -> list[torch.Tensor]:
        model = build_model(spec(architecture, recomputed_layers=recomputed))
        layers = model.model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [
            number < recomputed for number in range(len(layers))
        ]
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention.boundaries(batch, "sdpa"),
        ).logits.square().sum().backward()
        return [p.grad for p in model.parameters()]

    for plain, recomputed in zip(gradients(0), gradients(count), strict=True):
        torch.testing.assert_close(plain, recomputed)


# --- export


def test_an_export_has_every_stop_id_template_and_tokenizer(exported: Path):
    generation = json.loads((exported / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in STOP_TOKENS]
    assert sorted(generation["eos_token_id"]) == sorted(ids) and len(set(ids)) == 3
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.chat_template == (ASSETS / "tiny" / "chat_template.jinja").read_text()
    original = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    text = "I10 Essential hypertension.<|end|>\nCafé 3 × 5 mg"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert (exported / "model.safetensors").is_file() and not list(exported.glob("*.bin"))


def test_a_strangers_export_names_no_attention_of_ours(exported: Path):
    assert "mediphi" not in (exported / "config.json").read_text()


def test_transformers_generates_from_the_export_and_stops_at_any_stop_token(exported: Path):
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("What is", return_tensors="pt")
    for name in STOP_TOKENS:
        stop = tokenizer.convert_tokens_to_ids(name)
        with torch.no_grad():  # a head that says nothing but this token
            model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()
            model.lm_head.bias[stop] = 9.0
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert out[0, prompt["input_ids"].shape[1] :].tolist() == [stop]


def test_the_published_dtype_is_written_and_read_back(architecture: Path, tmp_path: Path):
    model, tokenizer = build_model(spec(architecture)), load_tokenizer(str(architecture))
    export_model(model, tokenizer, tmp_path / "m", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert AutoConfig.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reload_and_compare(model, tmp_path / "m", dtype=torch.bfloat16)


# --- reload and compare


def test_an_export_gives_the_model_back_and_leaves_it_as_it_was(architecture: Path, folder: Path):
    model = build_model(spec(architecture))
    assert reload_and_compare(model, folder, dtype=torch.float32) <= 1e-4
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "mediphi_sdpa"


TENSORS = [
    "model.embed_tokens.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TENSORS)
def test_one_altered_number_in_an_export_is_found(
    architecture: Path, tmp_path: Path, name: str, dtype: torch.dtype
):
    model, tokenizer = build_model(spec(architecture)), load_tokenizer(str(architecture))
    export_model(model, tokenizer, tmp_path / "m", dtype=dtype)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{name} is not the trained model's") as error:
        reload_and_compare(model, tmp_path / "m", dtype=dtype)
    assert str(tmp_path / "m") in one_line(error)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("factors", ["short_factor", "long_factor"])
def test_a_changed_rope_factor_in_an_export_is_found(
    architecture: Path, folder: Path, factors: str
):
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    rope[factors] = [2.0, *rope[factors][1:]]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="not the trained model"):
        reload_and_compare(build_model(spec(architecture)), folder, dtype=torch.float32)


# --- folders that are refused


def damage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def write_index(folder: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


FAULTS: dict[str, tuple[Any, str]] = {
    "pickles only": (damage_pickle, "only pickles.*pytorch_model.bin.*refused"),
    "no config": (damage_no_config, "no config.json"),
    "no weights": (damage_no_weights, "no model.safetensors.*none"),
    "index names a missing file": (
        lambda f: write_index(f, {"weight_map": {"a": "model-00001.safetensors"}}),
        "names 'model-00001.safetensors'",
    ),
    "index names a file outside": (
        lambda f: write_index(f, {"weight_map": {"a": "../copy/model.safetensors"}}),
        "names '../copy/model.safetensors'",
    ),
    "index is not JSON": (lambda f: write_index(f, "{"), "not readable as JSON"),
    "index is a list": (lambda f: write_index(f, []), "weight_map"),
    "index without files": (lambda f: write_index(f, {"weight_map": {}}), "weight_map"),
    "index names a number": (lambda f: write_index(f, {"weight_map": {"a": 3}}), "weight_map"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_trusted_is_refused_before_loading(folder: Path, fault: str):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        check_weights(str(folder))
    assert str(folder) in one_line(error)
    with pytest.raises(UserError):
        build_model(spec(folder, init="pretrained"))


def test_a_pickle_beside_safetensors_is_not_read(folder: Path):
    expected = load_file(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    loaded = build_model(spec(folder, init="pretrained")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "fault", ["missing tensor", "wrong shape", "extra tensor", "NaN", "cut short"]
)
def test_weights_that_do_not_fit_the_config_are_refused(folder: Path, fault: str):
    """transformers would warn and draw the missing ones at random."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if fault == "missing tensor":
        tensors.pop("model.layers.1.mlp.down_proj.weight")
    elif fault == "wrong shape":
        tensors["model.norm.weight"] = torch.ones(7)
    elif fault == "extra tensor":
        tensors["model.layers.7.mlp.down_proj.weight"] = torch.ones(2, 2)
    elif fault == "NaN":
        tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        build_model(spec(folder, init="pretrained"))
    assert str(folder) in one_line(error)


REMOTE = "open('ran', 'w').write('remote code ran')\nclass Anything: ...\n"


@pytest.mark.parametrize("model_type", ["phi3", "never_heard_of"])
def test_remote_code_is_never_run(
    folder: Path, model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    (folder / "remote.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "remote.Anything", "AutoModelForCausalLM": "remote.Anything"}
    config |= {"model_type": model_type, "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    maps = {"auto_map": {"AutoTokenizer": ["remote.Anything", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | maps))
    for init in ("random", "pretrained"):
        if model_type == "phi3":  # transformers' own class, whatever the folder asks for
            assert type(build_model(spec(folder, init=init))).__module__.startswith("transformers.")
        else:
            with pytest.raises(UserError) as error:
                build_model(spec(folder, init=init))
            one_line(error)
    load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_missing_folder_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json") as error:
        build_model(spec(tmp_path / "nowhere", init="pretrained"))
    one_line(error)


# --- run directories in place of model folders


def test_a_run_directory_stands_for_its_model(exported: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir / "model")
    (run_dir / "config.yaml").write_text("# config_hash: 1234\n")
    assert resolve_folder(str(run_dir)) == str(run_dir / "model")
    build_model(spec(resolve_folder(str(run_dir)), init="pretrained"))


def test_a_model_folder_or_hub_id_stands_for_itself(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "m")
    shutil.copytree(exported, tmp_path / "m" / "model")  # config.json above decides
    for path in (str(tmp_path / "m"), "microsoft/Phi-3.5-mini-instruct", str(tmp_path / "none")):
        assert resolve_folder(path) == path


def test_an_unfinished_run_is_refused_in_one_line(exported: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("# config_hash: 1234\n")
    # the model of a phase before the last one is not the run's
    shutil.copytree(exported, tmp_path / "checkpoints" / "phase1" / "model")
    with pytest.raises(UserError, match="is not finished: run the same command again") as error:
        resolve_folder(str(tmp_path))
    assert str(tmp_path) in one_line(error)


# --- tokenizers


def test_a_tokenizer_without_stop_tokens_or_template_is_refused(tmp_path: Path):
    folder = write_small_folder(tmp_path / "a")
    text = (folder / "tokenizer.json").read_text().replace("<|assistant|>", "<|bot|>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"lacks <\|assistant\|>"):
        load_tokenizer(str(folder))
    other = write_small_folder(tmp_path / "b")
    (other / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(other))


TEXTS = [
    "Essential (primary) hypertension, ICD-10-CM I10.",
    "  two  spaces,\ttabs\nand\n\nlines \n",
    "naïve 病人 🩺 β-blocker µg",
    "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n",
    "a<|endoftext|>b<s></s>",
    "",
]


@pytest.mark.parametrize("name", ["phi35_mini", "tiny"])
@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_those_of_the_tokenizers_library(name: str, text: str):
    raw = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
    expected = raw.encode(text, add_special_tokens=False).ids
    tokenizer = load_tokenizer(str(ASSETS / name))
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer(text)["input_ids"] == expected  # neither adds a BOS of its own


def test_phi35_minis_ids_are_the_published_ones():
    tokenizer = load_tokenizer(str(ASSETS / "phi35_mini"))
    ids = tokenizer.convert_tokens_to_ids([*STOP_TOKENS, "<|system|>", "<|user|>"])
    assert ids == [32007, 32001, 32000, 32006, 32010]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 32000)
    generation = json.loads((ASSETS / "phi35_mini" / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [32000, 32001, 32007]


MESSAGES = [
    {"role": "system", "content": "{instruction}"},
    {"role": "user", "content": "{document}"},
    {"role": "assistant", "content": "{answer}"},
]


@pytest.mark.parametrize("name", ["phi35_mini", "tiny"])
def test_the_chat_template_renders_as_published(name: str):
    tokenizer = load_tokenizer(str(ASSETS / name))
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    chat = (
        "<|system|>\n{instruction}<|end|>\n<|user|>\n{document}<|end|>\n"
        "<|assistant|>\n{answer}<|end|>\n"
    )
    assert whole == chat + "<|endoftext|>"
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == chat[: chat.index("{answer}")]


@pytest.mark.parametrize("name", ["phi35_mini", "tiny"])
def test_special_tokens_swallow_the_newline_behind_them(name: str):
    tokenizer = load_tokenizer(str(ASSETS / name))
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"):
        with_newline = tokenizer(f"{token}\nx", add_special_tokens=False)["input_ids"]
        without = tokenizer(f"{token}x", add_special_tokens=False)["input_ids"]
        assert with_newline == without
        assert with_newline[0] == tokenizer.convert_tokens_to_ids(token)
    # and the control: an ordinary token does not
    plain = tokenizer("x\ny", add_special_tokens=False)["input_ids"]
    assert plain != tokenizer("xy", add_special_tokens=False)["input_ids"]


def test_both_tokenizers_treat_their_special_tokens_alike():
    def behaviour(name: str) -> dict[str, tuple[bool, ...]]:
        raw = json.loads((ASSETS / name / "tokenizer.json").read_text())
        tokens = [t for t in raw["added_tokens"] if t["content"].startswith("<|")]
        return {t["content"]: (t["lstrip"], t["rstrip"], t["special"]) for t in tokens}

    phi, tiny = behaviour("phi35_mini"), behaviour("tiny")
    shared = phi.keys() & tiny.keys()
    assert {*STOP_TOKENS, "<|system|>", "<|user|>"} <= shared
    assert {t: phi[t] for t in shared} == {t: tiny[t] for t in shared}


# --- LongRoPE


def test_phi35_minis_config_is_the_published_one():
    config = AutoConfig.from_pretrained(ASSETS / "phi35_mini")
    rope = config.rope_parameters
    assert (len(rope["short_factor"]), len(rope["long_factor"])) == (48, 48)
    assert original_positions(config) == 4096
    assert config.max_position_embeddings == 131072
    sizes = (config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    assert (*sizes, config.vocab_size) == (3072, 32, 8192, 32064)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 32)


def test_original_positions_are_read_from_longrope_alone():
    assert original_positions(AutoConfig.from_pretrained(ASSETS / "tiny")) == 512
    assert original_positions(phi3_config()) == 64
    assert original_positions(phi3_config(rope_scaling=None)) is None


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_model_is_built_on_the_cpu_whatever_the_context(
    init: str, architecture: Path, tmp_path: Path
):
    """Lightning builds in the GPU's; a base install has no accelerate to load there."""
    plain = build_model(spec(architecture))
    folder = tmp_path / "m"
    export_model(plain, load_tokenizer(str(architecture)), folder)
    wanted = spec(architecture) if init == "random" else spec(folder, init="pretrained")
    with torch.device("meta"):
        model = build_model(wanted)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

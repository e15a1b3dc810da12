"""Models that fit, and one line for each pair that does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import (
    INDEX,
    change_json,
    change_tensors,
    copied,
    into_shards,
    write_model,
)

from mediphi.errors import ArtifactError
from mediphi.merge.agreement import check_agreement
from mediphi.merge.checkpoints import open_checkpoint
from mediphi.merge.vocabularies import stop_ids

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def pair(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    return copied(model, tmp_path / "a"), copied(model, tmp_path / "b")


def agree(a: Path, b: Path, *, mixed_dtypes: bool = False) -> list[str]:
    return check_agreement([open_checkpoint(a), open_checkpoint(b)], mixed_dtypes=mixed_dtypes)


def refusal(a: Path, b: Path, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        agree(a, b, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{a.parent}/", "")


def test_the_same_model_agrees_however_it_is_stored(pair: tuple[Path, Path]) -> None:
    a, b = pair
    assert agree(a, into_shards(b)) == []
    assert (b / INDEX).exists()


ARCHITECTURE = {
    "model_type": ("phi3", "llama"),
    "hidden_size": (32, 64),
    "num_hidden_layers": (1, 2),
    "num_attention_heads": (4, 8),
    "num_key_value_heads": (2, 4),
    "vocab_size": (4096, 5000),
    "tie_word_embeddings": (False, True),
    "rms_norm_eps": (1e-05, 1e-06),
    "max_position_embeddings": (2048, 4096),
    "original_max_position_embeddings": (512, 1024),
    "hidden_act": ("silu", "gelu"),
}


@pytest.mark.parametrize("field", ARCHITECTURE)
def test_another_architecture(field: str, pair: tuple[Path, Path]) -> None:
    a, b = pair
    ours, theirs = ARCHITECTURE[field]
    if field == "tie_word_embeddings":  # else b is refused for itself
        change_tensors(b, lambda t: t.update({"lm_head.weight": t[EMBEDDINGS].clone()}))
    change_json(b / "config.json", **{field: theirs})
    assert refusal(a, b) == (
        f"b: {field}={theirs!r} in config.json, {ours!r} in a; only models of one architecture "
        "can be merged"
    )


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"rope_theta": 5e5}, "b: rope.rope_theta=500000.0 in config.json, 10000.0 in a"),
        ({"rope_scaling": None}, "b: rope.rope_type='default' in config.json, 'longrope' in a"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [9.0] * 4}},
            "b: rope.short_factor=[9.0, 9.0, 9.0, 9.0] in config.json, [1.0, 1.1, 1.2, 1.3] in a",
        ),
    ],
)
def test_another_rope(changes: dict[str, Any], shown: str, pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_json(b / "config.json", **changes)
    assert refusal(a, b) == f"{shown}; only models of one architecture can be merged"


def test_the_two_ways_to_write_a_rope_agree(pair: tuple[Path, Path]) -> None:
    """transformers 4: rope_scaling and rope_theta; 5: rope_parameters."""
    a, b = pair
    config = json.loads((b / "config.json").read_text())
    scaling = dict(config["rope_scaling"])
    old = {"type": scaling.pop("rope_type"), **scaling}
    change_json(a / "config.json", rope_scaling=old)
    inner = {**config["rope_scaling"], "rope_theta": 10000.0}
    inner |= {"original_max_position_embeddings": 512}
    change_json(b / "config.json", rope_scaling=None, rope_theta=None, rope_parameters=inner)
    assert agree(a, b) == []
    change_json(b / "config.json", rope_parameters=inner | {"rope_theta": 1.0})
    assert "rope.rope_theta=1.0" in refusal(a, b)


def test_what_does_not_change_the_numbers_may_differ(pair: tuple[Path, Path]) -> None:
    a, b = pair
    changes = {"transformers_version": "1", "dtype": "bfloat16", "torch_dtype": "float16"}
    changes |= {"use_cache": False, "resid_pdrop": 0.5, "eos_token_id": [7], "auto_map": {"A": "b"}}
    change_json(b / "config.json", **changes)
    assert agree(a, b) == []


def test_a_tensor_more_or_less(pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_tensors(b, lambda tensors: tensors.pop("model.norm.weight"))
    end = "; only models with the same tensors can be merged"
    assert refusal(a, b) == f"b: lacks tensor model.norm.weight, which a has{end}"
    assert refusal(b, a) == f"b: lacks tensor model.norm.weight, which a has{end}"


def test_tied_and_untied_embeddings(pair: tuple[Path, Path]) -> None:
    """Also where neither config tells."""
    a, b = pair
    for folder in pair:
        change_json(folder / "config.json", tie_word_embeddings=None)
    change_tensors(b, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(a, b) == (
        "b: lacks tensor lm_head.weight, which a has (one ties its embeddings, one does not); "
        "only models with the same tensors can be merged"
    )


def test_both_tied_agree(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        change_json(folder / "config.json", tie_word_embeddings=True)
        change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert agree(*pair) == []


def test_another_shape(pair: tuple[Path, Path]) -> None:
    a, b = pair
    cut = lambda tensors: tensors.update({EMBEDDINGS: tensors[EMBEDDINGS][:-1].clone()})  # noqa: E731
    change_tensors(b, cut)
    assert refusal(a, b) == (
        f"b: tensor {EMBEDDINGS} has shape [4095, 32], [4096, 32] in a; only models of one size "
        "and vocabulary can be merged"
    )


def retyped(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({EMBEDDINGS: tensors[EMBEDDINGS].to(dtype)})


def test_other_dtypes_need_a_stated_one(pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_tensors(b, retyped(torch.bfloat16))
    assert refusal(a, b) == (
        f"b: tensor {EMBEDDINGS} is bfloat16, float32 in a; state which the merged model shall "
        "have: merge.dtype"
    )
    assert agree(a, b, mixed_dtypes=True) == []


def test_whole_numbers_are_no_floats(pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_tensors(b, retyped(torch.int32))
    assert refusal(a, b, mixed_dtypes=True) == (
        f"b: tensor {EMBEDDINGS} is int32, float32 in a; only models with the same tensors can be "
        "merged"
    )


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


OTHER_TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "vocabulary or merges": lambda t: t["model"]["vocab"].update(
        dict(zip(list(t["model"]["vocab"])[500:502], (501, 500), strict=True))
    ),
    "added_tokens": lambda t: t["added_tokens"][-1].update(content="<|other|>"),
    "normalizer": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "pre_tokenizer": lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
    "post_processor": lambda t: t.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
        }
    ),
}


@pytest.mark.parametrize("part", OTHER_TOKENIZERS)
def test_another_tokenizer(part: str, pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_tokenizer(b, OTHER_TOKENIZERS[part])
    assert refusal(a, b) == (
        f"b: tokenizer.json differs from that of a ({part}); only models of one tokenizer can be "
        "merged"
    )


def test_other_merges(pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_tokenizer(b, lambda t: t["model"]["merges"].reverse())
    assert "(vocabulary or merges)" in refusal(a, b)


def test_the_same_tokenizer_written_otherwise_agrees(pair: tuple[Path, Path]) -> None:
    def rewrite(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        texts = [" ".join(m) if isinstance(m, list) else m for m in merges]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        content["model"]["merges"] = texts if merges != texts else pairs
        content["truncation"] = {"max_length": 5}
        content["post_processor"] = {"type": "ByteLevel", "trim_offsets": False}

    a, b = pair
    change_tokenizer(b, rewrite)
    assert (a / "tokenizer.json").read_bytes() != (b / "tokenizer.json").read_bytes()
    assert agree(a, b) == []


@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token"])
def test_a_token_that_only_one_adds_to_every_text(flag: str, pair: tuple[Path, Path]) -> None:
    a, b = pair
    change_json(a / "tokenizer_config.json", **{flag: False})
    change_json(b / "tokenizer_config.json", **{flag: True})
    line = f"tokenizer_config.json differs from that of a ({flag}); only models of one tokenizer "
    assert refusal(a, b) == f"b: {line}can be merged"
    (a / "tokenizer_config.json").unlink()
    assert flag in refusal(a, b)
    change_json(b / "tokenizer_config.json", **{flag: None})
    assert agree(b, copied(b, b.parent / "c")) == []


def test_no_tokenizer_beside_one(pair: tuple[Path, Path]) -> None:
    a, b = pair
    (b / "tokenizer.json").unlink()
    line = "b: no tokenizer.json, which a has; if the tokenizers are the same, copy it"
    assert refusal(a, b) == line
    assert refusal(b, a) == line
    (a / "tokenizer.json").unlink()
    assert agree(a, b) == []


def test_tokenizers_without_json_are_compared_bytewise(pair: tuple[Path, Path]) -> None:
    a, b = pair
    for folder in pair:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"the same")
    assert agree(a, b) == []
    (b / "tokenizer.model").write_bytes(b"another")
    assert refusal(a, b).startswith("b: tokenizer.model differs from that of a (content); ")


@pytest.mark.parametrize("in_config", [False, True])
def test_another_chat_template_is_told(in_config: bool, pair: tuple[Path, Path]) -> None:
    a, b = pair
    if in_config:
        (b / "chat_template.jinja").unlink()
        change_json(b / "tokenizer_config.json", chat_template="{{ messages }}")
    else:
        (b / "chat_template.jinja").write_text("{{ messages }}")
    assert agree(a, b) == [f"{b}: its chat template is another; the one of {a} is taken"]


def test_the_same_chat_template_elsewhere_agrees(pair: tuple[Path, Path]) -> None:
    a, b = pair
    text = (b / "chat_template.jinja").read_text()
    (b / "chat_template.jinja").unlink()
    change_json(b / "tokenizer_config.json", chat_template=text)
    assert agree(a, b) == []


def test_a_tokenizer_beyond_the_vocabulary(pair: tuple[Path, Path]) -> None:
    a, b = pair
    for folder in pair:
        change_tokenizer(
            folder, lambda t: t["added_tokens"].append({"id": 4096, "content": "<new>"})
        )
    assert refusal(a, b) == (
        "a: the tokenizer has ids up to 4096, the model a vocabulary of 4096; they do not belong "
        "together"
    )


@pytest.mark.parametrize("content", ["{}", '{"model": {"vocab": 3}}', "{"])
def test_a_damaged_tokenizer(content: str, pair: tuple[Path, Path]) -> None:
    a, b = pair
    for folder in pair:
        (folder / "tokenizer.json").write_text(content)
    assert refusal(a, b).startswith("a/tokenizer.json: ")


def test_stop_ids_are_those_of_all_models(pair: tuple[Path, Path]) -> None:
    a, b = pair
    vocab = {
        t["content"]: t["id"]
        for t in json.loads((a / "tokenizer.json").read_text())["added_tokens"]
    }
    change_json(a / "generation_config.json", eos_token_id=[7])
    change_json(b / "generation_config.json", eos_token_id=8)
    change_json(b / "config.json", eos_token_id=9)
    ids = stop_ids([open_checkpoint(a), open_checkpoint(b)])
    phi = [vocab[token] for token in ("<|end|>", "<|assistant|>", "<|endoftext|>")]
    assert sorted(ids) == sorted({7, 8, 9, *phi})
    assert len(set(phi)) == 3
    change_json(b / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ArtifactError, match=r"b: eos_token_id='</s>' is no id"):
        stop_ids([open_checkpoint(a), open_checkpoint(b)])

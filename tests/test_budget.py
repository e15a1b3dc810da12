"""Sizes and operations, known before a run starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from small_models import ASSETS, packed, random_documents, small_model, write_small_folder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mediphi import attention
from mediphi.backbone import BackboneSpec, build_model
from mediphi.budget import Budget, estimate
from mediphi.config import Config, load
from mediphi.config.stages import SftStage
from mediphi.engine import training_flops
from mediphi.errors import UserError
from mediphi.lora import add_adapters
from mediphi.modules.losses import chunked_cross_entropy


def config(*overrides: str) -> Config:
    return load(composed("stage=pit", "corpus=medcode", *overrides))


def test_phi35_mini_has_the_published_number_of_parameters():
    budget = estimate(str(ASSETS / "phi35_mini"), config=config())
    assert budget.num_parameters == 3_821_079_552
    # all but the embedding and 65 norms of 3072
    assert budget.num_matmul_parameters == 3_821_079_552 - 32064 * 3072 - 65 * 3072
    assert budget.weights_dtype == torch.bfloat16


def test_the_estimate_counts_what_a_real_model_has(tmp_path: Path):
    folder = write_small_folder(tmp_path / "model")
    budget = estimate(str(folder), config=config())
    model = AutoModelForCausalLM.from_config(budget.model_config)
    assert budget.num_parameters == sum(p.numel() for p in model.parameters())
    assert budget.weights_dtype == torch.float32


def counted_flops(model: Any, batch: Any) -> dict[str, int]:
    """Operations of forward and backward by torch's own counter, attention apart."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not counted
        hidden = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention.boundaries(batch, "sdpa"),
        ).last_hidden_state[0]
        out = chunked_cross_entropy(
            hidden[batch.target_index], model.lm_head.weight, batch.label_ids, chunk_tokens=16
        )
        out.total.backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts.pop(torch.ops.aten.bmm)
    return {"attention": products, "weights": sum(counts.values())}


def test_training_flops_are_what_torch_counts():
    """Attention is counted as the full square there: causal attention needs (L + 1) / 2L of it."""
    length, num_documents = 40, 3
    model = small_model(num_key_value_heads=4)
    batch = packed(random_documents([length] * num_documents))
    counted = counted_flops(model, batch)
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.lm_head.weight.numel()
    budget = Budget(model.config, 0, sum(linear), head, 0, torch.float32, 0)
    share = (length + 1) / (2 * length)
    assert budget.batch_flops(batch) == counted["weights"] + counted["attention"] * share


@pytest.mark.parametrize("targets", ["all-linear", "[qkv_proj]"])
def test_flops_beside_adapters_are_what_torch_counts(tmp_path: Path, targets: str):
    """But for the first layer's first product: its input needs no gradient, and is counted."""
    folder = write_small_folder(tmp_path / "model", num_key_value_heads=4)
    lora = ("stage.lora.rank=3", f"stage.lora.target_modules={targets}")
    chosen = load(composed("stage=sft", "corpus=mediflow", *lora))
    assert isinstance(chosen.stage, SftStage) and chosen.stage.lora is not None
    budget = estimate(str(folder), config=chosen)
    model: Any = AutoModelForCausalLM.from_config(
        budget.model_config, attn_implementation="mediphi_sdpa"
    ).train()
    full = replace(budget, num_adapter_parameters=0)
    add_adapters(model, chosen.stage.lora, seed=0)
    length, num_documents = 40, 3
    batch = packed(random_documents([length] * num_documents))
    counted = counted_flops(model, batch)
    attention_flops = counted["attention"] * (length + 1) / (2 * length)
    first = model.model.layers[0].self_attn.qkv_proj
    unneeded = sum(p.numel() for n, p in first.named_parameters() if "lora_B" not in n)
    spared = 2 * unneeded * length * num_documents
    assert budget.batch_flops(batch) == counted["weights"] + attention_flops + spared
    assert budget.batch_flops(batch) < 0.8 * full.batch_flops(batch)


def test_attention_flops_grow_with_the_square_of_documents_not_of_the_row():
    budget = Budget(small_model().config, 0, 0, 0, 0, torch.float32, 0)
    one, two = (budget.batch_flops(packed(random_documents(n))) for n in ([64], [32, 32]))
    assert one == 12 * 2 * 32 * 64 * 65 / 2
    assert two == 2 * 12 * 2 * 32 * 32 * 33 / 2


def test_flops_worked_by_hand():
    """Six per weight and token, frozen four; two tokens see three pairs, twelve per layer and unit
    each."""
    sizes = {"num_matmul_parameters": 10, "hidden": 4, "layers": 1, "pairs": 3, "tokens": 2}
    assert training_flops(**sizes) == 6 * 10 * 2 + 12 * 4 * 3
    assert training_flops(**sizes, num_frozen_parameters=7) == (6 * 3 + 4 * 7) * 2 + 12 * 4 * 3


def test_the_states_on_disk_are_counted():
    budget = estimate(str(ASSETS / "phi35_mini"), config=config("hardware.micro_batch=1"))
    assert budget.disk_bytes > 3 * 12 * budget.num_parameters


TINY = json.loads((ASSETS / "tiny" / "config.json").read_text())
DAMAGED = [
    None,
    "{",
    "[]",
    json.dumps({"model_type": "never_heard_of"}),
    json.dumps(TINY | {"hidden_size": "many"}),
    json.dumps(TINY | {"num_attention_heads": 0}),
    json.dumps(TINY | {"rope_scaling": {"rope_type": "unheard_of"}}),
    json.dumps(TINY | {"vocab_size": None}),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_config_is_refused_in_one_line(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no config can be loaded") as error:
        estimate(str(tmp_path), config=config())
    assert "\n" not in str(error.value)
    spec = BackboneSpec(str(tmp_path), init="random", revision="main", kernel="sdpa")
    with pytest.raises(UserError) as error:
        build_model(spec)
    assert "\n" not in str(error.value)

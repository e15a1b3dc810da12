"""Sizes, operations and memory, known before a run starts."""

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
from mediphi.budget import USABLE, Budget, _activations, estimate
from mediphi.config import Config, load
from mediphi.config.stages import SftStage
from mediphi.engine import Device, training_flops
from mediphi.errors import UserError
from mediphi.lora import add_adapters
from mediphi.modules.causal_lm import hidden_states
from mediphi.modules.losses import chunked_cross_entropy
from mediphi.strategies.memory import Sizes, added, master_copy

CPU = Device(type="cpu", name="test", precision="32-true", kernel="sdpa")
H200 = Device(
    "cuda", "H200", "bf16-mixed", "varlen", loss_chunk_tokens=2048, memory_bytes=150 * 10**9
)
H100 = replace(H200, name="H100", memory_bytes=85 * 10**9)


def config(*overrides: str) -> Config:
    return load(composed("stage=pit", "corpus=medcode", *overrides))


def test_phi35_mini_has_the_published_number_of_parameters():
    budget = estimate(str(ASSETS / "phi35_mini"), config=config(), device=CPU)
    assert budget.num_parameters == 3_821_079_552
    # all but the embedding and 65 norms of 3072
    assert budget.num_matmul_parameters == 3_821_079_552 - 32064 * 3072 - 65 * 3072
    assert budget.weights_dtype == torch.bfloat16


def test_the_estimate_counts_what_a_real_model_has(tmp_path: Path):
    folder = write_small_folder(tmp_path / "model")
    budget = estimate(str(folder), config=config(), device=CPU)
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
    budget = Budget(model.config, 0, sum(linear), head, 0, torch.float32, 0, 0)
    share = (length + 1) / (2 * length)
    assert budget.batch_flops(batch) == counted["weights"] + counted["attention"] * share


@pytest.mark.parametrize("targets", ["all-linear", "[qkv_proj]"])
def test_flops_beside_adapters_are_what_torch_counts(tmp_path: Path, targets: str):
    """But for the first layer's first product: its input needs no gradient, and is counted."""
    folder = write_small_folder(tmp_path / "model", num_key_value_heads=4)
    lora = ("stage.lora.rank=3", f"stage.lora.target_modules={targets}")
    chosen = load(composed("stage=sft", "corpus=mediflow", *lora))
    assert isinstance(chosen.stage, SftStage) and chosen.stage.lora is not None
    budget = estimate(str(folder), config=chosen, device=CPU)
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
    budget = Budget(small_model().config, 0, 0, 0, 0, torch.float32, 0, 0)
    one, two = (budget.batch_flops(packed(random_documents(n))) for n in ([64], [32, 32]))
    assert one == 12 * 2 * 32 * 64 * 65 / 2
    assert two == 2 * 12 * 2 * 32 * 32 * 33 / 2


def test_flops_worked_by_hand():
    """Six per weight and token, frozen four; two tokens see three pairs, twelve per layer and unit
    each."""
    sizes = {"num_matmul_parameters": 10, "hidden": 4, "layers": 1, "pairs": 3, "tokens": 2}
    assert training_flops(**sizes) == 6 * 10 * 2 + 12 * 4 * 3
    assert training_flops(**sizes, num_frozen_parameters=7) == (6 * 3 + 4 * 7) * 2 + 12 * 4 * 3


MORE = [
    ("hardware.micro_batch=2", "hardware.micro_batch=1"),
    ("stage.max_length=4096", "stage.max_length=1024"),
    ("hardware.activation_checkpointing=false", "hardware.activation_checkpointing=true"),
]


@pytest.mark.parametrize(("more", "less"), MORE)
def test_what_costs_memory_is_estimated_to_cost_it(more: str, less: str):
    common = ("stage.global_batch=4", "hardware.micro_batch=1")
    large, small = (
        estimate(str(ASSETS / "tiny"), config=config(*common, change), device=CPU).memory_bytes
        for change in (more, less)
    )
    assert large > small


def test_prompts_that_are_not_shared_are_estimated_twice():
    shared, separate = (
        estimate(
            str(ASSETS / "tiny"),
            config=load(composed("stage=dpo", "corpus=mediflow_dpo", f"stage.share_prompt={own}")),
            device=CPU,
        ).memory_bytes
        for own in ("true", "false")
    )
    assert separate > 1.5 * shared


PHI = str(ASSETS / "phi35_mini")
PLANS = [
    (CPU, 4, 0),  # whose memory is not ours to plan
    (H200, 2, 0),
    (H200, 4, 10),
    (H100, 1, 27),
    (replace(H200, memory_bytes=60 * 10**9), 1, 32),  # too little for the weights
]


@pytest.mark.parametrize(("device", "rows", "layers"), PLANS)
def test_no_more_layers_are_recomputed_than_the_memory_asks_for(
    device: Device, rows: int, layers: int
):
    """Phi-3.5-mini with all parameters, rows of 4,096 tokens; one layer less would be too much."""

    def plan(**changes: Any) -> Budget:
        own = ("stage.max_length=4096", "stage.global_batch=4", f"hardware.micro_batch={rows}")
        return estimate(PHI, config=config(*own), device=replace(device, **changes))

    planned = plan()
    assert planned.recomputed_layers == layers
    if 0 < layers < 32:
        assert planned.memory_bytes <= USABLE * device.memory_bytes
        less = int(planned.memory_bytes / USABLE) - 1
        assert plan(memory_bytes=less).recomputed_layers == layers + 1


@pytest.mark.parametrize(("said", "layers"), [("true", 32), ("false", 0)])
def test_the_config_has_the_last_word_on_recomputing(said: str, layers: int):
    for device in (CPU, H200, H100):
        chosen = config(f"hardware.activation_checkpointing={said}")
        assert estimate(PHI, config=chosen, device=device).recomputed_layers == layers


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_eight_processes_that_split_the_model_keep_an_eighth_each(strategy: str):
    """Of ZeRO-3's copy of the weights too."""
    options = ("hardware.devices=8", "hardware.micro_batch=1", "stage.global_batch=8")
    whole, split = (
        estimate(PHI, config=config(*options, f"hardware.strategy={own}"), device=CPU)
        for own in ("ddp", strategy)
    )
    gathered = added(PHI_SIZES, strategy=strategy, precision=CPU.precision)
    state = 16 * whole.num_parameters
    share = (state + master_copy(PHI_SIZES, strategy=strategy)) / 8
    assert whole.memory_bytes - split.memory_bytes == state - share - sum(gathered.values())


PHI_SIZES = Sizes(
    parameters=3_821_079_552, trained=3_821_079_552, largest_layer=113_252_352, root=197_004_288
)


def test_phi35_minis_training_state_alone_fills_61_gigabytes():
    """float32 weights, gradients and two moments; one H200 holds them, one H100 does not."""
    budget = estimate(PHI, config=config("hardware.micro_batch=1"), device=CPU)
    assert 61e9 < budget.memory_bytes < 141e9
    assert budget.disk_bytes > 3 * 12 * budget.num_parameters


def held_bytes(function: Any) -> int:
    """Bytes of different tensors that autograd keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out is not None
    return sum(kept.values())


def held_activations(*, recomputed: int, precision: str) -> int:
    """Of 256 tokens more in the tiny model: what does not depend on the row's length falls away."""
    spec = BackboneSpec(
        str(ASSETS / "tiny"), "random", "main", "sdpa", recomputed_layers=recomputed
    )
    model: Any = build_model(spec)

    def run(lengths: list[int]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return hidden_states(model, packed(random_documents(lengths)), "sdpa")

    long, short = ([200, 100, 150, 62], [100, 50, 75, 31])
    return held_bytes(lambda: run(long)) - held_bytes(lambda: run(short))


def estimated_activations(*, recomputed: int, precision: str) -> int:
    chosen = config("hardware.micro_batch=1", "stage.max_length=256")
    device = replace(CPU, precision=precision)
    budget = estimate(str(ASSETS / "tiny"), config=chosen, device=device)
    return _activations(budget.model_config, chosen, device, recomputed=recomputed)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_activations_of_the_tiny_model_are_of_the_estimated_size(precision: str):
    """Against what autograd really keeps; embedding and last norm are not in the estimate."""
    plain: dict[str, Any] = {"recomputed": 0, "precision": precision}
    held = held_activations(**plain)
    assert 0.9 < held / estimated_activations(**plain) < 1.1  # measured: 1.02, 1.05
    fewer = {**plain, "recomputed": 2}
    saved = held - held_activations(**fewer)
    estimated = estimated_activations(**plain) - estimated_activations(**fewer)
    assert 0.9 < saved / estimated < 1.1  # measured: 0.99


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
        estimate(str(tmp_path), config=config(), device=CPU)
    assert "\n" not in str(error.value)
    spec = BackboneSpec(str(tmp_path), init="random", revision="main", kernel="sdpa")
    with pytest.raises(UserError) as error:
        build_model(spec)
    assert "\n" not in str(error.value)

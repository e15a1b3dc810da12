"""The model folder: tokenizer, stop tokens, positions, weights; does one fit the other?"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM

from mediphi.backbone import (
    LOAD_ERRORS,
    STOP_TOKENS,
    BackboneSpec,
    build_model,
    cannot_be_loaded,
    check_vocabulary,
    check_weights,
    float32_buffers,
    original_positions,
)
from mediphi.budget import Budget
from mediphi.config.schema import Config
from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.doctor.hub import WEIGHTS, is_cached, is_local
from mediphi.engine import Device
from mediphi.errors import UserError
from mediphi.resources import free_memory

GB = 1e9
ROOM = 1.3
"""Memory asked for, as a multiple of the weights."""
MOST_ON_CPU = 500_000_000
"""Parameters of a model that a CPU looks at whole: seconds, not minutes."""
NUM_LAYERS = 2
"""Of a larger one."""
GENERATION_CONFIG = "generation_config.json"


class Built(NamedTuple):
    """A causal LM to look at; `instead` says why it is not the whole one, empty where it is."""

    model: Any
    instead: str


def build(config: Config, budget: Budget, device: Device, *, folder: str) -> Built:
    """The model in eval mode on the device; where the whole would take too much, its first layers,
    which attention, positions and packing are the same for.

    Raises:
        UserError: weights that are there and cannot be used.
    """
    reads = config.model.is_pretrained and weights_are_here(folder, config.model.revision)
    instead = _too_much(budget, device)
    if config.model.is_pretrained and not reads:
        instead = "the weights are not downloaded yet"
    if instead:
        model = _first_layers(config, budget, folder=folder, reads=reads)
    else:
        model = build_model(
            BackboneSpec(
                folder=folder,
                init="pretrained" if reads else "random",
                revision=config.model.revision,
                kernel=device.kernel,
                seed=config.seed,
            )
        )
    return Built(model.eval().to(device.type), instead)  # type: ignore[arg-type]


def _too_much(budget: Budget, device: Device) -> str:
    """Why the whole model cannot be looked at here, empty where it can."""
    needed, free = ROOM * 4 * budget.num_parameters, free_memory()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    elif budget.num_parameters > MOST_ON_CPU:
        return f"{budget.num_parameters / 1e9:.1f} billion parameters are slow on a CPU"
    return f"it takes {needed / GB:.1f} GB, {free / GB:.1f} are free" if needed > free else ""


def _first_layers(config: Config, budget: Budget, *, folder: str, reads: bool) -> Any:
    small = copy.deepcopy(budget.model_config)
    small.num_hidden_layers = min(NUM_LAYERS, small.num_hidden_layers)
    torch.manual_seed(config.seed)
    if not reads:
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    check_weights(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=small,
            dtype=torch.float32,
            use_safetensors=True,
            revision=config.model.revision,
            local_files_only=True,
            trust_remote_code=False,
        )
    except LOAD_ERRORS as error:
        raise cannot_be_loaded(folder, error) from None


def weights_are_here(folder: str, revision: str) -> bool:
    """In a local folder, or in the hub's cache."""
    if is_local(folder):
        return True  # or not: then loading says what is missing
    return is_cached(folder, WEIGHTS, revision)


def vocabulary(case: Case) -> Iterator[Finding]:
    """Tokenizer and model config belong together."""
    tokenizer, config = case.tokenizer(), case.budget().model_config
    try:
        check_vocabulary(tokenizer, config)
    except UserError as error:
        remedy = "take tokenizer files and config.json from one and the same model"
        yield failure("tokenizer", str(error), remedy=remedy)
        return
    largest = max(tokenizer.get_vocab().values())
    yield ok("tokenizer", f"ids up to {largest:,}, the model has {config.vocab_size:,} rows")


def stop_tokens(case: Case) -> Iterator[Finding]:
    """What the chat template ends an answer with must be what generation stops at."""
    tokenizer, folder = case.tokenizer(), case.folder()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS}
    told = ", ".join(f"{token} {number}" for token, number in ids.items())
    stops = _generation_stops(folder, case.config.model.revision)
    if stops is None:
        text = f"{told}; no {GENERATION_CONFIG} there, a run writes one with all of them"
        yield ok("stop tokens", text)
        return
    missing = [token for token, number in ids.items() if number not in stops]
    if missing:
        remedy = f"add their ids to eos_token_id in {GENERATION_CONFIG}; a run's model has them all"
        text = f"{GENERATION_CONFIG} does not stop at {', '.join(missing)}: answers run on"
        yield warning("stop tokens", text, remedy=remedy)
    else:
        yield ok("stop tokens", f"{told}, all in {GENERATION_CONFIG}")


def _generation_stops(folder: str, revision: str) -> set[int] | None:
    """Ids that generation stops at; None where the folder does not say."""
    path: Any = Path(folder) / GENERATION_CONFIG
    if not is_local(folder):
        path = try_to_load_from_cache(folder, GENERATION_CONFIG, revision=revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    stops = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id")
    return set(stops) if isinstance(stops, list) else {stops}


def positions(case: Case) -> Iterator[Finding]:
    """LongRoPE's boundary, the model's reach and its sliding window, against the rows."""
    config, length = case.budget().model_config, case.stage.max_length
    reach, boundary = config.max_position_embeddings, original_positions(config)
    window = getattr(config, "sliding_window", None)
    if length > reach:
        text = f"stage.max_length={length:,} exceeds the model's {reach:,} positions"
        yield failure("positions", text, remedy=f"stage.max_length={reach}")
    elif window is not None and length > window:
        text = f"stage.max_length={length:,} exceeds the model's sliding window of {window:,}"
        yield failure("positions", text, remedy=f"stage.max_length={window}")
    else:
        long = "no LongRoPE"
        if boundary is not None:
            long = f"LongRoPE's long factors beyond {boundary:,}, in micro-batches of their own"
        yield ok("positions", f"up to {reach:,}, rows of {length:,} (stage.max_length); {long}")


def weights(case: Case) -> Iterator[Finding]:
    """They load, fit the config and are finite; rotary buffers stay float32."""
    model, instead = case.model()
    count, config = case.budget().num_parameters, case.config
    reads = config.model.is_pretrained and weights_are_here(case.folder(), config.model.revision)
    if rounded := float32_buffers(model):
        remedy = "another release of transformers; training refuses these buffers too"
        text = f"rotary buffers are not float32: {', '.join(rounded)}"
        yield failure("weights", text, remedy=remedy)
    if instead:
        which = "own" if reads else "random"
        yield warning(
            "weights",
            f"only the first {len(model.get_decoder().layers)} layers are looked at, with {which} "
            f"weights: {instead}",
            remedy="look again on the machine that trains, with the weights there",
        )
    elif config.model.is_pretrained:
        yield ok("weights", f"{count:,} parameters read from {case.folder()}; they fit, all finite")
    else:
        yield ok("weights", f"{count:,} parameters, random: no model.path, so none are read")

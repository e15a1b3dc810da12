"""Tokenizer and causal LM: build, load, check."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mediphi import attention, hub
from mediphi.config.stages import Lora
from mediphi.errors import ArtifactError, UserError
from mediphi.lora import add_adapters
from mediphi.records import STOP_TOKENS

EOS_TOKEN = "<|endoftext|>"

LOAD_ERRORS = (OSError, ValueError, ArithmeticError, StrictDataclassError, SafetensorError)
"""What transformers raises over a folder that is missing, damaged or senseless."""

REMEDY = "give model.path a local Hugging Face folder, or a hub id where the hub can be reached"


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """Where the model comes from, as plain values.

    Attributes:
        folder: local folder or hub id.
        init: `pretrained` reads weights, `random` draws them after `seed`.
        revision: of a hub id.
        kernel: attention kernel.
        recomputed_layers: the first layers, whose activations are recomputed in backward.
        compiled_tokens: fuse what surrounds attention in the other layers, for rows of so many
            positions; None: not.
        loss_chunk_tokens: positions whose logits exist at a time.
        seed: of random weights, and of new adapters.
        lora: adapters to train in place of the weights.
    """

    folder: str
    init: str
    revision: str
    kernel: attention.Kernel
    recomputed_layers: int = 0
    compiled_tokens: int | None = None
    loss_chunk_tokens: int = 128
    seed: int = 0
    lora: Lora | None = None


def resolve_folder(path: str) -> str:
    """The model folder that `path` means: a run directory of ours stands for its `model/`.

    Raises:
        UserError: a run directory whose model is not there yet.
    """
    root = Path(path)
    if (root / "config.json").is_file():
        return path
    if (root / "model" / "config.json").is_file():
        return str(root / "model")
    if (root / "config.yaml").is_file():
        raise UserError(
            f"model.path={path}: this run is not finished: run the same command again, "
            "or name a model folder"
        )
    return path


def load_tokenizer(folder: str, *, revision: str = "main") -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub id.

    Raises:
        UserError: not found, or without the tokens that the chat format needs.
    """
    tokenizer = _from_hub_or_folder(AutoTokenizer, folder, revision)
    missing = [t for t in STOP_TOKENS if t not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"{folder}: the tokenizer lacks {', '.join(missing)}, which Phi-3.5 stops at"
        )
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template (chat_template.jinja)")
    return tokenizer


def eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends every piece of text, `<|endoftext|>`."""
    return tokenizer.get_vocab()[EOS_TOKEN]


def build_model(spec: BackboneSpec) -> PreTrainedModel:
    """The causal LM in float32, in train mode, with its rotary buffers in float32.

    With `spec.lora` its weights are frozen and new adapters trained, which change nothing yet.

    `from_pretrained` hands out models in eval mode and Lightning leaves the children as they are,
    so `train()` is called here. The model is on the CPU, whatever device's context this is called
    in: a GPU would draw other random weights, and to load there transformers needs accelerate.

    Raises:
        UserError: no such model, an architecture that needs remote code, weights that are not
            safetensors, do not fit the config, or are not finite; adapters that do not fit.
    """
    with torch.device("cpu"):
        if spec.init == "random":
            torch.manual_seed(spec.seed)
            model = _from_config(spec)
        else:
            check_weights(spec.folder)
            model, loading = _from_hub_or_folder(
                AutoModelForCausalLM,
                spec.folder,
                spec.revision,
                attn_implementation=attention.IMPLEMENTATIONS[spec.kernel],
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told in `loading`, and refused there
                output_loading_info=True,
            )
            faults = {
                "missing": loading["missing_keys"],
                "unknown": loading["unexpected_keys"],
                "of another shape": [name for name, *_ in loading["mismatched_keys"]],
                "not finite": [n for n, p in model.named_parameters() if not p.isfinite().all()],
            }
            refuse_misfits(spec.folder, faults)
        prepare_training(model, spec)
    return model


def shapes_of(spec: BackboneSpec) -> PreTrainedModel:
    """The plain model without numbers: all on the meta device, buffers too.

    Raises:
        UserError: no such model, or weights that are to be read and cannot be trusted.
    """
    if spec.init != "random":
        check_weights(spec.folder)
    with torch.device("meta"):
        return _from_config(spec)


def prepare_training(model: Any, spec: BackboneSpec) -> None:
    """All that a loaded model lacks for training.

    Adapters, recomputed activations, compiled layers, train mode. Layers compile in their first
    step, all to one form, for rows of one length.
    """
    recomputed, kept = _split_layers(model, spec.recomputed_layers)
    if recomputed:
        _checkpoint_activations(model, except_in=kept)
    # The end of text is also the padding token; we never pad, and PIT puts it between pieces, so
    # its embedding must learn. PyTorch gives a padding row no gradient.
    model.get_input_embeddings().padding_idx = None
    if spec.lora is not None:
        add_adapters(model, spec.lora, seed=spec.seed)
    for layer in kept if spec.compiled_tokens else []:
        layer.compile(dynamic=False)
    model.train()


def _from_config(spec: BackboneSpec) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        _from_hub_or_folder(AutoConfig, spec.folder, spec.revision),
        attn_implementation=attention.IMPLEMENTATIONS[spec.kernel],
        dtype=torch.float32,
    )


def check_weights(folder: str) -> None:
    """Refuse a local folder whose weights cannot be trusted, before anything is loaded.

    Raises:
        UserError: missing folder or config, pickled weights only, or an index that is damaged or
            names a file that is missing or outside the folder.
    """
    root = Path(folder)
    if not root.exists() and folder.count("/") == 1 and not folder.startswith((".", "/")):
        return  # a hub id
    if not (root / "config.json").is_file():
        raise UserError(f"model.path={folder}: no config.json there; give a Hugging Face folder")
    index = root / "model.safetensors.index.json"
    if index.is_file():
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) for name in names):
            raise ArtifactError(f"{index}: has no weight_map from tensors to files")
        for name in sorted(names):
            if Path(name).name != name or not (root / name).is_file():
                raise ArtifactError(f"{index}: names {name!r}, which is not a file of this folder")
    elif not (root / "model.safetensors").is_file():
        pickles = sorted(p.name for p in root.glob("*.bin"))
        found = f"only pickles ({', '.join(pickles)}), which are refused" if pickles else "none"
        raise UserError(f"model.path={folder}: no model.safetensors (weights found: {found})")


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: Any) -> None:
    """Refuse a tokenizer that is not the model's, before an embedding look-up fails far inside.

    Raises:
        UserError: the tokenizer has ids beyond the model's vocabulary, or another end of text.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the model a vocabulary of "
            f"{config.vocab_size}: they do not belong together"
        )
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if eos_id(tokenizer) not in ids:
        raise UserError(
            f"{EOS_TOKEN} is id {eos_id(tokenizer)} in the tokenizer, the model's config has "
            f"eos_token_id={config.eos_token_id}: they do not belong together"
        )


def float32_buffers(model: nn.Module) -> list[str]:
    """Names of rotary buffers that are *not* float32: bf16 angles are off by radians far out."""
    return [
        name
        for name, buffer in model.named_buffers()
        if "inv_freq" in name and buffer.dtype != torch.float32
    ]


def original_positions(config: Any) -> int | None:
    """Length up to which LongRoPE uses its short factors; None without LongRoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings


def _split_layers(model: PreTrainedModel, count: int) -> tuple[list[nn.Module], list[nn.Module]]:
    layers = list(model.get_decoder().layers)  # type: ignore[union-attr,arg-type]
    return layers[:count], layers[count:]


def _checkpoint_activations(model: PreTrainedModel, *, except_in: list[nn.Module]) -> None:
    """Renamed in transformers 5.23."""
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = (
        model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    for layer in except_in:
        layer.gradient_checkpointing = False  # type: ignore[assignment]


def refuse_misfits(folder: str, faults: Mapping[str, Collection[str]]) -> None:
    """Raise ArtifactError if a kind of fault has names of tensors.

    transformers draws missing tensors at random and says so in a log line only.
    """
    for fault, names in faults.items():
        if names:
            raise ArtifactError(
                f"model {folder}: {len(names)} tensors are {fault}, the first is {min(names)}; "
                "config.json and weights do not belong together or the weights are damaged"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({type(error).__name__})") from error


def _from_hub_or_folder(auto: Any, folder: str, revision: str, **options: Any) -> Any:
    """`auto.from_pretrained` with remote code off and one clear line when it fails."""
    if not hub.reachable(folder):
        try:
            return auto.from_pretrained(
                folder, revision=revision, trust_remote_code=False, local_files_only=True, **options
            )
        except (OSError, ValueError):
            raise UserError(f"model {folder}: no such folder, and no network; {REMEDY}") from None
    try:
        return auto.from_pretrained(folder, revision=revision, trust_remote_code=False, **options)
    except LOAD_ERRORS as error:
        raise cannot_be_loaded(folder, error) from error


def cannot_be_loaded(folder: str, error: Exception) -> UserError:
    """One line for one of `LOAD_ERRORS`."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"model {folder}: cannot be loaded ({reason}); {REMEDY}")

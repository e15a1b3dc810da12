"""What a strategy offers that splits one model over processes, and how it reads its part."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float32
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mediphi import hub
from mediphi.backbone import (
    LOAD_ERRORS,
    BackboneSpec,
    cannot_be_loaded,
    prepare_training,
    refuse_misfits,
    shapes_of,
)
from mediphi.errors import UserError
from mediphi.process_group import from_all_ranks, is_rank_zero

Result = TypeVar("Result")


@runtime_checkable
class Sharded(Protocol):
    """A Lightning strategy under which no process holds the whole model.

    Outside of a step all parameters are split; `training_step`, `validation_step`, `predict_step`
    and backward see them whole where they are used. Checkpoints are `SlicedCheckpoints`' part.
    """

    def build(self, spec: BackboneSpec) -> PreTrainedModel:
        """What `backbone.build_model` gives, with the same weights and errors, but split."""
        ...

    def gradient_norm(self) -> Float32[Tensor, ""]:
        """L2 norm of this optimizer step's gradients over all ranks; the same on each."""
        ...

    def clip_gradients_to(self, limit: float, norm: Float32[Tensor, ""]) -> None:
        """Scale the gradients by `min(1, limit / (norm + 1e-6))`, as `clip_grad_norm_` does."""
        ...

    def whole_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Entries of the plain state dict, one at a time: float32 on rank 0's CPU, else empty.

        All ranks must iterate to the end.
        """
        ...

    def compute(self, step: Callable[[], Result]) -> Result:
        """`step()`, which calls the split model without gradients, on all ranks alike."""
        ...


class StoredWeights:
    """Weights of a model folder or hub id, for a model of which nothing but shapes is there.

    Args:
        model: from `backbone.shapes_of`, before it is split or gets adapters.

    Raises:
        UserError: files that cannot be read, or that do not fit the model.
    """

    def __init__(self, spec: BackboneSpec, model: PreTrainedModel) -> None:
        self._folder = spec.folder
        try:
            self._slices = _open(spec)
        except LOAD_ERRORS as error:
            raise cannot_be_loaded(spec.folder, error) from error
        self._aliases: dict[nn.Parameter, list[str]] = {}  # several names: tied
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(parameter, []).append(name)
        self._places = {
            alias: [name for name in aliases if name in self._slices]
            for aliases in self._aliases.values()
            for alias in aliases
        }
        self._refuse_misfits(model)
        self._not_finite: set[str] = set()
        self._not_tied: set[str] = set()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a parameter, float32 `[stop - start, ...]`; only they are read.

        Faults of the values are kept for `refuse_faults`.
        """
        place, *others = self._places[name]
        rows = self._slices[place][start:stop]
        if not rows.isfinite().all():
            self._not_finite.add(name)
        if not all(torch.equal(rows, self._slices[other][start:stop]) for other in others):
            self._not_tied.add(name)
        return rows.to(torch.float32, copy=True)  # a view would keep the file's pages

    def refuse_faults(self) -> None:
        """To call on all ranks after the last `rows`.

        Raises:
            ArtifactError: on all ranks, if one has read NaN, infinity, or a tied tensor that is
                stored twice with different values.
        """
        found = from_all_ranks((self._not_finite, self._not_tied))
        not_finite, not_tied = (set().union(*sets) for sets in zip(*found, strict=True))
        refuse_misfits(self._folder, {"not finite": not_finite, "tied, but differ": not_tied})

    def _refuse_misfits(self, model: Any) -> None:
        """As transformers judges, from the headers of the files alone."""
        ignored = {r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())}
        unknown = self._slices.keys() - self._places.keys()
        faults = {
            "missing": [n for n, places in self._places.items() if not places],
            "unknown": [n for n in unknown if not any(re.search(i, n) for i in ignored)],
            "of another shape": [
                name
                for parameter, aliases in self._aliases.items()
                for name in aliases
                if name in self._slices and self._slices[name].get_shape() != list(parameter.shape)
            ],
        }
        refuse_misfits(self._folder, faults)


def whole_model(strategy: Sharded, spec: BackboneSpec, split: PreTrainedModel) -> Any:
    """A split model in one piece, float32 on rank 0's CPU; None on the others.

    All ranks take part.
    """
    tensors = dict(strategy.whole_tensors(split))
    if not is_rank_zero():
        return None
    model = shapes_of(spec)
    with stand_ins(model):
        prepare_training(model, spec)
    make_rotary_buffers(model)
    model.load_state_dict(tensors, assign=True)
    return model


@contextmanager
def stand_ins(model: PreTrainedModel) -> Iterator[None]:
    """Parameters that take no memory, in place of those on the meta device.

    peft draws adapters on the CPU and moves them to where the layer is: here they must stay.
    """
    shapes: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in shapes.items():
        set_parameter(model, name, nn.Parameter(torch.zeros(()).expand(parameter.shape)))
    yield
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (shape := shapes.get(plain_name(name))) is not None:
            set_parameter(model, name, shape.requires_grad_(parameter.requires_grad))


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` where `name` points."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def plain_name(name: str) -> str:
    """Of a parameter, without adapters around it."""
    return name.replace(".base_layer.", ".")


def make_rotary_buffers(model: PreTrainedModel) -> None:
    """Buffers are computed from the config, not stored: replace those of the meta device.

    On the CPU, where `build_model` computes them, so that every device has the same angles.

    Raises:
        UserError: buffers of another kind.
    """
    for name, module in model.named_modules():
        empty = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        if not empty:
            continue
        if not hasattr(module, "rope_type"):
            raise UserError(
                f"model: buffer {name}.{empty[0]} cannot be made anew; this architecture needs "
                "hardware.strategy=auto"
            )
        twin = type(module)(module.config)
        for buffer in empty:
            module.register_buffer(buffer, twin.get_buffer(buffer), persistent=False)


def _open(spec: BackboneSpec) -> dict[str, Any]:
    """Tensor names -> what reads a part of them; headers only."""
    folder = Path(spec.folder)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(
                spec.folder,
                revision=spec.revision,
                allow_patterns=["model*.safetensors", "model.safetensors.index.json"],
                local_files_only=not hub.reachable(spec.folder),
            )
        )
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    paths = {whole}
    if not whole.is_file():
        paths = {folder / n for n in json.loads(index.read_text())["weight_map"].values()}
    slices: dict[str, Any] = {}
    for path in sorted(paths):
        file = safe_open(path, framework="pt")
        slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return slices

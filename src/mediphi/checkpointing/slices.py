"""Weights and optimizer moments in a checkpoint, whatever strategy and number of ranks wrote them.

Every rank writes the ranges of the flattened parameters that it keeps: one file a rank. A reader
asks for any range and gets it from the files that have it. So a run goes on with another strategy,
or on another number of devices.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mediphi.errors import ArtifactError
from mediphi.process_group import is_distributed

PATTERN = "slices-*.pt"


class LocalSlice(NamedTuple):
    """What a rank keeps of a parameter: elements `start` to `start + n` of the flattened tensor.

    Attributes:
        name: of the parameter in the plain model.
        numel: elements of the whole parameter.
        start: first element that this rank keeps.
        tensors: `weight`, and AdamW's `exp_avg` and `exp_avg_sq` once it has stepped; float32
            `[n]` each, without padding; n may be 0.
    """

    name: str
    numel: int
    start: int
    tensors: dict[str, Tensor]


def slice_file() -> str:
    """File name of this rank's slices."""
    if not is_distributed():
        return "slices-00000-of-00001.pt"
    return f"slices-{dist.get_rank():05}-of-{dist.get_world_size():05}.pt"


def as_saved(slices: Iterable[LocalSlice]) -> dict[str, Any]:
    """What goes into this rank's file: no tensor drags a larger storage along."""
    return {
        s.name: {
            "start": s.start,
            "numel": s.numel,
            "tensors": {key: _alone(tensor) for key, tensor in s.tensors.items()},
        }
        for s in slices
        if len(s.tensors["weight"])
    }


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.clone()


class SliceReader:
    """Any range of any parameter of a checkpoint, read when it is asked for."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(checkpoint.glob(PATTERN)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name, part in content.items():
                self._parts[name].append(part)
        for parts in self._parts.values():
            parts.sort(key=lambda part: part["start"])

    @property
    def names(self) -> set[str]:
        """Parameters that were saved."""
        return set(self._parts)

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of one of a parameter's flattened tensors, a copy.

        Raises:
            ArtifactError: not in the checkpoint.
        """
        found, at = [], start
        for part in self._parts.get(name, []):
            tensor = part["tensors"].get(key)
            if tensor is None:
                break
            first, last = part["start"], part["start"] + len(tensor)
            if first <= at < min(last, stop):
                found.append(tensor[at - first : stop - first])
                at += len(found[-1])
        if at < stop:
            raise ArtifactError(
                f"checkpoint {self.checkpoint}: {key} of {name} is not all there; "
                "the model or stage.lora differs from what it was made with"
            )
        return torch.cat(found) if found else torch.empty(0)

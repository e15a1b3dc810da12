"""Parameters as DeepSpeed's ZeRO-3 splits them.

A parameter is flattened and cut into equal parts, one a rank, the last padded. `ds_tensor` is this
rank's part, `ds_shape` and `ds_numel` are the whole's. The parameter itself is empty while it is
split; DeepSpeed's hooks fill it where it is used.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from mediphi.strategies.sharding import StoredWeights, set_parameter


class Part(NamedTuple):
    """What this rank keeps of a trained parameter, without padding: `[start, start + size)`."""

    name: str
    parameter: Any
    start: int
    size: int


def trained_parts(module: nn.Module) -> Iterator[Part]:
    """Of every parameter that is trained; `size` may be 0."""
    rank, named = dist.get_rank(), dict[str, Any](module.named_parameters())
    for name, parameter in named.items():
        if parameter.requires_grad:
            share, numel = parameter.ds_tensor.numel(), parameter.ds_numel
            start = min(rank * share, numel)
            yield Part(name, parameter, start, min(share, numel - start))


def gathered(parameter: Any, device: torch.device) -> Tensor:
    """The whole parameter on rank 0's `device`, an empty tensor on other ranks."""
    part, is_zero = parameter.ds_tensor.to(device), dist.get_rank() == 0
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if is_zero else None
    dist.gather(part, parts)
    if parts is None:
        return torch.empty(0)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


class OneByOne(nn.Module):
    """Stands for a model of the meta device: a parameter becomes real when it is asked for.

    Rank 0 reads it, and `deepspeed.zero.Init` sends it to all ranks, which keep their part: no
    process ever holds more than one whole.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredWeights, device: torch.device) -> None:
        super().__init__()
        self._names: dict[nn.Parameter, list[str]] = {}  # several: tied
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(parameter, []).append(name)
        self._model, self._stored, self._device = (model,), stored, device  # not a submodule

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for empty, names in self._names.items():
            if dist.get_rank() == 0:
                data = self._stored.rows(names[0], 0, len(empty)).to(self._device)
            else:
                data = torch.empty(empty.shape, device=self._device)
            parameter = nn.Parameter(data)
            del data  # DeepSpeed frees it while it waits here
            for name in names:
                set_parameter(self._model[0], name, parameter)
            yield parameter


@contextmanager
def whole_shapes(parameters: Iterable[Any]) -> Iterator[None]:
    """Split parameters show their shapes, by which an optimizer groups them; not their numbers."""
    split = [p for p in parameters if hasattr(p, "ds_shape")]
    for parameter in split:
        parameter.data = parameter.data.new_empty(1).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter in split:
            parameter.data = parameter.data.new_empty(0)


def send_rounded(engine: Any) -> None:
    """Weights of linear layers travel in bfloat16, as autocast would round them before use.

    What a layer of another kind uses too, such as a tied embedding, travels in float32, and so do
    all gradients: DeepSpeed would add them up in bfloat16.
    """
    modules = list(engine.modules())
    others = [m for m in modules if not isinstance(m, nn.Linear)]
    exact = {parameter for module in others for parameter in module.parameters(recurse=False)}
    for module in modules:
        if isinstance(module, nn.Linear):
            for parameter in set(module.parameters(recurse=False)) - exact:
                parameter.comm_dtype = torch.bfloat16  # type: ignore[attr-defined]
    engine.optimizer.get_param_comm_dtype = lambda _: torch.float32

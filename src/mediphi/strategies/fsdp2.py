"""FSDP2: torch's `fully_shard`, one group of parameters a decoder layer (Zhao et al. 2023)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mediphi.backbone import BackboneSpec, build_model, prepare_training, shapes_of
from mediphi.checkpointing.slices import LocalSlice
from mediphi.strategies.checkpoints import Read, SlicedCheckpoints, moments_of
from mediphi.strategies.sharding import (
    Result,
    StoredWeights,
    make_rotary_buffers,
    plain_name,
    set_parameter,
    stand_ins,
)


class Fsdp2Strategy(SlicedCheckpoints, ModelParallelStrategy):
    """Every parameter is cut by rows over all ranks; see `Sharded`.

    Attention and feed-forward of a decoder layer are gathered before they run, freed after, and
    gathered again in backward. Embedding, norms and head are whole during a step: the modules
    multiply with the head's weight themselves. Gradients are averaged in float32 after every
    micro-batch, so that no rank keeps a whole gradient.

    With bf16-mixed, what is gathered a layer at a time is gathered as bfloat16. Autocast rounds
    these weights just so before each product: the numbers are one device's, half the bytes travel.
    Norms, embedding and head stay float32, as they do under autocast.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, **options)
        self._backbone: Any = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def build(self, spec: BackboneSpec) -> PreTrainedModel:
        if spec.init == "random":
            model = build_model(spec)
            self._split(model)
        else:
            model = shapes_of(spec)
            stored = StoredWeights(spec, model)
            with stand_ins(model):
                prepare_training(model, spec)
            make_rotary_buffers(model)
            self._split(model)
            self._fill(model, stored)
        self._backbone = model
        return model

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().training_step
        return self._backbone.run_gathered(lambda: step(*args, **kwargs))

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().validation_step
        return self.compute(lambda: step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().predict_step
        return self.compute(lambda: step(*args, **kwargs))

    def gradient_norm(self) -> Tensor:
        norm = nn.utils.get_total_norm(self._local_gradients())
        return self.reduce(norm.square(), reduce_op="sum").sqrt()

    def clip_gradients_to(self, limit: float, norm: Tensor) -> None:
        coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self._local_gradients():
            gradient.mul_(coefficient)

    def whole_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            yield name, _on_rank_zero(tensor)

    def compute(self, step: Callable[[], Result]) -> Result:
        """FSDP frees the root's parameters in backward; here it is told to.

        What it gathers must not be born in inference mode, or backward could not use it later.
        """
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                return self._backbone.run_gathered(step)
        finally:
            self._backbone.reshard()

    def local_slices(self) -> Iterator[LocalSlice]:
        state, keys = self.optimizers[0].state, moments_of(self.optimizers[0])
        for name, parameter in self._trained():
            moments = {key: state[parameter][key] for key in keys if parameter in state}
            tensors = {"weight": parameter, **moments}
            flat = {key: _local(tensor).flatten() for key, tensor in tensors.items()}
            yield LocalSlice(name, parameter.numel(), _range(parameter)[0], flat)

    @torch.no_grad()
    def load_slices(self, read: Read, *, num_steps: int) -> None:
        state, keys = self.optimizers[0].state, moments_of(self.optimizers[0])
        for name, parameter in self._trained():
            moments = {key: torch.zeros_like(parameter) for key in keys}
            for key, tensor in {"weight": parameter, **moments}.items():
                local = _local(tensor)
                local.copy_(read(name, key, *_range(parameter)).view_as(local))
            if moments:
                # where the fused AdamW keeps it
                step = torch.tensor(float(num_steps), device=parameter.device)
                state[parameter] = {"step": step, **moments}

    def _split(self, model: Any) -> None:
        """Leave this rank's rows of every parameter; those without numbers yet stay without."""
        mesh = self.device_mesh["data_parallel"]
        is_mixed = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if is_mixed else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast does
        )
        for layer in model.get_decoder().layers:
            parts = [m for m in layer.children() if any(p.ndim > 1 for p in m.parameters())]
            fully_shard(parts, mesh=mesh, mp_policy=policy)  # type: ignore[call-overload]
        fully_shard(model, mesh=mesh)
        model.run_gathered = _call
        register_fsdp_forward_method(model, "run_gathered")

    @torch.no_grad()
    def _fill(self, model: Any, stored: StoredWeights) -> None:
        """Read this rank's rows from the files."""
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for name, empty in list(model.named_parameters(remove_duplicate=False)):
            if not empty.is_meta:
                continue  # a new adapter
            if empty not in filled:
                rows = stored.rows(plain_name(name), *_rows(empty)).to(self.root_device)
                whole = DTensor.from_local(
                    rows,
                    empty.device_mesh,
                    empty.placements,
                    shape=empty.shape,
                    stride=empty.stride(),
                )
                filled[empty] = nn.Parameter(whole, requires_grad=empty.requires_grad)
            set_parameter(model, name, filled[empty])
        stored.refuse_faults()

    def _trained(self) -> list[tuple[str, Any]]:
        assert self.lightning_module is not None
        found = self.lightning_module.named_parameters()
        return [(name, p) for name, p in found if p.requires_grad]

    def _local_gradients(self) -> list[Tensor]:
        return [_local(p.grad) for _, p in self._trained() if p.grad is not None]


def _call(step: Callable[[], Any]) -> Any:
    """Runs as a forward pass of the sharded model, so that its root is gathered."""
    return step()


def _local(tensor: Any) -> Tensor:
    """What this rank has of it; no copy."""
    return tensor.detach().to_local()


def rows_of(rank: int, *, ranks: int, size: int) -> tuple[int, int]:
    """First of `size` rows that a rank keeps, and the one behind its last, as `torch.chunk`."""
    share = -(-size // ranks)
    start = min(rank * share, size)
    return start, min(start + share, size)


def _rows(parameter: Any) -> tuple[int, int]:
    mesh = parameter.device_mesh
    return rows_of(mesh.get_local_rank(), ranks=mesh.size(), size=len(parameter))


def _range(parameter: Any) -> tuple[int, int]:
    """`_rows` as positions in the flattened parameter."""
    row = parameter.numel() // len(parameter)
    start, stop = _rows(parameter)
    return start * row, stop * row


def _on_rank_zero(tensor: Any) -> Tensor:
    """The whole tensor there, an empty one elsewhere; other ranks only send."""
    mesh, rows = tensor.device_mesh, _local(tensor)
    share = -(-len(tensor) // mesh.size())
    padded = rows.new_zeros(share, *tensor.shape[1:])
    padded[: len(rows)] = rows
    is_zero = mesh.get_local_rank() == 0
    parts = [torch.empty_like(padded) for _ in range(mesh.size())] if is_zero else None
    dist.gather(padded, parts, dst=0, group=mesh.get_group())
    return torch.cat(parts)[: len(tensor)].cpu() if parts else torch.empty(0)

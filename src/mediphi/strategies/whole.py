"""One device, or DDP: every rank keeps the whole model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from mediphi.checkpointing.slices import LocalSlice
from mediphi.strategies.checkpoints import Read, SlicedCheckpoints, moments_of


class WholeModel(SlicedCheckpoints):
    """Rank 0 writes everything, every rank reads everything."""

    def local_slices(self) -> Iterator[LocalSlice]:
        if not self.is_global_zero:
            return
        state, keys = self.optimizers[0].state, moments_of(self.optimizers[0])
        for name, parameter in self._trained():
            tensors = {"weight": parameter, **{k: state[parameter][k] for k in keys}}
            flat = {key: tensor.detach().flatten() for key, tensor in tensors.items()}
            yield LocalSlice(name, parameter.numel(), 0, flat)

    @torch.no_grad()
    def load_slices(self, read: Read, *, num_steps: int) -> None:
        optimizer = self.optimizers[0]
        for name, parameter in self._trained():

            def whole(key: str, name: str = name, like: Tensor = parameter) -> Tensor:
                return read(name, key, 0, like.numel()).view_as(like).to(like.device)

            parameter.copy_(whole("weight"))
            if keys := moments_of(optimizer):
                moments = {key: whole(key) for key in keys}
                # where the fused AdamW keeps it
                step = torch.tensor(float(num_steps), device=parameter.device)
                optimizer.state[parameter] = {"step": step, **moments}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        assert self.lightning_module is not None
        found = self.lightning_module.named_parameters()
        return [(name, p) for name, p in found if p.requires_grad]


class OneDevice(WholeModel, SingleDeviceStrategy):
    """No other process."""


class Ddp(WholeModel, DDPStrategy):
    """Gradients are averaged over the ranks.

    Buffers are not broadcast: that would overwrite every rank's meters with those of rank 0.
    Gradients lie in the buffers that are sent, once and not twice: they are set to zero and stay.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True, **options)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)

"""Lightning's saving and restoring, done with slices that every strategy writes and reads."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from mediphi.checkpointing.slices import LocalSlice, SliceReader, as_saved

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides its step count."""
Read = Callable[[str, str, int, int], Tensor]
"""`read(name, key, start, stop)`: elements of a flattened tensor, as `SliceReader.read`."""


class SlicedCheckpoints(Strategy):
    """Mixin: weights and moments go into slices, what is left into Lightning's dictionary."""

    _slices: SliceReader | None = None

    def local_slices(self) -> Iterator[LocalSlice]:
        """What this rank keeps of the trained parameters, and of their moments."""
        raise NotImplementedError

    def load_slices(self, read: Read, *, num_steps: int) -> None:
        """Put weights, moments and AdamW's step count back."""
        raise NotImplementedError

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Persistent buffers: the meters' sums."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict(keep_vars=True)
        return {name: t for name, t in state.items() if not isinstance(t, nn.Parameter)}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Numbers of the parameter groups."""
        groups = optimizer.param_groups
        return {"groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """All ranks write together."""
        slices = as_saved(self.local_slices())
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=slices)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded = self.checkpoint_io.load_checkpoint(checkpoint_path)
        self._slices = SliceReader(Path(checkpoint_path))
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The weights too: they lie beside their moments."""
        assert self._slices is not None
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for group, numbers in zip(optimizer.param_groups, saved["groups"], strict=True):
                group.update(numbers)
        self.load_slices(self._slices.read, num_steps=checkpoint["global_step"])
        self._slices = None


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Keys of the optimizer's state that go with every parameter."""
    return MOMENTS if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) else ()

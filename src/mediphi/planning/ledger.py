"""Counts the bytes of all tensors that operations make, by what they are for."""

import weakref
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Use = Literal[
    "weights",
    "reference",
    "gradients",
    "moments",
    "activations",
    "rounded weights",
    "loss",
    "backward",
]
"""What bytes are for.

weights, reference: of the model that is trained and of the one that is asked. gradients, moments:
of parameters. activations: of the decoder's forward pass. rounded weights: autocast's copies, which
backward keeps. loss: from the hidden states to the loss, logits above all. backward: what is on its
way through.
"""

PASSING: tuple[Use, ...] = ("activations", "rounded weights", "loss", "backward")
"""What a micro-batch brings and takes away again."""

Peak = Counter[Use]

LARGEST_IN_HEAP = 32 << 20
"""Larger blocks come from the system and go back (glibc's `DEFAULT_MMAP_THRESHOLD_MAX`)."""


class Ledger(TorchDispatchMode):
    """While it is entered, every new tensor is counted until it is freed.

    It stands outside of a `FakeTensorMode`: questions for a tensor's value are answered by 0.

    Attributes:
        use: what new tensors are for, set by who runs the operations.
        alive: bytes now.
        peak: bytes when all were most.
        passing_peak: bytes when those that a micro-batch needs for itself were most.
        in_heap: of these, bytes in blocks that glibc cuts out of its heap.
        traffic: bytes that all operations have read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.use: Use = "weights"
        self.alive: Peak = Counter()
        self.peak: Peak = Counter()
        self.passing_peak: Peak = Counter()
        self.traffic = self.in_heap = 0
        self._in_heap = self._start = 0
        self._uses: weakref.WeakKeyDictionary[Any, list[Use]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_new = [self._enter(tensor) for tensor in made]
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.move(out, "rounded weights")
        if any(is_new) or func._schema.is_mutable:  # a view moves nothing
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.traffic += sum(t.numel() * t.element_size() for t in (*made, *read))
            self._compare()
        return out

    def move(self, tensor: Tensor, use: Use) -> None:
        """From now on the tensor is for something else."""
        self._enter(tensor)
        storage = tensor.untyped_storage()
        entry, size = self._uses[storage], storage.nbytes()
        self.alive[entry[0]] -= size
        self.alive[use] += size
        entry[0] = use

    def forget_peaks(self) -> None:
        """Start anew from what is alive now."""
        self.peak, self.passing_peak = Counter(), Counter()
        self.traffic = 0
        self._start = self._in_heap
        self._compare()

    def _enter(self, tensor: Tensor) -> bool:
        """Count the tensor's storage; False: it is counted already."""
        storage = tensor.untyped_storage()
        if storage in self._uses:
            return False
        size = storage.nbytes()
        entry: list[Use] = [self.use]
        self._uses[storage] = entry
        self.alive[self.use] += size
        self._in_heap += size * (size < LARGEST_IN_HEAP)
        weakref.finalize(storage, self._leave, size, entry)
        return True

    def _leave(self, size: int, entry: list[Use]) -> None:
        self.alive[entry[0]] -= size
        self._in_heap -= size * (size < LARGEST_IN_HEAP)

    def _compare(self) -> None:
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()
        if passing(self.alive) > passing(self.passing_peak):
            self.passing_peak = self.alive.copy()
            self.in_heap = self._in_heap - self._start


def passing(bytes_of: Peak) -> int:
    """Bytes of a micro-batch alone."""
    return sum(bytes_of[use] for use in PASSING)

"""Merged models one after another in the same memory: nothing of a candidate touches the disk.

What all candidates have in common, the experts' deltas and the order of their magnitudes, is made
once; a candidate is then one pass over them, written over the candidate before. Where memory is too
small for the deltas they are subtracted anew, and on a GPU always.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from mediphi.errors import UserError
from mediphi.merge.checkpoints import Checkpoint
from mediphi.merge.engine import Job, Parents, check_finite, tensor_seed
from mediphi.merge.operators import DELTA_METHODS, MergeError, Operands, Values, merge_tensor
from mediphi.merge.statistics import Delta, OrderStatistics
from mediphi.merge.storage import is_finite
from mediphi.resources import free_memory

BYTES_OF_DELTA = 4
"""Of memory for each number of an expert: its float32 delta."""
BYTES_OF_ORDER = 2.1
"""And where it stands in the order of magnitudes."""
FREE_SHARE = 0.7
"""Of the free memory that both may take; what does not fit is made anew for every candidate."""


class Candidates:
    """A model whose weights become one merge after another.

    Args:
        job: what is merged; `dtype` is that of `targets`.
        parents: the opened folders.
        targets: the tensors to write to, by name: all that the merge has; tied ones once.

    Raises:
        ArtifactError: a model holds numbers that are not finite.
    """

    def __init__(self, job: Job, parents: Parents, targets: Mapping[str, Tensor]) -> None:
        self._job, self._targets = job, targets
        first = parents.checkpoints[0]
        self._floats = [n for n, own in first.tensors.items() if own.dtype.is_floating_point]
        self._floats.sort(key=lambda name: -_count(first, name))
        count = sum(_count(first, n) for n in self._floats) * len(job.models)
        room = FREE_SHARE * free_memory() / count
        self.keeps_order = cuts_whole_tensors(job) and room > BYTES_OF_ORDER
        room -= BYTES_OF_ORDER * self.keeps_order
        on_cpu = job.device == "cpu"  # a GPU has no room for them, and subtracts at no cost
        self.keeps_deltas = on_cpu and job.method in DELTA_METHODS and room > BYTES_OF_DELTA
        self._pool = ThreadPoolExecutor(job.threads, initializer=_one_thread)
        try:
            prepared = self._pool.map(lambda n: self._prepare(parents.checkpoints, n), self._floats)
            self._operands = dict(zip(self._floats, prepared, strict=True))
        except BaseException:
            self._pool.shutdown(cancel_futures=True)
            raise

    def build(self, values: Callable[[str], Values]) -> None:
        """Write the merge with these values over the last one: bitwise what `merge` would write.

        When it returns or raises, no thread writes any more: the next candidate can be built.

        Raises:
            MergeError: a tensor cannot be merged so, or is too large for float16; names the tensor.
        """
        tasks = [self._pool.submit(self._write, name, values) for name in self._floats]
        wait(tasks)
        for task in tasks:
            task.result()

    def close(self) -> None:
        """End the threads; what they have not begun is left."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(
        self, checkpoints: tuple[Checkpoint, ...], name: str
    ) -> tuple[Operands, OrderStatistics | None]:
        check_finite(name, checkpoints)
        tensors = [one.read(name) for one in checkpoints]
        base = tensors.pop(0) if self._job.base is not None else None
        if self.keeps_deltas:
            assert base is not None
            tensors = [one.float() - base for one in tensors]
        start = None if self.keeps_deltas else base
        ordered = OrderStatistics([Delta(t, start) for t in tensors]) if self.keeps_order else None
        device = self._job.device
        there = Operands(
            None if base is None else base.to(device),
            tuple(one.to(device) for one in tensors),
            deltas=self.keeps_deltas,
        )
        return there, ordered

    def _write(self, name: str, values: Callable[[str], Values]) -> None:
        operands, ranks = self._operands[name]
        own = values(name)
        try:
            merge_tensor(
                self._job.method,
                operands,
                own,
                out=self._targets[name],
                semantics=self._job.semantics,
                seed=tensor_seed(self._job.seed, name),
                ranks=ranks,
            )
            # Of finite models with bounded weights no other type overflows.
            if self._targets[name].dtype == torch.float16 and not is_finite(self._targets[name]):
                raise MergeError("merged, it is not finite in float16")
        except UserError as error:
            raise MergeError(f"tensor {name}: {error}") from None


def cuts_whole_tensors(job: Job) -> bool:
    """Whether magnitudes are cut at ranks of a whole tensor; the papers' crumbs are of rows."""
    return job.method == "ties" or (
        job.method.startswith("breadcrumbs") and job.semantics == "mergekit"
    )


def _count(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(checkpoint.tensors[name].shape)


def _one_thread() -> None:
    """Tensors are many: more threads for one of them would only wait for each other."""
    torch.set_num_threads(1)

"""A merge, tensor by tensor: read, computed and written piece by piece.

Main memory holds a few pieces of tensors; the rest is page cache, which the kernel takes back.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mediphi.artifacts import named_parents, plain_folder, room_for
from mediphi.config.methods import METHODS, Semantics
from mediphi.errors import ArtifactError, MergeError, UserError
from mediphi.merge.agreement import check_agreement, dtype_name
from mediphi.merge.checkpoints import Checkpoint, open_checkpoint
from mediphi.merge.folders import is_published, publish_folder, recall
from mediphi.merge.operators import Operands, Values, merge_tensor
from mediphi.merge.pieces import DEVICE_PIECE, spans
from mediphi.merge.shards import Layout, PartialShards, is_of, plan
from mediphi.merge.storage import InFile, is_finite
from mediphi.merge.vocabularies import stop_ids

FORMAT = 1
"""Raise it when the same job gives other bytes: what an older version left is not continued."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is merged, as plain values.

    Attributes:
        models: folders by the names that the user gave them, in the order of the values.
        base: where deltas start; its order of tensors, config and tokenizer are taken, without one
            those of the first model. A method that knows no base does not read its numbers.
        dtype: of the merged floats; None: each tensor keeps the one it has in the first folder.
        seed: of random masks; every tensor has its own, drawn from it and the tensor's name.
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
        threads: tensors in hand at a time.
        device: where the arithmetic runs.
    """

    method: str
    models: Mapping[str, Path]
    base: Path | None = None
    semantics: Semantics = "mergekit"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    max_shard_bytes: int = 5_000_000_000
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"


class MergeFacts(NamedTuple):
    """What came out.

    Attributes:
        num_resumed: tensors that an earlier attempt had written.
        notes: lines worth telling.
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_shards: int
    num_resumed: int
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...]


class Parents(NamedTuple):
    """Opened and compared; the base is the first checkpoint, if there is one."""

    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...]


def open_parents(job: Job) -> Parents:
    """Open every folder and refuse what cannot be merged, before anything is computed.

    Raises:
        ArtifactError: a folder that is missing or damaged, or does not fit the others.
    """
    paths = [*([job.base] if job.base else []), *job.models.values()]
    checkpoints = tuple(open_checkpoint(path) for path in paths)
    return Parents(checkpoints, tuple(check_agreement(checkpoints, mixed_dtypes=bool(job.dtype))))


def merge(
    job: Job,
    *,
    values: Callable[[str], Values],
    scratch: Path,
    target: Path,
    progress: Callable[[int, int], None],
) -> MergeFacts:
    """Merge models into a Hugging Face folder.

    A merge that was killed goes on when it is called again with the same job, values and folders.
    Remove `scratch` once `target` is vouched for: until then it tells whose `target` is.

    Args:
        values: of a method's parameters, by tensor.
        scratch: for unfinished shards and the journal, on the file system of `target`.
        target: appears complete, by one rename.
        progress: called in this thread with bytes done and bytes in all.

    Raises:
        ArtifactError: folders that cannot be merged, numbers that are not finite, or a `target`
            that is there already.
        MergeError: a tensor that the method cannot merge.
        MachineError: the disk is full.
    """
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no GPU is visible here; merge on the cpu")
    parents = open_parents(job)
    layout = _layout(job, parents.checkpoints[0])
    settings = {name: values(name) for name in layout.slots}
    job_hash = _hash(job, settings)
    facts = _facts(layout, parents)
    if target.exists():
        if is_of(scratch, job_hash) and is_published(target, layout):
            return facts._replace(num_resumed=facts.num_tensors)
        raise ArtifactError(f"{target}: exists; choose another name, or remove it")
    recall(scratch, layout=layout)
    shards = PartialShards(scratch, layout, job_hash=job_hash)
    with closing(shards), room_for(scratch, layout.num_bytes):
        num_resumed = _write_tensors(_Work(job, parents.checkpoints, settings, shards), progress)
        shards.sync()
    dtypes = {slot.dtype for slot in layout.slots.values() if slot.dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    publish_folder(
        target, scratch=scratch, layout=layout, checkpoints=parents.checkpoints, dtype=dtype
    )
    return facts._replace(num_resumed=num_resumed)


class _Work(NamedTuple):
    job: Job
    checkpoints: tuple[Checkpoint, ...]
    settings: Mapping[str, Values]
    shards: PartialShards


def _layout(job: Job, first: Checkpoint) -> Layout:
    stated = getattr(torch, job.dtype) if job.dtype else None
    tensors = {
        name: (stated if stated and own.dtype.is_floating_point else own.dtype, own.shape)
        for name, own in first.tensors.items()
    }
    return plan(tensors, max_shard_bytes=job.max_shard_bytes)


def _hash(job: Job, settings: Mapping[str, Values]) -> str:
    """Of all that decides the bytes: what is merged, how, and where shards end."""
    content = {
        "format": FORMAT,
        "method": job.method,
        "semantics": job.semantics,
        "base": _fingerprint(job.base) if job.base else None,
        "models": [_fingerprint(path) for path in job.models.values()],
        "dtype": job.dtype,
        "seed": job.seed,
        "max_shard_bytes": job.max_shard_bytes,
        "device": job.device,
        "values": {name: dict(own) for name, own in settings.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    if named := named_parents(str(path)):
        return named["model"].sha256
    parent = plain_folder(str(path))
    if parent is None:
        raise ArtifactError(f"{path}: its manifest is damaged; make the run anew")
    # Of large files a sample is hashed: a resumed merge must not mix two versions of a model.
    files = sorted(Path(parent.path).glob("*.safetensors"))
    states = [(file, file.stat()) for file in files]
    times = [[file.name, state.st_size, state.st_mtime_ns] for file, state in states]
    return parent.sha256 + json.dumps(times)


def _facts(layout: Layout, parents: Parents) -> MergeFacts:
    return MergeFacts(
        num_tensors=len(layout.slots),
        num_parameters=sum(torch.Size(slot.shape).numel() for slot in layout.slots.values()),
        num_bytes=layout.num_bytes,
        num_shards=len(layout.shards),
        num_resumed=0,
        stop_ids=tuple(stop_ids(parents.checkpoints)),
        notes=parents.notes,
    )


def _write_tensors(work: _Work, progress: Callable[[int, int], None]) -> int:
    """Write what is not written yet; returns the number of tensors that were.

    The largest come first, so that all threads end together. After an error or a signal no new
    tensor is begun, and those in hand are finished.
    """
    slots = work.shards.layout.slots
    done, total, num_resumed = 0, work.shards.layout.num_bytes, 0
    progress(done, total)
    # Tensors are many: more threads for one of them would only wait for each other.
    pool = ThreadPoolExecutor(work.job.threads, initializer=torch.set_num_threads, initargs=(1,))
    before = torch.get_num_threads()
    try:
        by_size = sorted(slots, key=lambda name: -slots[name].size)
        tasks = {pool.submit(_write_tensor, work, name): name for name in by_size}
        for task in as_completed(tasks):
            num_resumed += task.result()
            done += slots[tasks[task]].size
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
    return num_resumed


def _write_tensor(work: _Work, name: str) -> bool:
    """Returns whether it was written already."""
    shards = work.shards
    if shards.holds(name):
        return True
    place = shards.place(name)
    if place.dtype.is_floating_point:
        _merge_floats(work, name, place)
    else:
        _copy_whole_numbers(work, name, place)
    shards.seal(name, place.checksum)
    return False


def _merge_floats(work: _Work, name: str, place: InFile) -> None:
    """Numbers that are not finite are looked for in what comes out: every method hands them on."""
    job = work.job
    has_base = bool(job.base) and METHODS[job.method].base != "none"
    read = work.checkpoints[-len(job.models) - has_base :]
    on_cpu = job.device == "cpu"
    tensors = [one.stored(name) if on_cpu else one.read(name).to(job.device) for one in read]
    operands = Operands(tensors[0] if has_base else None, tuple(tensors[has_base:]))
    out = place if on_cpu else torch.empty(place.shape, dtype=place.dtype, device=job.device)
    try:
        merge_tensor(
            job.method,
            operands,
            work.settings[name],
            out=out,
            semantics=job.semantics,
            seed=tensor_seed(job.seed, name),
        )
        if isinstance(out, Tensor):
            _send(out.view(-1), place)
        if not place.is_finite:
            raise MergeError(
                f"merged, it is not finite in {dtype_name(place.dtype)}; choose smaller weights or "
                "another dtype"
            )
    except MergeError as error:
        check_finite(name, read)  # then this is the cause
        raise MergeError(f"tensor {name}: {error}") from None


def _send(result: Tensor, place: InFile) -> None:
    for span in spans(len(result), DEVICE_PIECE):
        place.write(span, result[span].cpu())


def check_finite(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse numbers that are not finite in the tensor of that name; names the model.

    Raises:
        ArtifactError: there are some.
    """
    for checkpoint in checkpoints:
        if not is_finite(checkpoint.read(name)):
            raise ArtifactError(
                f"{checkpoint.folder}: tensor {name} holds numbers that are not finite; leave this "
                "model out, or make it anew"
            )


def tensor_seed(seed: int, name: str) -> int:
    """Of a tensor's random mask: the order in which tensors are merged must not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _copy_whole_numbers(work: _Work, name: str, place: InFile) -> None:
    first, *others = work.checkpoints
    tensor = first.read(name)
    for checkpoint in others:
        if not torch.equal(checkpoint.read(name), tensor):
            raise ArtifactError(
                f"{checkpoint.folder}: tensor {name} ({dtype_name(place.dtype)}) differs from that "
                f"of {first.folder}; whole numbers cannot be merged"
            )
    _send(tensor.reshape(-1), place)

"""Log-probabilities of preference pairs under a model: the reference's once, and an exam's.

The reference pass is kept on disk under a key of everything that decides its numbers, so all jobs
of a sweep over beta or the learning rate share one. A file is complete or refused.
"""

import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from numpy.typing import NDArray

from mediphi import engine
from mediphi.artifacts import locked, write_atomic
from mediphi.backbone import BackboneSpec
from mediphi.batches import Batch
from mediphi.chat_exams import PreferenceAccuracy
from mediphi.checkpointing import SafeCheckpointIO
from mediphi.config.stages import DpoStage
from mediphi.data.datamodule import References
from mediphi.data.fingerprint import FileHashes
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import TrainingPlan, once_through
from mediphi.errors import ArtifactError, UserError
from mediphi.launch import rank
from mediphi.modules.dpo import DpoModule, Objective, ScoredPairs
from mediphi.phases import PhasePlan, Training
from mediphi.process_group import from_all_ranks, from_rank_zero, wait_for_all
from mediphi.tracking.progress import make_progress

Logps = NDArray[np.float32]
"""Of chosen and rejected answer by row of the token store, `[documents, 2]`, summed, in nats."""

VERSION = 1
"""Part of the key; raise it when the numbers change."""
WAIT_SECONDS = 5.0
FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


def bring_references(run: Training, plan: PhasePlan, backbone: BackboneSpec) -> None:
    """Give the data module the reference's log-probabilities, where the stage wants them cached.

    All ranks call it. Another process that computes the same is waited for.

    Raises:
        ArtifactError: the file in the cache is damaged.
        UserError: a log-probability is not finite, or the commit of a hub model is not known.
    """
    stage = run.config.stage
    assert isinstance(stage, DpoStage)
    if stage.reference != "cached":
        return
    path = Path(run.config.paths.cache) / "references" / f"{_key(run, plan, backbone)}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(path):
        if from_rank_zero(path.exists()):
            if rank() == 0:
                print(f"reference   from {path}", flush=True)
        else:
            _compute(run, plan, backbone, path)
        wait_for_all()
    plan.data.references = _read(path)


def preference_exam(run: Training, plan: PhasePlan, backbone: BackboneSpec) -> PreferenceAccuracy:
    """Held-out preference accuracy against the model that training starts from, on rank 0."""
    stage, store = run.config.stage, run.data.heldout
    assert isinstance(stage, DpoStage)
    pairs = once_through(store, replace(plan.data.settings, world_size=1))
    tokens = np.zeros((store.manifest.num_documents, 2), dtype=np.int64)
    tokens[pairs.sequences.document] = pairs.sequences.parts[:, 1:]

    def heldout_logps(model: BackboneSpec) -> Logps:
        return _here(_module(run, plan, model), pairs, run.device)

    @cache
    def reference() -> Logps | None:
        if plan.data.references is not None:
            return plan.data.references.heldout
        return heldout_logps(backbone) if stage.reference == "live" else None

    return PreferenceAccuracy(
        store=store,
        logps=heldout_logps,
        reference=reference,
        tokens=tokens,
        length_normalised=stage.length_normalised,
    )


def _compute(run: Training, plan: PhasePlan, backbone: BackboneSpec, path: Path) -> None:
    started = time.monotonic()
    module = _module(run, plan, backbone)
    found = _everywhere(run, plan, module)
    if rank() == 0:
        _write(path, found)
        count, seconds = len(found.train) + len(found.heldout), time.monotonic() - started
        print(f"reference   {count:,} pairs in {seconds:.1f} s, kept in {path}", flush=True)


def _everywhere(run: Training, plan: PhasePlan, module: DpoModule) -> References:
    """Log-probabilities of all pairs, each rank computing its share.

    One trainer for both sides: a strategy that splits the model does so once.
    """
    stores = [run.data.train, run.data.heldout]
    sides = [once_through(s, plan.data.settings) if s.num_tokens else None for s in stores]
    loaders = [PackedLoader(pairs, rank=rank()) for pairs in sides if pairs is not None]
    trainer = engine.make_trainer(
        run.config.hardware,
        run.device,
        checkpoint_io=SafeCheckpointIO(),
        callbacks=[make_progress("reference", num_steps=sum(map(len, loaders)))],
        loggers=[],
        loop={},
    )
    batches: Any = _OneAfterAnother(loaders)
    found: Any = trainer.predict(module, batches)
    shares = from_all_ranks(found or [])
    logps, first = [], 0
    for pairs in sides:
        if pairs is None:  # nothing is held out
            logps.append(np.empty((0, 2), dtype=np.float32))
            continue
        last = first + pairs.num_steps * pairs.accumulate
        logps.append(_by_row((scored for share in shares for scored in share[first:last]), pairs))
        first = last
    return References(*logps)


class _OneAfterAnother:
    """Several loaders as one."""

    def __init__(self, loaders: Sequence[PackedLoader]) -> None:
        self._loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self._loaders))

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self._loaders)


@torch.inference_mode()
def _here(module: DpoModule, pairs: TrainingPlan, device: engine.Device) -> Logps:
    """The same on this rank alone."""
    module.configure_model()
    module.eval().to(device.type)
    batches: Any = PackedLoader(pairs)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.precision == "bf16-mixed"):
        return _by_row((module.predict_step(b.to(device.type), 0) for b in batches), pairs)


def _by_row(scored: Iterable[ScoredPairs], pairs: TrainingPlan) -> Logps:
    """By row of the store; NaN where a pair does not fit into a row of the plan."""
    logps = np.full((pairs.store.manifest.num_documents, 2), np.nan, dtype=np.float32)
    for rows, values in scored:
        logps[rows.numpy()] = values.numpy()
    fitting = pairs.sequences.document
    if len(bad := fitting[~np.isfinite(logps[fitting]).all(axis=1)]):
        raise UserError(
            f"log-probabilities of {len(bad)} pairs are not finite, the first is "
            f"{pairs.store.document_id(int(bad[0]))}: look at the model's weights and at this pair"
        )
    return logps


def _module(run: Training, plan: PhasePlan, backbone: BackboneSpec) -> DpoModule:
    """Uncompiled, as exams are: before training both answers come out equal to the last digit."""
    return DpoModule(
        objective=Objective(uses_reference=False),
        group_names={"source": ("",), "error": ("",), "task": ("",)},
        backbone=replace(backbone, recomputed_layers=0, compiled_tokens=None, lora=None),
        phase=plan.phase,
        optimizer=run.config.training.optimizer,
        num_steps=plan.num_steps,
        splits=1,
    )


def _key(run: Training, plan: PhasePlan, backbone: BackboneSpec) -> str:
    stores = (run.data.train, run.data.heldout)
    facts = {
        "version": VERSION,
        "weights": _weights(backbone, FileHashes(Path(run.config.paths.cache))),
        "data": [store.manifest.key.digest for store in stores],
        "layout": plan.data.settings.layout,
        "capacity": plan.data.settings.capacity,
        "precision": run.device.precision,
        "attention": run.device.kernel,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _weights(backbone: BackboneSpec, hashes: FileHashes) -> object:
    """Identity of the weights: the files' content or a commit of the hub, and any random seed."""
    folder = Path(backbone.folder)
    if not folder.is_dir():
        files: object = f"hub {backbone.folder} {_commit(backbone.folder, backbone.revision)}"
    else:
        names = sorted({path for pattern in FILES for path in folder.glob(pattern)})
        files = [(path.name, hashes.of(str(path))[0][1]) for path in names]
        hashes.save()
    return [files, backbone.seed if backbone.init == "random" else None]


def _commit(repo_id: str, revision: str) -> str:
    """The commit that a branch or tag of a hub model stands for in the local cache."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    # The config came through this cache; the loaded object no longer says from which commit.
    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(found, str):
        raise UserError(
            f"model.path={repo_id}: the cache does not tell the commit of revision {revision}; "
            "set model.revision to a commit of 40 hex digits, or give a local folder"
        )
    return Path(found).parent.name


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One process computes a key's numbers; others wait and read them."""
    with ExitStack() as held:
        if rank() == 0:
            folder, told = path.with_suffix(".making"), False
            held.callback(_remove_unused, folder)  # after the lock is let go
            while not path.exists() and (busy := _try_lock(held, folder)):
                if not told:
                    print(f"reference   waiting, {busy}", flush=True)
                told = True
                time.sleep(WAIT_SECONDS)
        yield


def _try_lock(held: ExitStack, folder: Path) -> str | None:
    """Who holds it, if somebody does."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            held.enter_context(locked(folder))
        except FileNotFoundError:
            continue  # its last user removed it just now
        except ArtifactError as busy:
            return str(busy)
        return None


def _remove_unused(folder: Path) -> None:
    with suppress(OSError):  # gone already, or another process's lock lies in it
        folder.rmdir()


def _write(path: Path, sides: References) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, train=sides.train, heldout=sides.heldout)
    content = buffer.getvalue()
    write_atomic(path, hashlib.sha256(content).digest() + content)


def _read(path: Path) -> References:
    raw = path.read_bytes()
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        raise ArtifactError(f"{path}: damaged reference log-probabilities; delete it and run again")
    arrays = np.load(io.BytesIO(raw[32:]), allow_pickle=False)
    return References(arrays["train"], arrays["heldout"])

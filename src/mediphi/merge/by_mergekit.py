"""The second backend: mergekit does the merge, for its other methods and as a check of ours."""

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mediphi.artifacts import room_for, write_atomic
from mediphi.artifacts.files import sync_folder
from mediphi.errors import ConfigError, MachineError, UserError
from mediphi.merge.agreement import dtype_name
from mediphi.merge.checkpoints import Checkpoint, open_checkpoint
from mediphi.merge.engine import MergeFacts, check_finite
from mediphi.merge.folders import companions
from mediphi.merge.mergekit_keys import check_keys
from mediphi.merge.storage import is_finite
from mediphi.merge.vocabularies import stop_ids

PARTIAL = "mergekit.partial"


def merge_by_mergekit(
    text: str, *, scratch: Path, target: Path, seed: int, max_shard_bytes: int
) -> MergeFacts:
    """Let mergekit merge what `text` says, in its YAML.

    The tokenizer is the first model's, unless the text names one; stop ids are those of all models.
    mergekit cannot go on where it was killed: it begins anew.

    Args:
        target: of a run that has no manifest yet: what is there, a killed attempt has left.

    Raises:
        UserError: mergekit is not installed, or refuses; or the result is not finite.
        MachineError: the disk is full; the next start begins anew.
    """
    merging, config = _loaded(text)
    parents = [open_checkpoint(Path(folder)) for folder in _folders(config)]
    partial = _emptied(scratch, target)
    options = merging.MergeOptions(
        copy_tokenizer=False,
        write_model_card=False,
        random_seed=seed,
        out_shard_size=max_shard_bytes,
        quiet=True,
    )
    try:
        with _without_advice(), room_for(scratch, _size(parents[0], config)):
            merging.run_merge(config, str(partial), options)
    except UserError:
        raise
    except OSError as error:
        raise MachineError(f"mergekit: {error.strerror}: {error.filename}") from None
    except Exception as error:  # it has no errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"merge.backend=mergekit: {type(error).__name__}: {reason}") from None
    merged = open_checkpoint(partial)
    _check_finite(merged, parents)
    for name, content in companions(parents).items():
        if not (partial / name).exists() or name == "generation_config.json":
            write_atomic(partial / name, content)
    files = {own.file for own in merged.tensors.values()}
    facts = MergeFacts(
        num_tensors=len(merged.tensors),
        num_parameters=sum(math.prod(own.shape) for own in merged.tensors.values()),
        num_bytes=sum((partial / file).stat().st_size for file in files),
        num_shards=len(files),
        num_resumed=0,
        stop_ids=tuple(stop_ids(parents)),
        notes=notes_on(text),
    )
    sync_folder(partial)
    partial.rename(target)
    sync_folder(target.parent)
    return facts


def notes_on(text: str) -> tuple[str, ...]:
    """What mergekit does in another way than we do.

    Raises:
        ConfigError: the text is none of mergekit's, or holds what it would pass over in silence.
    """
    _, config = _loaded(text)
    if config.dtype == "float32":
        return ()
    computes = f"in {config.dtype}" if config.dtype else "in the models' own type"
    return (
        f"mergekit computes {computes}, merge.backend=mediphi in float32: for the same numbers "
        "dtype: float32 in the file, with out_dtype for what is written",
    )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """transformers advises whoever calls it, here mergekit: no user can follow that."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _size(parent: Checkpoint, config: Any) -> int:
    """Bytes of a model like `parent`, in the type that mergekit writes."""
    named = getattr(torch, config.out_dtype or config.dtype or "", None)
    stated = named if isinstance(named, torch.dtype) else None
    return sum(
        math.prod(own.shape) * (stated or own.dtype).itemsize for own in parent.tensors.values()
    )


def _emptied(scratch: Path, target: Path) -> Path:
    """An empty folder for mergekit; `target` loses its name first, and its files then."""
    partial = scratch / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(partial)
        sync_folder(target.parent)
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def _check_finite(merged: Checkpoint, parents: Sequence[Checkpoint]) -> None:
    """mergekit looks at no number. The parents are read only where the result is at fault.

    Raises:
        UserError: naming the tensor, and the model where one brought it.
    """
    for name, own in merged.tensors.items():
        if is_finite(merged.read(name)):
            continue
        having = [parent for parent in parents if name in parent.tensors]
        check_finite(name, having)
        raise UserError(
            f"merge.backend=mergekit: tensor {name}: merged, it is not finite in "
            f"{dtype_name(own.dtype)}; choose other parameters or another dtype"
        )


def folders_in(text: str) -> tuple[str | None, list[str]]:
    """The base and the other models that a text names, as mergekit reads it."""
    _, config = _loaded(text)
    base = None if config.base_model is None else str(config.base_model.model.path)
    return base, [folder for folder in _folders(config) if folder != base]


def _folders(config: Any) -> list[str]:
    """Folders in the order of the text, the base first: a set has no order."""
    found = [str(one.model.path) for one in config.referenced_models()]
    base = None if config.base_model is None else str(config.base_model.model.path)
    return sorted(found, key=lambda folder: (folder != base, folder))


def _loaded(text: str) -> tuple[Any, Any]:
    import warnings

    from pydantic import ValidationError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, when it is imported
        try:
            from mergekit import merge as merging
            from mergekit.config import MergeConfiguration
        except ImportError:
            raise UserError(
                "merge.backend=mergekit: mergekit is not installed: pip install 'mediphi[merge]'"
            ) from None
    try:
        body = yaml.safe_load(text)
        config = MergeConfiguration.model_validate(body)
    except (yaml.YAMLError, ValidationError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError([f"merge.config: mergekit cannot read it: {reason}"]) from None
    check_keys(body, config)
    return merging, config

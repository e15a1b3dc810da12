"""The second backend: mergekit does the merge, for its other methods and as a check of ours."""

import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from mediphi.artifacts import write_atomic
from mediphi.artifacts.files import sync_folder
from mediphi.errors import ConfigError, MachineError, UserError
from mediphi.merge.checkpoints import open_checkpoint
from mediphi.merge.engine import MergeFacts
from mediphi.merge.folders import companions
from mediphi.merge.vocabularies import stop_ids

PARTIAL = "mergekit.partial"


def merge_by_mergekit(
    text: str, *, scratch: Path, target: Path, seed: int, max_shard_bytes: int
) -> MergeFacts:
    """Let mergekit merge what `text` says, in its YAML.

    Tokenizer and stop ids are the first model's, unless the text names a tokenizer. mergekit cannot
    go on where it was killed: it begins anew.

    Raises:
        UserError: mergekit is not installed, or refuses.
    """
    merging, config = _loaded(text)
    partial = scratch / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    options = merging.MergeOptions(
        copy_tokenizer=False,
        write_model_card=False,
        random_seed=seed,
        out_shard_size=max_shard_bytes,
        quiet=True,
    )
    try:
        merging.run_merge(config, str(partial), options)
    except OSError as error:
        raise MachineError(f"mergekit: {error.strerror}: {error.filename}") from None
    except Exception as error:  # it has no errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"merge.backend=mergekit: {type(error).__name__}: {reason}") from None
    first = open_checkpoint(Path(_folders(config)[0]))
    merged = open_checkpoint(partial)
    for name, content in companions([first]).items():
        if not (partial / name).exists() or name == "generation_config.json":
            write_atomic(partial / name, content)
    files = {own.file for own in merged.tensors.values()}
    facts = MergeFacts(
        num_tensors=len(merged.tensors),
        num_parameters=sum(math.prod(own.shape) for own in merged.tensors.values()),
        num_bytes=sum((partial / file).stat().st_size for file in files),
        num_shards=len(files),
        num_resumed=0,
        stop_ids=tuple(stop_ids([first])),
        notes=(),
    )
    sync_folder(partial)
    partial.rename(target)
    sync_folder(target.parent)
    return facts


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
        return merging, MergeConfiguration.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError([f"merge.config: mergekit cannot read it: {reason}"]) from None

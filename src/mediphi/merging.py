"""The flow of `stage=merge`: find the models, merge them, publish the artifact. Resumable."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mediphi.announcement import announce
from mediphi.artifacts import check_data, free_space, publish, write_atomic
from mediphi.config import config_hash, run_dir
from mediphi.config.merging import Merge
from mediphi.config.methods import METHODS
from mediphi.config.schema import Config
from mediphi.errors import ConfigError, UserError
from mediphi.launch import RunResult
from mediphi.merge.agreement import dtype_name
from mediphi.merge.checkpoints import open_checkpoint, read_json
from mediphi.merge.engine import Job, MergeFacts, merge, open_parents
from mediphi.merge.headers import Header, read_header, with_header
from mediphi.merge.mergekit_writing import write_mergekit
from mediphi.merge.mergekit_yaml import read_mergekit
from mediphi.merge.settings import check_layers, values_of
from mediphi.merge_card import Table, write_merge_card
from mediphi.progress import BytesDone
from mediphi.sources import (
    Sources,
    find_sources,
    inputs_of,
    licences_of,
    mergekits_sources,
    read_recipe_text,
)

MODEL = "model"
SCRATCH = "checkpoints"
"""Where a merge writes before it is whole; the manifest does not vouch for it."""
RECIPE = "merge.yml"


def merge_models(config: Config) -> RunResult:
    """Run `stage=merge` to its artifact, or go on where it was interrupted.

    The caller holds the run directory.

    Raises:
        UserError: whatever the user can mend, in one line.
    """
    started, folder = time.monotonic(), run_dir(config)
    recipe = read_recipe(config)
    text, sources = _text_and_sources(recipe)
    check_settings(recipe, sources)
    if recipe.backend == "mergekit":
        _tell_mergekits_notes(text)
    if config.check_only:
        show_plan(config, recipe, sources)
        return RunResult(None, folder)
    assert config.merge is not None
    check_data(folder, None, parents=inputs_of(config.merge, sources))
    print(f"run         {folder}")
    facts = write_merge(config, recipe, sources, text=text)
    return publish_merge(
        config, Published(recipe, sources, text, facts, time.monotonic() - started)
    )


def _text_and_sources(recipe: Merge) -> tuple[str, Sources]:
    """The merge in mergekit's YAML, and the folders that it reads."""
    if recipe.config is None:
        sources = find_sources(recipe)
        return recipe_text(recipe, sources), sources
    text = read_recipe_text(recipe.config)
    return text, mergekits_sources(text)


def _tell_mergekits_notes(text: str) -> None:
    """Refuse what mergekit would pass over, and say where it differs, before the run begins."""
    from mediphi.merge.by_mergekit import notes_on

    for note in notes_on(text):
        print(f"note        {note}")


def read_recipe(config: Config) -> Merge:
    """The merge of the config, or of the file that it names.

    Raises:
        ConfigError: the file is wrong.
        UserError: its slices do not make a model of the same layers.
    """
    told = config.merge
    assert told is not None
    if told.config is None or told.backend == "mergekit":
        _refuse_other_semantics(told)
        return told
    recipe = read_mergekit(Path(told.config))
    _refuse_other_semantics(told)
    semantics = recipe.header.semantics if recipe.header else told.semantics
    chosen = {"semantics": semantics, "max_shard_gb": told.max_shard_gb}
    merged = recipe.merge.model_copy(
        update=chosen | ({} if told.dtype is None else {"dtype": told.dtype})
    )
    if recipe.num_layers is not None:
        there = num_layers_of(find_sources(merged, verify=False))
        if there != recipe.num_layers:
            raise UserError(
                f"{told.config}: slices of {recipe.num_layers} layers, the models have {there}; "
                "for another number: merge.backend=mergekit"
            )
    return merged


def header_of(told: Merge) -> Header | None:
    """What the first line of the config's file says, where we wrote it.

    Raises:
        ConfigError: the file cannot be read, or the line is damaged.
    """
    if told.config is None:
        return None
    return read_header(read_recipe_text(told.config), told.config)


def seed_of(config: Config) -> int:
    """Of random masks: the one that the file was written with, else the config's."""
    header = header_of(config.merge) if config.merge else None
    return config.seed if header is None else header.seed


def _refuse_other_semantics(told: Merge) -> None:
    header = header_of(told)
    wanted = {told.semantics} | ({header.semantics} if header else set())
    if told.config is None or "paper" not in wanted:
        return
    if told.backend == "mergekit":
        why = "semantics=paper: backend=mergekit has its own reading only"
        raise ConfigError([f"{told.config}: {why}"])
    if header and header.semantics != "paper":
        why = "its first line says semantics=mergekit; remove the line for merge.semantics=paper"
        raise ConfigError([f"{told.config}: {why}"])


def check_settings(recipe: Merge, sources: Sources) -> None:
    """Refuse settings of layers that are not there, or that leave a tensor without a value, before
    the run begins.

    Raises:
        UserError: naming parameter and tensor; or a model folder is damaged.
    """
    if recipe.config is not None:
        return  # mergekit's alone
    num_layers = num_layers_of(sources)
    check_layers(recipe, num_layers=num_layers)
    if recipe.method not in METHODS:
        return
    values = values_of(recipe, num_layers=num_layers)
    for name in open_checkpoint(next(iter(sources.folders.values()))).tensors:
        values(name)


def num_layers_of(sources: Sources) -> int:
    """Of the models, which are all alike, as the first one's `config.json` says.

    Raises:
        UserError: it does not say.
    """
    folder = next(iter(sources.folders.values()))
    layers = read_json(folder / "config.json").get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers must be a whole number > 0")
    return layers


def job_of(config: Config, recipe: Merge, sources: Sources) -> Job:
    """The merge as the engine takes it."""
    assert recipe.method is not None
    return Job(
        method=recipe.method,
        semantics=recipe.semantics,
        base=sources.base,
        models=sources.models,
        dtype=recipe.dtype,
        seed=seed_of(config),
        max_shard_bytes=int(recipe.max_shard_gb * 1e9),
        threads=config.hardware.num_threads or os.cpu_count() or 1,
        device="cuda" if wants_gpu(config) else "cpu",
    )


def wants_gpu(config: Config) -> bool:
    """Whether the arithmetic runs on a GPU.

    Raises:
        UserError: one was asked for, and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if config.hardware.accelerator == "gpu" and not there:
        raise UserError("hardware.accelerator=gpu, but torch sees no CUDA device: use hardware=cpu")
    return there and config.hardware.accelerator != "cpu"


def show_plan(config: Config, recipe: Merge, sources: Sources) -> None:
    """What a merge would read and write; every folder is opened and compared, but for mergekit's
    own merges, which may be of models that differ."""
    folder, is_ours = run_dir(config), recipe.backend == "mediphi"
    parents = open_parents(job_of(config, recipe, sources)) if is_ours else None
    device = (
        "by mergekit" if parents is None else "on the GPU" if wants_gpu(config) else "on the CPU"
    )
    print(f"method      {recipe.method or recipe.config} ({recipe.semantics} semantics), {device}")
    for name, one in sources.folders.items():
        vouched = "manifest checked" if name in sources.parents else "no manifest"
        print(f"{name:<11} {one}  ({vouched})")
    if parents is not None:
        first = parents.checkpoints[0]
        files = {own.file for own in first.tensors.values()}
        size = sum((first.folder / file).stat().st_size for file in files)
        for note in parents.notes:
            print(f"note        {note}")
        print(f"tensors     {len(first.tensors):,}, {size / 1e9:.3g} GB a model")
    print(f"disk        {free_space(folder) / 1e9:.1f} GB free at {folder}")


def write_merge(config: Config, recipe: Merge, sources: Sources, *, text: str) -> MergeFacts:
    """Write the merged model to the run's model folder, which appears whole or not at all."""
    folder = run_dir(config)
    try:
        if recipe.backend == "mergekit":
            from mediphi.merge.by_mergekit import merge_by_mergekit

            return merge_by_mergekit(
                text,
                scratch=folder / SCRATCH,
                target=folder / MODEL,
                seed=seed_of(config),
                max_shard_bytes=int(recipe.max_shard_gb * 1e9),
            )
        with BytesDone("merging") as progress:
            return merge(
                job_of(config, recipe, sources),
                values=values_of(recipe, num_layers=num_layers_of(sources)),
                scratch=folder / SCRATCH / MODEL,
                target=folder / MODEL,
                progress=progress,
            )
    except UserError as error:
        if error.exit_code == 2:  # the models are at fault: there is nothing to go on with
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        raise


def recipe_text(recipe: Merge, sources: Sources) -> str:
    """The merge in mergekit's YAML.

    It knows one type for all tensors; where the models have several and none is stated, that is
    float32, which holds them all.
    """
    return write_mergekit(
        recipe,
        base=sources.base,
        models=sources.models,
        num_layers=num_layers_of(sources),
        dtype=recipe.dtype or _stored_dtype(sources) or "float32",
    )


def _stored_dtype(sources: Sources) -> str | None:
    """Of the first model's floats, whatever its config says; None where they have several."""
    first = open_checkpoint(next(iter(sources.folders.values())))
    found = {own.dtype for own in first.tensors.values() if own.dtype.is_floating_point}
    return dtype_name(found.pop()) if len(found) == 1 else None


class Published(NamedTuple):
    """What is published; `text` is the merge in mergekit's YAML."""

    recipe: Merge
    sources: Sources
    text: str
    facts: MergeFacts
    seconds: float


def publish_merge(
    config: Config,
    merged: Published,
    *,
    metrics: Mapping[str, Any] | None = None,
    tables: Sequence[Table] = (),
) -> RunResult:
    """Write what is there to look at, and last of all the manifest.

    Args:
        metrics: what `metrics.json` says of a search.
        tables: of the model card.
    """
    folder, recipe, sources, facts = run_dir(config), merged.recipe, merged.sources, merged.facts
    method = recipe.method or str(yaml.safe_load(merged.text)["merge_method"])
    is_ours = recipe.backend == "mediphi"
    own_dtypes = is_ours and recipe.dtype is None and _stored_dtype(sources) is None
    header = Header(recipe.semantics, seed_of(config), own_dtypes)
    text = with_header(merged.text, header, method=method)
    write_atomic(folder / RECIPE, text)
    told = {
        "method": method,
        "semantics": header.semantics,
        "seed": header.seed,
        "parameters": f"{facts.num_parameters:,}",
        "tensors": f"{facts.num_tensors:,}",
        "stop ids": ", ".join(map(str, facts.stop_ids)),
    }
    nothing = {"objective": {"name": None, "value": None}}
    body = {**(metrics or nothing), "exams": {}}
    write_atomic(folder / "metrics.json", json.dumps(body, indent=1) + "\n")
    write_merge_card(
        folder, method=method, sources=sources, recipe_yaml=text, facts=told, tables=tables
    )
    publish(
        folder,
        config_hash=config_hash(config),
        parents=sources.parents,
        data={
            "fingerprint": sources.fingerprint,
            "counts": {},
            "licences": licences_of(sources.parents),
        },
        extra={
            **told,
            "notes": list(facts.notes),
            "seconds": round(merged.seconds, 1),
            "next": next_command(folder),
        },
    )
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return announce(folder)


def next_command(folder: Path) -> str:
    """The recipe's next stage from the model in `folder`."""
    return f"python train.py stage=sft corpus=mediflow {shlex.quote(f'model.path={folder}')}"

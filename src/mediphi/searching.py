"""The flow of `stage=search`: candidates built in memory, scored, the winner merged and published.

What is done shows on disk: the ledger has every candidate, the merge its journal, and last of all
the manifest comes. Every step looks there first.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from mediphi import engine, tracking
from mediphi.artifacts import check_data, write_atomic
from mediphi.backbone import BackboneSpec, build_model, load_tokenizer
from mediphi.config import run_dir, run_name
from mediphi.config.merging import Merge
from mediphi.config.methods import METHODS
from mediphi.config.schema import Config
from mediphi.config.stages import SearchStage
from mediphi.config.validation import Validation
from mediphi.data.validation_sets import ValidationSet, build_sets
from mediphi.errors import UserError
from mediphi.launch import RunResult
from mediphi.merge.candidates import Candidates
from mediphi.merge.engine import open_parents
from mediphi.merge.operators import MergeError
from mediphi.merge.search import (
    CandidateError,
    Evaluation,
    Genome,
    Hopeless,
    Record,
    SearchResult,
    SearchSettings,
    Space,
    SpaceOptions,
    search,
)
from mediphi.merge.search.genomes import merge_of
from mediphi.merging import (
    job_of,
    num_layers_of,
    publish_merge,
    recipe_text,
    show_plan,
    write_merge,
)
from mediphi.scoring import Scorer
from mediphi.sources import Sources, find_sources
from mediphi.tracking.names import search_header
from mediphi.tracking.progress import silence_lightning

LEDGER = "ledger.jsonl"
PAGE = "search.html"
EARLY_STOP_RISK = 0.01
"""Chance, over a whole search with `early_stop`, of giving up a candidate that would have won."""


def search_merge(config: Config) -> RunResult:
    """Search the parameters of a merge, and publish the winner, or go on where it was interrupted.

    The caller holds the run directory.

    Raises:
        UserError: whatever the user can mend, in one line.
        Interrupted: a signal came; all finished evaluations are in the ledger.
    """
    started, stage, merge, validation = time.monotonic(), *_sections(config)
    silence_lightning()
    engine.limit_threads(config.hardware)
    sources = find_sources(merge)
    space = _space(stage, merge)
    sets = build_sets(validation, seed=config.seed)
    if config.check_only:
        show_plan(config, merge, sources)
        _show_search(space, sets, stage)
        return RunResult(None, run_dir(config))
    fingerprint = _fingerprint(sources, sets)
    check_data(run_dir(config), fingerprint, parents=sources.parents)
    print(f"run         {run_dir(config)}")
    _show_search(space, sets, stage)
    found = _search(config, space, sources, sets, fingerprint)
    winner = merge_of(merge, space, found.winner.genome, num_layers=num_layers_of(sources))
    text = recipe_text(winner, sources)
    facts = write_merge(config, winner, sources, text=text)
    return publish_merge(
        config,
        winner,
        sources,
        text=text,
        facts=facts,
        seconds=time.monotonic() - started,
        found=found,
    )


def _sections(config: Config) -> tuple[SearchStage, Merge, Validation]:
    assert isinstance(config.stage, SearchStage)
    assert config.merge is not None and config.validation is not None
    return config.stage, config.merge, config.validation


def _space(stage: SearchStage, merge: Merge) -> Space:
    assert merge.method is not None
    plain = {k: v for k, v in merge.parameters.items() if not isinstance(v, tuple)}
    options = SpaceOptions(
        searched=stage.searched,
        fixed={own.name: plain.get(own.name, _stand_in(own)) for own in METHODS[merge.method].parameters},
        bounds=stage.bounds,
        shared=stage.one_for_all,
        num_layer_groups=stage.layer_groups,
    )
    return Space(merge.method, list(merge.models), options)

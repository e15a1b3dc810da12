"""The flow of `stage=search`: candidates built in memory and scored, the winner merged, published.

What is done shows on disk: the ledger has every candidate, the merge its journal, and last of all
comes the manifest. Every step looks there first.
"""

import json
import math
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mediphi import engine, tracking
from mediphi.artifacts import check_data
from mediphi.candidate_bench import Bench
from mediphi.config import run_dir, run_name
from mediphi.config.merging import Merge
from mediphi.config.methods import METHODS, Parameter
from mediphi.config.schema import Config
from mediphi.config.search_rules import moved_parameters
from mediphi.config.stages import SearchStage
from mediphi.config.validation import Validation
from mediphi.data.validation_cache import known_sets
from mediphi.data.validation_sets import ValidationSet, fingerprint_of
from mediphi.errors import UserError
from mediphi.launch import RunResult
from mediphi.merge.engine import open_parents
from mediphi.merge.search import (
    Estimate,
    Record,
    SearchResult,
    SearchSettings,
    Space,
    SpaceOptions,
    search,
)
from mediphi.merge.search.genomes import merge_of
from mediphi.merge.search.page import write_search_page
from mediphi.merge.search.settings import make_strategy
from mediphi.merge.search.strategies import grid_axes
from mediphi.merge_card import Table
from mediphi.merging import (
    Published,
    check_settings,
    job_of,
    num_layers_of,
    publish_merge,
    recipe_text,
    show_plan,
    write_merge,
)
from mediphi.sources import Sources, find_sources, inputs_of
from mediphi.tracking.names import search_header
from mediphi.tracking.progress import silence_lightning

LEDGER = "ledger.jsonl"


def search_merge(config: Config) -> RunResult:
    """Search the parameters of a merge and publish the winner, or go on where it was interrupted.

    The caller holds the run directory.

    Raises:
        UserError: whatever the user can mend, in one line.
        Interrupted: a signal came; all finished evaluations are in the ledger.
    """
    started = time.monotonic()
    stage, merge, validation = _sections(config)
    silence_lightning()
    engine.limit_threads(config.hardware)
    space = _space(stage, merge)
    settings = _settings(config, space)
    make_strategy(space, settings)  # refuses what does not fit before anything is read
    sources = find_sources(merge)
    open_parents(job_of(config, merge, sources))  # refuses before texts are read and runs logged
    if stage.layer_groups > (most := num_layers_of(sources)):
        raise UserError(f"stage.layer_groups={stage.layer_groups}: the models have {most} layers")
    begins = merge_of(merge, space, space.decode(space.start), num_layers=most)
    check_settings(begins, sources)
    sets = known_sets(validation, seed=config.seed, cache=Path(config.paths.cache))
    if config.check_only:
        show_plan(config, merge, sources)
        _tell(space, sets, stage)
        return RunResult(None, run_dir(config))
    fingerprint = fingerprint_of(sets)
    check_data(run_dir(config), fingerprint, parents=inputs_of(merge, sources))
    print(f"run         {run_dir(config)}")
    _tell(space, sets, stage)
    settings = replace(settings, identity=_identity(config, sources, fingerprint))
    found = _found(config, space, sources, sets, settings)
    winner = merge_of(merge, space, found.winner.genome, num_layers=num_layers_of(sources))
    text = recipe_text(winner, sources)
    facts = write_merge(config, winner, sources, text=text)
    told = _metrics(found)
    write_search_page(
        run_dir(config),
        title=f"{merge.method} of {', '.join(merge.models)}",
        space=space,
        result=found,
        facts={
            "Questions": sum(len(one.search) for one in sets),
            "Held out": sum(len(one.holdout) for one in sets),
        },
    )
    published = Published(winner, sources, text, facts, time.monotonic() - started)
    return publish_merge(
        config, published, metrics=told, tables=[_table(found, sets), _worth(found)]
    )


def _sections(config: Config) -> tuple[SearchStage, Merge, Validation]:
    assert isinstance(config.stage, SearchStage)
    assert config.merge is not None and config.validation is not None
    return config.stage, config.merge, config.validation


def _space(stage: SearchStage, merge: Merge) -> Space:
    assert merge.method is not None
    method = METHODS[merge.method]
    moved = moved_parameters(stage, method)
    options = SpaceOptions(
        searched=[own.name for own in moved],
        fixed={own.name: _stand_in(own, merge) for own in method.parameters if own not in moved},
        bounds=stage.bounds,
        shared=stage.one_for_all,
        start=_start(merge),
        num_layer_groups=stage.layer_groups,
    )
    return Space(merge.method, list(merge.models), options)


def _start(merge: Merge) -> dict[str, float]:
    """The merge's own plain numbers, by parameter and by parameter and model."""
    found: dict[str, object] = dict(merge.parameters)
    for name, model in merge.models.items():
        own = merge.parameters | model.parameters
        found |= {f"{parameter}/{name}": value for parameter, value in own.items()}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _stand_in(parameter: Parameter, merge: Merge) -> float | bool:
    """What the space shows of a parameter that is not searched; `merge_of` leaves the merge's own,
    gradients and filters too, and the ledger's identity has them."""
    given = merge.parameters.get(parameter.name, parameter.default)
    return parameter.low if given is None or isinstance(given, tuple) else given


def _tell(space: Space, sets: list[ValidationSet], stage: SearchStage) -> None:
    most = _evaluations(stage, space)
    budget = f"{most:,} candidate{'s' * (most > 1)}"
    if stage.minutes is not None:
        budget += f" or {stage.minutes:g} minutes"
    print(f"search      {stage.strategy}, {len(space.coordinates)} coordinates, {budget}")
    for one in sets:
        print(f"validation  {one.name}: {len(one.search)} questions, {len(one.holdout)} held out")


def _evaluations(stage: SearchStage, space: Space) -> int:
    """At most; a grid has as many as combinations; a greedy soup tries every model alone, and then
    all but the first once more."""
    if stage.strategy == "greedy":
        return min(stage.evaluations, 2 * len(space.models) - 1)
    if stage.strategy != "grid":
        return stage.evaluations
    size = math.prod(map(len, grid_axes(space, stage.grid)))
    if size > stage.evaluations:
        raise UserError(
            f"stage.evaluations={stage.evaluations}: the grid has {size:,} combinations; allowed: "
            f"{size} or more, or fewer values in stage.grid"
        )
    return size


def _identity(config: Config, sources: Sources, fingerprint: str) -> str:
    """Of all that a genome's score depends on beside the space."""
    stage, merge, _ = _sections(config)
    read = {name: one.sha256 for name, one in (sources.parents | sources.plain).items()}
    content = [merge.model_dump(mode="json"), read, fingerprint, config.seed, stage.layer_groups]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _settings(config: Config, space: Space) -> SearchSettings:
    """Without the identity, for which files have to be read."""
    stage, _, _ = _sections(config)
    return SearchSettings(
        strategy=stage.strategy,
        seed=config.seed,
        sigma=stage.sigma,
        population=stage.population,
        num_evaluations=_evaluations(stage, space),
        minutes=stage.minutes,
        grid=stage.grid,
        risk=stage.early_stop_risk if stage.early_stop else None,
    )


def _found(
    config: Config,
    space: Space,
    sources: Sources,
    sets: list[ValidationSet],
    settings: SearchSettings,
) -> SearchResult:
    """The search itself, logged as it goes."""
    folder = run_dir(config)
    loggers = tracking.make_loggers(
        config.logger,
        run_dir=folder,
        run_name=run_name(config),
        header=search_header([one.name for one in sets], space.names),
        config_dict=config.model_dump(mode="json"),
    )
    exit_code, log = 1, _Log(loggers)
    try:
        tracking.begin_phase(loggers, "search", first_step=0)
        with Bench(config, space, sources, sets) as bench:
            found = search(
                space,
                bench.fitness,
                settings=settings,
                ledger_path=folder / LEDGER,
                holdout=bench.holdout,
                on_evaluation=log,
                on_known=log,
            )
        exit_code = 0
        return found
    finally:
        tracking.finish(loggers, exit_code=exit_code)


class _Log:
    """Every record, old and new, to the loggers: `metrics.csv` is written anew on a resume."""

    def __init__(self, loggers: list[Any]) -> None:
        self._loggers, self._best = loggers, float("-inf")

    def __call__(self, record: Record) -> None:
        row = {f"genome/{name}": value for name, value in record.genome.items()}
        row["search/seconds"] = record.seconds
        if record.evaluation is not None:
            fitness = record.evaluation.fitness
            row["search/fitness"] = fitness
            row |= {f"search/set/{k}": v for k, v in record.evaluation.by_set.items()}
            if record.status == "ok":
                self._best = max(self._best, fitness)
        if self._best > float("-inf"):
            row["search/best"] = self._best
        if record.holdout is not None:
            row["search/holdout"] = record.holdout.fitness
        tracking.log(self._loggers, row, step=record.number)


def _metrics(found: SearchResult) -> dict[str, Any]:
    """What `metrics.json` tells of a search; the objective is the hold-out score."""
    winner = found.winner
    return {
        "objective": {"name": "search/holdout", "value": found.holdout and found.holdout.mean},
        "search": {
            "fitness": winner.fitness,
            "corrected": found.corrected and found.corrected._asdict(),
            "holdout": found.holdout and found.holdout._asdict(),
            "gap": found.gap,
            "genome": dict(winner.genome),
            "evaluations": len(found.records),
            "failed": found.count("failed"),
            "stopped": found.count("stopped"),
            "repeated": found.num_repeated,
            "seconds": round(found.seconds, 1),
        },
    }


def _table(found: SearchResult, sets: list[ValidationSet]) -> Table:
    """The winner's scores, as the model card shows them."""
    searched, held = found.winner.evaluation, found.winner.holdout
    assert searched is not None
    rows: list[tuple[object, ...]] = [("validation set", "search part", "hold-out part")]
    for one in sets:
        theirs = "-" if held is None else _percent(held.by_set[one.name])
        rows.append((one.name, _percent(searched.by_set[one.name]), theirs))
    rows.append(
        ("mean", _percent(searched.fitness), "-" if held is None else _percent(held.fitness))
    )
    return "The winner on the validation sets", rows


def _worth(found: SearchResult) -> Table:
    """What is left of the winner's score once luck is taken off, for the model card."""
    rows: list[tuple[object, ...]] = [
        ("what the score is worth", "mean of the sets, 95 % interval")
    ]
    assert found.winner.fitness is not None
    rows.append(("search part, which chose it", _percent(found.winner.fitness)))
    if found.corrected is not None and found.correction is not None:
        rows += [
            ("search part, corrected for the choice", _interval(found.corrected)),
            ("correction", f"{100 * found.correction:+.1f} points"),
        ]
    elif not found.count("stopped"):
        rows.append(("no corrected score: it needs two questions or more of every set", "-"))
    if found.holdout is not None and found.gap is not None:
        rows += [
            ("hold-out part, which chose nothing", _interval(found.holdout)),
            ("gap: search part less hold-out part", f"{100 * found.gap:+.1f} points"),
        ]
    rows.append(("candidates scored to the end", f"{found.count('ok'):,}"))
    if given_up := found.count("stopped"):
        rows.append(("candidates given up: no corrected score", f"{given_up:,}"))
    if failed := found.count("failed"):
        rows.append(("candidates that failed", f"{failed:,}"))
    return "What that is worth", rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(one: Estimate) -> str:
    return f"{_percent(one.mean)} [{100 * one.low:.1f}, {100 * one.high:.1f}]"

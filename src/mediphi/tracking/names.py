"""The table of metric names: one vocabulary for CSV, W&B, TensorBoard, progress and reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Objective = Literal["tokens", "pairs"]
"""What a stage's loss is a mean over."""

SPLITS = {"train": "since the row before", "heldout": "on held-out data"}
GROUPINGS = {
    "kind": "kind of text",
    "source": "data source",
    "task": "task type",
    "error": "type of error in the rejected answer",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as logged; `{kind}` and `{source}` stand for one name per task kind or data source.
        unit: as shown on axes.
        meaning: one line.
        objective: only of stages with this one; None: of all.
        wall_clock: depends on the machine and the moment, so two equal runs differ in it.
    """

    name: str
    unit: str
    meaning: str
    objective: Objective | None = None
    wall_clock: bool = False


def _per_split(
    name: str, unit: str, meaning: str, *groupings: str, objective: Objective
) -> list[Metric]:
    """A metric of training and of held-out data, in all and per group."""
    metrics = []
    for split, text in SPLITS.items():
        metrics.append(Metric(f"{split}/{name}", unit, f"{meaning}, {text}", objective))
        for grouping in groupings:
            about = f"{split}/{name} of one {GROUPINGS[grouping]}"
            full = f"{split}/{name}/{grouping}/{{{grouping}}}"
            metrics.append(Metric(full, unit, about, objective))
    return metrics


_TEXT = ("kind", "source", "task")


def _per_pair(name: str, unit: str, meaning: str) -> list[Metric]:
    return _per_split(name, unit, meaning, "error", "task", objective="pairs")


METRICS: tuple[Metric, ...] = (
    Metric("epoch", "passes", "position in the data: passes over the phase's rows so far"),
    Metric("tokens_seen", "tokens", "tokens trained on since the phase began, all ranks"),
    Metric("packing_efficiency", "share", "tokens over the room of the packed rows"),
    Metric("lr", "", "learning rate of the last update"),
    Metric("grad_norm", "", "global gradient norm of the last update, before clipping"),
    *_per_split("loss", "nats/token", "cross-entropy per token", *_TEXT, objective="tokens"),
    *_per_split("perplexity", "", "exp of the loss", *_TEXT, objective="tokens"),
    *_per_split("accuracy", "share right", "targets ranked first", *_TEXT, objective="tokens"),
    *_per_pair("loss", "", "preference loss per pair, without the SFT term"),
    *_per_pair("sft_loss", "nats/token", "cross-entropy of the chosen answer"),
    *_per_pair("margin", "", "reward of chosen less rejected"),
    *_per_pair("accuracy", "share right", "chosen rewarded more"),
    *_per_pair("reward/chosen", "", "beta x log-ratio to the reference"),
    *_per_pair("reward/rejected", "", "beta x log-ratio to the reference"),
    *_per_pair("logps/chosen", "nats", "log-probability, summed"),
    *_per_pair("logps/rejected", "nats", "log-probability, summed"),
    *_per_pair("logps_per_token/chosen", "nats/token", "log-probability"),
    *_per_pair("logps_per_token/rejected", "nats/token", "log-probability"),
    *_per_pair(
        "kl",
        "nats/token",
        "log-ratio to the reference per token of both answers: an estimate off policy",
    ),
    Metric("quiz/{difficulty}", "share right", "multiple-choice accuracy on codes"),
    Metric("exam/{group}", "share right or mean score", "score on one kind of held-out item"),
    Metric("tokens_per_second", "tokens/s", "training speed since the row before", wall_clock=True),
    Metric("mfu", "share of peak", "model FLOPs, true attention, over the peak", wall_clock=True),
    Metric("memory_gb", "GB", "peak memory of the device or process", wall_clock=True),
)

SEARCH_METRICS: tuple[Metric, ...] = (
    Metric("search/fitness", "share right", "mean accuracy over the sets, of one candidate"),
    Metric("search/best", "share right", "the highest fitness so far"),
    Metric("search/holdout", "share right", "of a new best, on items that no search has seen"),
    Metric("search/set/{set}", "share right", "accuracy on one validation set"),
    Metric("genome/{coordinate}", "", "a parameter of the candidate"),
    Metric("search/seconds", "s", "to build and score the candidate", wall_clock=True),
)

_SLOTS = (*GROUPINGS, "difficulty", "group")

PLACE = ("step", "phase")
"""First columns of `metrics.csv`: optimizer steps since the run began, name of the phase."""

WALL_CLOCK = tuple(m.name for m in METRICS if m.wall_clock)
"""Last columns of `metrics.csv`; drop them to compare two runs."""


def header(objective: Objective, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Every metric name of a run, in the table's order; wall-clock ones last.

    Args:
        objective: of the stage.
        groups: `kind`, `source`, `task`, `error`, `difficulty`, `group` -> the names that occur;
            `train/source` those of one split.
    """
    names: list[str] = []
    for metric in METRICS:
        if metric.objective not in (None, objective):
            continue
        slot = next((g for g in _SLOTS if f"{{{g}}}" in metric.name), None)
        if slot is None:
            names.append(metric.name)
        else:
            split = metric.name.partition("/")[0]
            values = groups.get(f"{split}/{slot}", groups.get(slot, ()))
            names += [metric.name.replace(f"{{{slot}}}", value) for value in values]
    return names


def search_header(sets: Sequence[str], coordinates: Sequence[str]) -> list[str]:
    """Every metric name of a search, by validation sets and by what is searched."""
    slots = {"{set}": sets, "{coordinate}": coordinates}
    names: list[str] = []
    for metric in SEARCH_METRICS:
        slot = next((one for one in slots if one in metric.name), None)
        names += [metric.name.replace(slot, v) for v in slots[slot]] if slot else [metric.name]
    return names


def unit_of(name: str) -> str:
    """Unit of a metric; of `train/loss/kind/summary` the unit of its pattern."""
    for metric in (*METRICS, *SEARCH_METRICS):
        stem, slot, _ = metric.name.partition("{")
        if name == stem or (slot and name.startswith(stem)):
            return metric.unit
    raise KeyError(name)

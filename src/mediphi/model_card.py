"""README.md of a run directory: a model card with licences, data and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from mediphi.announcement import ExamTable
from mediphi.artifacts import write_atomic
from mediphi.config.schema import Config
from mediphi.markdown import USE, table, terms
from mediphi.origins import hub_names, is_hub_id

TOO_LONG = "left out, longer than max_length"


def write_card(
    folder: Path,
    *,
    config: Config,
    counts: Mapping[str, Mapping[str, int]],
    facts: Mapping[str, object],
    exams: Sequence[ExamTable],
) -> None:
    """Write the card.

    Args:
        counts: per source, as in the manifest.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _base_models(config),
        "tags": ["mediphi", config.stage.kind, config.corpus.name],
    }
    header = yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)
    parts = [
        f"---\n{header}---\n",
        f"# {config.stage.kind} on {config.corpus.name}\n",
        "Research only. Not a medical device, not for decisions about patients.\n",
        table(("", ""), [(key, value) for key, value in facts.items()]),
        "## Data\n",
        table(
            ("source", "licence", "terms", "train", "held out", TOO_LONG, "duplicates"),
            [
                (name, source.licence.id, terms(source.licence), *_documents(counts[name]))
                for name, source in config.corpus.sources.items()
            ],
        ),
    ]
    for exam in exams:
        parts += [f"## {exam.title}\n", table(exam.rows[0], exam.rows[1:])]
    parts.append(USE)
    write_atomic(folder / "README.md", "\n".join(parts))


def _base_models(config: Config) -> list[str]:
    """Names on the hub, or of a folder; of weights from nowhere none."""
    path = config.model.path
    if path is None or not config.model.is_pretrained:
        return []
    return [path] if is_hub_id(path) else hub_names({"start": Path(path)})


def _documents(count: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Trained on, held out, too long for either, duplicates."""
    train, heldout = count["train_too_long"], count["heldout_too_long"]
    return (
        count["train"] - train,
        count["heldout"] - heldout,
        train + heldout,
        count["exact_duplicates"] + count["near_duplicates"],
    )

"""README.md of a merge: a model card with its recipe, its parents' hashes and their licences."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from mediphi.artifacts import write_atomic
from mediphi.config.corpus import Licence
from mediphi.config.methods import METHODS
from mediphi.markdown import USE, table, terms
from mediphi.origins import Licences, hub_names, licences_behind
from mediphi.sources import BASE, Sources, licences_of

UNKNOWN = "no manifest: licence unknown, ask whoever published it"

Table = tuple[str, Sequence[Sequence[object]]]
"""A title and rows of short cells, header first."""


def write_merge_card(
    folder: Path,
    *,
    method: str,
    sources: Sources,
    recipe_yaml: str,
    facts: Mapping[str, object],
    tables: Sequence[Table] = (),
) -> None:
    """Write the card.

    Args:
        method: ours or one of mergekit's own.
        recipe_yaml: the merge in mergekit's words.
        tables: of what the merge was scored on.
    """
    told = licences_behind(sources.folders)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **told.front(),
        "base_model": hub_names(sources.folders),
        "base_model_relation": "merge",
        "tags": ["mediphi", "merge", "mergekit", method],
    }
    known = METHODS.get(method)
    how = method if known is None else f"{known.title} ({known.source})"
    licences = {n: Licence.model_validate(own) for n, own in licences_of(sources.parents).items()}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {method} of {', '.join(sources.models)}\n",
        "Research only. Not a medical device, not for decisions about patients.\n",
        f"Merged by {how}.\n",
        table(("", ""), list(facts.items())),
        "## Models\n",
        table(("name", "model", "sha256"), [_row(sources, name) for name in sources.folders]),
        "## Licences\n",
        table(("model", "licence, with its data's"), list(_licence_rows(told))),
        _conclusion(told),
        "## Licences of the data behind them\n",
        table(
            ("source", "licence", "terms"),
            [(name, one.id, terms(one)) for name, one in licences.items()],
        )
        if licences
        else f"{UNKNOWN}.\n",
    ]
    for title, rows in tables:
        parts += [f"## {title}\n", table(rows[0], rows[1:])]
    parts += [
        f"## Recipe\n\n```yaml\n{_by_names(recipe_yaml, sources.folders)}```\n",
        USE,
    ]
    write_atomic(folder / "README.md", "\n".join(parts))


def _licence_rows(told: Licences) -> Iterator[tuple[str, str]]:
    for name, own in told.by_model.items():
        yield name, ", ".join(sorted(own)) or "unknown"


def _conclusion(told: Licences) -> str:
    """What the front matter says of a licence, in words."""
    if told.unknown:
        return (
            f"No licence is given to this model: {', '.join(told.unknown)} and what came before "
            "do not all state one.\n"
        )
    if told.front() == {"license": "other"}:
        return "They differ: what you may do with this model has to obey all of them.\n"
    return "They are all alike.\n"


def _row(sources: Sources, name: str) -> tuple[str, str, str]:
    """A model of the merge: its name, its folder, and what vouches for it."""
    if name in sources.parents:
        vouched = f"{sources.parents[name].sha256[:16]} of its manifest"
    else:
        vouched = f"{sources.plain[name].sha256[:16]} of its files, sampled; {UNKNOWN}"
    shown = f"{name} (the base)" if name == BASE else name
    return shown, ", ".join(hub_names({name: sources.folders[name]})), vouched


def _by_names(recipe_yaml: str, folders: Mapping[str, Path]) -> str:
    """The recipe with the models' names instead of folders: cards are published, and folders tell
    of the machine that they are on. The run's own recipe keeps them."""
    names = {str(folder): name for name, folder in folders.items()}
    lines = recipe_yaml.splitlines(keepends=True)
    remarks = takewhile(lambda line: line.startswith("#"), lines)
    return "".join(remarks) + yaml.safe_dump(
        _renamed(yaml.safe_load(recipe_yaml), names), sort_keys=False
    )


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A YAML value with the strings replaced that have another name."""
    if isinstance(value, dict):
        return {key: _renamed(own, names) for key, own in value.items()}
    if isinstance(value, list):
        return [_renamed(own, names) for own in value]
    return names.get(value, value) if isinstance(value, str) else value

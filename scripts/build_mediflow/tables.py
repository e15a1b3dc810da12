"""Counts as Markdown, for the terminal and the README of the set."""

from collections import Counter
from statistics import median

from tokenizers import Tokenizer

from scripts.build_mediflow.licences import SOURCES
from scripts.build_mediflow.rows import TASK_TYPES
from scripts.build_mediflow.selection import Selection, num_tokens


def by_source(selection: Selection) -> str:
    """Rows of each task type and source, with the licence."""
    counts = {
        split: Counter((row.task.task_type, row.task.source) for row in rows)
        for split, rows in selection.rows.items()
    }
    lines = ["| task type | source | licence | train | held out |", "|---|---|---|--:|--:|"]
    keys = counts["train"].keys() | counts["heldout"].keys()
    for task, source in sorted(keys, key=lambda key: (TASK_TYPES.index(key[0]), key[1])):
        train, heldout = counts["train"][task, source], counts["heldout"][task, source]
        name, licence = SOURCES[source][:2]
        lines.append(f"| {task} | {name} | {licence} | {train:,} | {heldout:,} |")
    return "\n".join(lines)


def by_task(selection: Selection, tokenizer: Tokenizer) -> str:
    """Rows of each task type, and tokens of its training rows."""
    train, heldout = selection.rows["train"], selection.rows["heldout"]
    counts = Counter(row.task.task_type for row in heldout)
    lines = ["| task type | train | held out | median tokens |", "|---|--:|--:|--:|"]
    everything = []
    for task in TASK_TYPES:
        lengths = [num_tokens(row, tokenizer) for row in train if row.task.task_type == task]
        everything += lengths
        middle = f"{median(lengths):.0f}" if lengths else ""
        lines.append(f"| {task} | {len(lengths):,} | {counts[task]:,} | {middle} |")
    total = f"{len(train):,} | {len(heldout):,} | {median(everything):.0f}"
    return "\n".join([*lines, f"| all | {total} |"])


def by_reason(selection: Selection) -> str:
    """Dropped candidates."""
    reasons = dict.fromkeys(reason for _, reason in sorted(selection.dropped))
    lines = ["| dropped because | train | held out |", "|---|--:|--:|"]
    for reason in reasons:
        counts = [selection.dropped[split, reason] for split in ("train", "heldout")]
        lines.append(f"| {reason} | {counts[0]:,} | {counts[1]:,} |")
    return "\n".join(lines)

"""Makes `assets/corpora/mediflow_dpo`: preference pairs from the best rows of `mediflow`.

    python scripts/build_mediflow_dpo.py

As in MediPhi (arXiv 2505.10717): the best rows by quality within each stratum of task, document
type and format; three pairs for the best of them, two for the next, one for the others, in the
paper's proportion of 20 : 25 : 40. The rejected sides are written by rules, each pair of a row with
another error type. Pairs of rows from the `questions_*` files, which may hold health information of
persons, go into files of the same name. The same bytes come out every time.
"""

import hashlib
import json
import lzma
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mediphi.synthesize.corruption import ERROR_TYPES, corrupt

CORPORA = Path(__file__).resolve().parents[1] / "assets" / "corpora"
SOURCE, OUTPUT = CORPORA / "mediflow", CORPORA / "mediflow_dpo"
NUM_ROWS = {"train": 2000, "heldout": 260}
TIERS = ((3, 20), (2, 25), (1, 40))
"""Pairs of a row, and thousands of rows that have so many in the paper, best first."""
POOL_SIZE = 30
MARKS = ("<!-- tables -->", "<!-- end of tables -->")

Row = dict[str, Any]


def read_rows(name: str) -> list[Row]:
    with lzma.open(SOURCE / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_split(split: str) -> list[Row]:
    """Rows of both files."""
    return read_rows(split) + read_rows(f"questions_{split}")


def number_of(*parts: str) -> int:
    """A number that looks random and depends on the parts only."""
    return int(hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:12], 16)


def number_of_row(row: Row) -> int:
    return number_of(row["instruction"], row["input"], row["output"])


def by_stratum(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of each task, document type and format, the best first."""
    strata: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (-row["quality"], number_of_row(row))):
        strata[row["task_type"], row["input_data"], row["output_format"]].append(row)
    return dict(strata)


def best_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """The same share of every stratum, its best; at least one row of each. Sorted by quality."""
    ranked = [
        (rank / len(stratum), -row["quality"], number_of_row(row), row)
        for stratum in by_stratum(rows).values()
        for rank, row in enumerate(stratum)
    ]
    ranked.sort(key=lambda entry: entry[:3])
    chosen = sorted(ranked[:count], key=lambda entry: entry[1:3])
    return [entry[3] for entry in chosen]


def num_pairs(count: int) -> Iterator[int]:
    """Pairs of each of `count` rows, best first."""
    total = sum(share for _, share in TIERS)
    reached = 0
    for pairs, share in TIERS:
        end = round(count * (reached + share) / total)
        yield from [pairs] * (end - round(count * reached / total))
        reached += share


def pairs_of(rows: Sequence[Row], count: int) -> list[Row]:
    """Pairs in order of quality. The error type with the fewest pairs so far is tried first."""
    strata = by_stratum(rows)
    used: Counter[str] = Counter()
    pairs = []
    for row, wanted in zip(best_rows(rows, count), num_pairs(count), strict=False):
        peers = strata[row["task_type"], row["input_data"], row["output_format"]]
        seed = number_of_row(row)
        others = [peer["output"] for peer in peers if peer["output"] != row["output"]]
        pool = Random(seed).sample(others, min(POOL_SIZE, len(others)))
        types = sorted(ERROR_TYPES, key=lambda name: (used[name], number_of(name, str(seed))))
        rejected = ((name, corrupt(row, name, seed=seed, pool=pool)) for name in types)
        found = [(name, text) for name, text in rejected if text is not None][:wanted]
        used.update(name for name, _ in found)
        pairs += [row | {"rejected_output": text, "error_type": name} for name, text in found]
    return pairs


def by_file(split: str, pairs: Sequence[Row]) -> dict[str, list[Row]]:
    """Pairs by the name of the file that holds their row."""
    questions = {number_of_row(row) for row in read_rows(f"questions_{split}")}
    files: dict[str, list[Row]] = {split: [], f"questions_{split}": []}
    for pair in pairs:
        files[f"questions_{split}" if number_of_row(pair) in questions else split].append(pair)
    return files


def write_pairs(name: str, pairs: Sequence[Row]) -> None:
    content = "".join(f"{json.dumps(pair, ensure_ascii=False)}\n" for pair in pairs).encode()
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    (OUTPUT / f"{name}.jsonl.xz").write_bytes(packed)


def table(column: str, title: str, pairs: dict[str, list[Row]]) -> str:
    """Pairs of each value of a column; for error types also the ratio of lengths in words."""
    counts = {split: Counter(pair[column] for pair in found) for split, found in pairs.items()}
    lines = [
        f"| {title} | train | share | held out | words, rejected / chosen |",
        "|---|--:|--:|--:|--:|",
    ]
    for value in sorted(counts["train"] | counts["heldout"]):
        train, heldout = counts["train"][value], counts["heldout"][value]
        own = [pair for pair in pairs["train"] if pair[column] == value]
        share = f"{100 * train / counts['train'].total():.1f} %"
        lines.append(f"| {value} | {train:,} | {share} | {heldout:,} | {length_ratio(own):.2f} |")
    train, heldout = counts["train"].total(), counts["heldout"].total()
    lines.append(f"| all | {train:,} | 100 % | {heldout:,} | {length_ratio(pairs['train']):.2f} |")
    return "\n".join(lines)


def length_ratio(pairs: Sequence[Row]) -> float:
    words = {
        key: sum(len(pair[key].split()) for pair in pairs) for key in ("rejected_output", "output")
    }
    return words["rejected_output"] / max(1, words["output"])


def update_readme(tables: Sequence[str]) -> None:
    """Put the tables between their marks."""
    path = OUTPUT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    middle = "\n\n".join((MARKS[0], *tables, MARKS[1]))
    path.write_text(before + middle + rest.partition(MARKS[1])[2], encoding="utf-8")


def main() -> None:
    pairs = {split: pairs_of(read_split(split), count) for split, count in NUM_ROWS.items()}
    for split, found in pairs.items():
        for name, own in by_file(split, found).items():
            write_pairs(name, own)
    tables = [table("error_type", "error type", pairs), table("task_type", "task type", pairs)]
    update_readme(tables)
    print(*tables, sep="\n\n")
    shutil.copyfile(SOURCE / "LICENCE.txt", OUTPUT / "LICENCE.txt")


if __name__ == "__main__":
    main()

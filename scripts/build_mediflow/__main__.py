"""`python -m scripts.build_mediflow --data FOLDER`: writes `assets/corpora/mediflow`."""

import argparse
import json
import lzma
from pathlib import Path

from tokenizers import Tokenizer

import scripts.build_mediflow as package
from scripts.build_mediflow import tables
from scripts.build_mediflow.families import FAMILIES
from scripts.build_mediflow.leakage import ForbiddenTexts
from scripts.build_mediflow.material import CORPORA, Material
from scripts.build_mediflow.rows import Candidate
from scripts.build_mediflow.selection import Selection, by_file, published, select

OUTPUT = CORPORA / "mediflow"
TOKENIZER = CORPORA.parent / "models" / "phi35_mini" / "tokenizer.json"
MARKS = ("<!-- tables -->", "<!-- end of tables -->")


def packed(rows: list[Candidate]) -> bytes:
    """JSON lines, compressed; the same bytes for the same rows."""
    lines = (json.dumps(published(row), ensure_ascii=False) for row in rows)
    content = "".join(f"{line}\n" for line in lines).encode()
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)


def update_readme(path: Path, selection: Selection, tokenizer: Tokenizer) -> None:
    """Put the tables between their marks."""
    parts = (
        tables.by_task(selection, tokenizer),
        tables.by_source(selection),
        tables.by_reason(selection),
    )
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    middle = "\n\n".join((MARKS[0], *parts, MARKS[1]))
    path.write_text(before + middle + after, encoding="utf-8")
    print(*parts, sep="\n\n")


def main() -> None:
    description = (package.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="scripts.build_mediflow", description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with the published sets")
    material = Material(parser.parse_args().data)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tests = ForbiddenTexts(material.test_texts())
    candidates = (row for family in FAMILIES.values() for row in family(material))
    selection = select(candidates, tests=tests, tokenizer=tokenizer)
    for name, rows in by_file(selection).items():
        (OUTPUT / f"{name}.jsonl.xz").write_bytes(packed(rows))
    update_readme(OUTPUT / "README.md", selection, tokenizer)


if __name__ == "__main__":
    main()

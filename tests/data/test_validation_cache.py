"""Validation sets out of the cache: those that would be made now, or they are made now."""

import json
import os
import random
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mediphi.config.validation import Validation
from mediphi.data import validation_cache
from mediphi.data.validation_cache import known_sets
from mediphi.data.validation_sets import build_sets
from mediphi.errors import DataError

LICENCE = {"id": "test", "origin": "test", "commercial_ok": True}
SETTINGS: dict[str, Any] = {"min_questions": 1, "num_questions": 20}
CORPUS: dict[str, Any] = {"name": "c", "heldout_fraction": 0.5}
SOURCE: dict[str, Any] = {"kind": "jsonl", "licence": LICENCE}


def prose(rng: random.Random, num_words: int = 120) -> str:
    words = ["".join(rng.choices("bdfgklmnprst", k=6)) for _ in range(num_words)]
    return ". ".join(" ".join(words[i : i + 8]).capitalize() for i in range(0, num_words, 8))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A corpus of notes, and a file of questions."""
    rng = random.Random(0)
    notes = [{"text": prose(rng)} for _ in range(60)]
    asked = [
        {"prompt": f"Number {n}", "options": ["a", "b", "c", "d"], "answer": n % 4}
        for n in range(20)
    ]
    for name, rows in (("notes", notes), ("mine", asked)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def asking(
    place: Path, *, corpus: dict[str, Any] | None = None, source: Any = None, **settings: Any
) -> Validation:
    one = {"kind": "continuation", "sources": ["notes"], "prompt_words": 20, "option_words": 10}
    mine = {"kind": "file", "path": str(place / "mine.jsonl"), "licence": LICENCE}
    notes = SOURCE | {"path": str(place / "notes.jsonl")} | (source or {})
    told = CORPUS | {"sources": {"notes": notes}} | (corpus or {})
    content = {"sets": {"s": one, "mine": mine}, "corpus": told}
    return Validation.model_validate(content | SETTINGS | settings)


def cached(place: Path) -> list[Path]:
    folder = place / "cache" / "validation"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def known(place: Path, validation: Validation | None = None, *, seed: int = 0) -> Any:
    return known_sets(validation or asking(place), seed=seed, cache=place / "cache")


def test_what_the_cache_gives_is_what_would_be_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_sets(asking(place), seed=0)
    assert known(place) == made and len(cached(place)) == 1
    assert [one.name for one in made] == ["s", "mine"] and all(one.holdout for one in made)
    monkeypatch.delattr(validation_cache, "build_sets")  # nothing is made the second time
    assert known(place) == made


@pytest.mark.parametrize(
    "changed",
    [
        {"num_questions": 10},
        {"holdout_share": 0.3},
        {"num_options": 3},
        {"corpus": {"heldout_fraction": 0.4}},
        {"source": {"max_documents": 50}},
        {"source": {"licence": LICENCE | {"contains_phi": True}}},
    ],
    ids=str,
)
def test_other_settings_are_other_sets(place: Path, changed: dict[str, Any]) -> None:
    before, other = known(place), asking(place, **changed)
    assert known(place, other) == build_sets(other, seed=0) != before
    assert len(cached(place)) == 2 and known(place) == before


def test_another_seed_is_another_choice(place: Path) -> None:
    assert known(place, seed=1) == build_sets(asking(place), seed=1) != known(place)


@pytest.mark.parametrize("name", ["notes.jsonl", "mine.jsonl"])
def test_a_changed_file_is_seen_though_its_size_is_the_same(place: Path, name: str) -> None:
    before, file = known(place), place / name
    swapped = {"notes.jsonl": ("b", "p"), "mine.jsonl": ('"answer": 0', '"answer": 3')}[name]
    file.write_text(file.read_text().replace(*swapped))
    assert known(place) == build_sets(asking(place), seed=0) != before


def test_a_file_that_is_renamed_to_a_test_split_is_refused(place: Path) -> None:
    folder = place / "notes"
    folder.mkdir()
    (place / "notes.jsonl").rename(folder / "notes.jsonl")
    source = {"path": str(folder)}
    known(place, asking(place, source=source))
    (folder / "notes.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(DataError, match="test split is refused"):
        known(place, asking(place, source=source))


def test_a_damaged_cache_is_made_anew(place: Path) -> None:
    made, [path] = known(place), cached(place)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 1])
    for damage in (
        b"",
        b"null",
        b"[1, 2]",
        b"\xff\xfe",
        whole[:middle],
        whole[:middle] + flipped + whole[middle + 1 :],
        b"[" * 100_000,
    ):
        path.write_bytes(damage)
        assert known(place) == made
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_fault(place: Path) -> None:
    (place / "cache").write_text("a file stands in the way")
    assert known(place) == build_sets(asking(place), seed=0)


def test_what_a_killed_process_left_goes_with_the_next_sets(place: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = place / "cache" / "validation"
    folder.mkdir(parents=True)
    host = socket.gethostname()
    left, alive = (folder / f".ab.json.{host}.{pid}" for pid in (gone.pid, os.getppid()))
    for file in (left, alive):
        file.touch()
    known(place)
    assert alive in cached(place) and left not in cached(place) and len(cached(place)) == 2


def test_sets_of_files_alone_are_read_as_they_are(place: Path) -> None:
    content = asking(place).model_dump()
    own = Validation.model_validate(content | {"sets": {"mine": content["sets"]["mine"]}})
    assert known(place, own) == build_sets(own, seed=0) and not cached(place)


def test_the_rules_give_what_this_version_of_the_cache_was_made_by(place: Path) -> None:
    """Where this fails, the rules give other questions: raise SETS_VERSION with the new hash."""
    found = [one.fingerprint[:16] for one in build_sets(asking(place), seed=0)]
    assert (validation_cache.SETS_VERSION, found) == (1, ["d55c6c325aeda3c1", "6a67006d321a793e"])

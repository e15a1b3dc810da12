"""The ledger holds what was evaluated, and refuses what it cannot vouch for."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_search import SETTINGS, SPACE, toy_search

from mediphi.errors import ArtifactError
from mediphi.merge.search import Evaluation, Ledger, Record, Space, SpaceOptions

scores = st.floats(allow_nan=False, allow_infinity=False)
evaluations = st.builds(
    Evaluation,
    fitness=scores,
    by_set=st.dictionaries(st.text(), scores, max_size=2),
    items=st.dictionaries(st.text(), st.lists(st.booleans()).map(tuple), max_size=2),
    stopped=st.booleans(),
)
records = st.builds(
    Record,
    number=st.just(1),
    generation=st.integers(0, 99),
    genome=st.dictionaries(st.text(), scores, max_size=3),
    status=st.sampled_from(["ok", "failed", "stopped"]),
    evaluation=st.none() | evaluations,
    holdout=st.none() | evaluations,
    seconds=st.floats(0, 1e6),
    reason=st.text(),
)


@given(records)
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, record: Record
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "search.jsonl"
    with Ledger(path, {"seed": 1}) as ledger:
        ledger.append(record)
    with Ledger(path, {"seed": 1}) as again:
        assert again.records == [record]


def test_every_changed_byte_is_found_and_its_line_named(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    toy_search(path, settings=replace(SETTINGS, num_evaluations=3))
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    start = len(lines[0])
    for place in range(start, start + len(lines[1]) - 1, 11):
        broken = bytearray(text)
        broken[place] = ord("7") if broken[place] != ord("7") else ord("8")
        path.write_bytes(broken)
        with pytest.raises(ArtifactError) as caught:
            toy_search(path)
        assert str(caught.value).startswith(f"{path}:2: ")
        assert "\n" not in str(caught.value)


def test_a_line_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    toy_search(path, settings=replace(SETTINGS, num_evaluations=3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(ArtifactError, match=r"search\.jsonl:3: evaluation 2 belongs here, not 3"):
        toy_search(path)


def test_a_torn_tail_never_swallows_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    with Ledger(path, {}) as ledger:
        ledger.append(Record(1, 0, {"t": 0.5}, "ok", Evaluation(0.5), None, 1.0))
    with path.open("ab") as file:
        file.write(b'{"number": 2, "generation": 0, "geno')
    with Ledger(path, {}) as ledger:
        ledger.append(Record(2, 0, {"t": 0.7}, "failed", None, None, 1.0, "no"))
    with Ledger(path, {}) as ledger:
        assert [record.number for record in ledger.records] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "space", "words"),
    [
        ({"seed": 6}, SPACE, "a search with seed=5, not 6"),
        ({"sigma": 0.1}, SPACE, "a search with sigma=0.16666666666666666, not 0.1"),
        ({"population": 6}, SPACE, "a search with population=5, not 6"),
        ({"identity": "other models"}, SPACE, 'a search with identity="toy", not "other models"'),
        ({"risk": 0.1}, SPACE, "a search with risk=null, not 0.1"),
        (
            {},
            Space("task_arithmetic", ("a", "b"), SpaceOptions(digits=3, bounds={"lambda": (0, 1)})),
            "a search with coordinates.lambda=[0.5, 1.5, 1.0], not [0.0, 1.0, 1.0]",
        ),
        (
            {},
            Space("task_arithmetic", ("a", "c"), SpaceOptions(digits=3)),
            'a search with models=["a", "b"], not ["a", "c"]',
        ),
    ],
)
def test_a_ledger_of_another_search_is_refused_and_left_alone(
    settings: dict[str, object], space: Space, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "search.jsonl"
    toy_search(path, settings=replace(SETTINGS, num_evaluations=3))
    before = path.read_bytes()
    with pytest.raises(ArtifactError) as caught:
        toy_search(path, settings=replace(SETTINGS, **settings), space=space)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"loss": 1.0}) + "\n")
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl:1: this line"):
        toy_search(path)
    assert path.read_text() == json.dumps({"loss": 1.0}) + "\n"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from toy_search import toy_search
from mediphi.errors import MachineError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    toy_search(Path(sys.argv[1]))
except MachineError as error:
    print(error)
"""


def test_a_full_disk_is_told_in_one_line_and_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert told.stdout.count("\n") == 1
    assert told.stdout.startswith(f"no space for {path}: what is in it is intact")
    assert path.read_bytes().endswith(b"\n")
    there = path.read_bytes().count(b"\n") - 1
    assert 0 < there < len(toy_search(path).records)

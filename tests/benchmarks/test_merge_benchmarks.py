"""The benchmarks of merging, at a toy size: that both sides run and agree, not how fast."""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from mediphi.records import MultipleChoice

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("merge", "merge_candidates", "merge_checkpoints")
QUESTION = MultipleChoice("1", "The code of a cold is", ("J00", "A01, more"), answer=0, group="g")


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`benchmarks/merge.py` with small models."""
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name, size in {"HIDDEN": 64, "FFN": 128}.items():
        monkeypatch.setattr(import_module("merge_checkpoints"), name, size)
    yield import_module("merge")
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def test_a_whole_merge_beside_mergekit(
    merging: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "merge.jsonl"
    monkeypatch.setattr(merging, "RESULTS", results)
    small = ["--models", "2", "--layers", "1", "--pairs", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", ["merge.py", "--figures", "merge", "--methods", "linear", *small]
    )
    merging.main()
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["output"] == {
        "numbers": line["parameters"],
        "differing": 0,
        "largest_difference": 0.0,
    }
    assert 0 < line["anonymous_mib_torch"] < line["anonymous_mib_ours"]
    assert min(line[f"cpu_{side}"] for side in ("ours", "mergekit")) > 0
    assert line["cpu_ratio"] == pytest.approx(line["cpu_mergekit"] / line["cpu_ours"], rel=0.05)


def test_a_candidate_is_built_and_scored(
    merging: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = import_module("merge_candidates")
    monkeypatch.setattr(candidates, "questions", lambda count: [QUESTION][:count])
    names = ["base", "expert0", "expert1"]
    merging.write_checkpoints(tmp_path, names, layers=1)
    options = argparse.Namespace(candidates=2, questions=1, device="cpu")
    told = candidates.ours(tmp_path, names, "breadcrumbs", options)
    assert told["kept"] == {"deltas": True, "order": True}
    assert len(told["laps"]) == 2 and len(told["logps"]) == 2
    # A model of random weights knows nothing: about log(1/32064) a token.
    assert all(-14 * 6 < value < -9 for value in told["logps"])

"""The SFT benchmark holds its own claims at a toy size; time is nobody's claim here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_toy_run_proves_equal_targets_and_parity_and_takes_less_work():
    pytest.importorskip("trl")
    command = [sys.executable, "benchmarks/sft_step.py", "--toy", "--precision", "32-true"]
    done = subprocess.run(
        [*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parity holds" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    peers = ["trl default", "trl by length", "trl packed", "trl packed, head as on a GPU"]
    assert [line["peer"] for line in lines] == peers
    for line in lines:
        ours, theirs, data = line["ours"], line["theirs"], line["data"]
        assert ours["steps"] == theirs["steps"] == 1
        assert ours["tokens_per_step"] == theirs["tokens_per_step"] == data["tokens"]
        assert 0 < data["targets"] < data["tokens"]
        assert 1.0 < ours["flops_over_floor"] < theirs["flops_over_floor"]
        assert abs(ours["heldout_loss"] - theirs["heldout_loss"]) < 5e-3
    padded, by_length, packed, patched = (line["flops_ratio"] for line in lines)
    assert padded > by_length > packed > patched > 1

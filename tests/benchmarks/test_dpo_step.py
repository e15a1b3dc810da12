"""The DPO benchmark holds its own claims at a toy size; time is nobody's claim here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_toy_run_proves_equal_pairs_and_losses_and_takes_less_work():
    pytest.importorskip("trl")
    command = [sys.executable, "benchmarks/dpo_step.py", "--toy", "--precision", "32-true"]
    done = subprocess.run(
        [*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parity holds" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    peers = ["trl online", "trl precomputed", "trl precomputed, head as on a GPU"]
    assert [line["peer"] for line in lines] == peers
    for line in lines:
        ours, theirs, parity = line["ours"], line["theirs"], line["parity"]
        assert ours["steps"] == theirs["steps"] == 2
        assert len(parity["losses"]) == 2 and parity["training_losses_off"] < 1e-4
        assert abs(ours["first_losses"][0] - 0.69315) < 1e-5  # at the reference: log 2
        assert abs(ours["heldout_loss"] - theirs["heldout_loss"]) < 1e-3
        assert 1.0 < ours["flops_over_floor"] < theirs["flops_over_floor"]
        parts = line["data"]["tokens_per_part"]  # the prompt once, and no padding
        assert abs(ours["positions_per_pair"] - sum(parts.values())) < 0.2
    online, precomputed, patched = lines
    assert online["theirs"]["reference_pass"]["mflop_per_pair"] == 0
    assert precomputed["theirs"]["reference_pass"]["mflop_per_pair"] > 0
    ratios = [line["flops_ratio"] for line in (online, precomputed, patched)]
    assert ratios[0] > ratios[1] > ratios[2] > 1

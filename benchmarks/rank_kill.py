"""Kill ranks of two with -9 under torchrun; do weights and loss curve stay bitwise the same?

python benchmarks/rank_kill.py [--strategy ddp zero3 fsdp2] [--kills 12] [--seed 0]

Whole runs of a shrunk model on real codes, by the real command line under torchrun, which ends the
other rank of one that was killed and starts both anew. Every run is killed up to four times: at any
time, start-up included, after steps, in a save, in the export, while it is published; then it is
left to end. `--kills` of rank 1, and a third as many of rank 0. A strategy's lines in
`results/rank_kill.jsonl`, one per run and a summary, are written anew; other strategies' stay.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from end_to_end.killing import Outcome  # noqa: E402
from end_to_end.rank_killing import RankKills, command, killed_ranks, run_dir  # noqa: E402
from end_to_end.tiny_run import TORCHRUN, Place, write_codes, write_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "rank_kill.jsonl"
STRATEGIES = ("ddp", "zero3", "fsdp2")
KILLS_PER_RUN = 4


class Measured(NamedTuple):
    """A run and which of its ranks was killed."""

    rank: int
    outcome: Outcome


def main() -> None:
    """Write the results; exit 1 when a run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    summaries = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_codes(folder / "assets" / "codes")
        write_model(folder / "assets" / "model")
        for strategy in arguments.strategy:
            found = measure(folder, strategy, kills=arguments.kills, seed=arguments.seed)
            rows = [{"strategy": strategy, "run": i, **row(m)} for i, m in enumerate(found)]
            summaries.append(summarise(found, strategy=strategy, seed=arguments.seed))
            write(strategy, [*rows, summaries[-1]])
            print(json.dumps(summaries[-1], indent=1), flush=True)
    raise SystemExit(0 if all(summary["equal"] for summary in summaries) else 1)


def measure(folder: Path, strategy: str, *, kills: int, seed: int) -> list[Measured]:
    """Runs of which rank 1 is killed, then runs of which rank 0 is."""

    def place(name: str) -> Place:
        return Place(folder / strategy / name, folder / "cache", folder / "assets")

    undisturbed(place("first"), strategy)  # tokenises
    seconds = undisturbed(place("reference"), strategy)
    reference = run_dir(place("reference"))
    found: list[Measured] = []
    for rank, wanted in ((1, kills), (0, -(-kills // 3))):
        while (left := wanted - sum(len(m.outcome.kills) for m in found if m.rank == rank)) > 0:
            rng = random.Random(f"{seed} {strategy} {len(found)}")
            plan = RankKills(min(KILLS_PER_RUN, left), rank, rng)
            outcome = killed_ranks(
                strategy, place(str(len(found))), plan, reference=reference, seconds=seconds
            )
            found.append(Measured(rank, outcome))
            print(json.dumps(row(found[-1])), file=sys.stderr, flush=True)
    return found


def undisturbed(place: Place, strategy: str) -> float:
    """Seconds that the command takes."""
    place.starter = TORCHRUN
    begun = time.monotonic()
    ended = place.program(*command(strategy)).wait()
    assert ended.code == 0, ended
    return time.monotonic() - begun


def row(measured: Measured) -> dict[str, object]:
    rank, outcome = measured
    return {
        "rank": rank,
        "kills": [f"{kill.aim}: {kill.checkpoint or 'no checkpoint'}" for kill in outcome.kills],
        "half_written": sum(kill.half_written > 0 for kill in outcome.kills),
        "starts": outcome.attempts,
        "equal_weights": outcome.equal_weights,
        "equal_curve": outcome.equal_curve,
    }


def summarise(found: list[Measured], *, strategy: str, seed: int) -> dict[str, object]:
    kills = [kill for _, outcome in found for kill in outcome.kills]
    return {
        "path": "kill -9 of a rank under torchrun",
        "strategy": strategy,
        "processes": 2,
        "runs": len(found),
        "kills_of_rank_1": sum(len(m.outcome.kills) for m in found if m.rank == 1),
        "kills_of_rank_0": sum(len(m.outcome.kills) for m in found if m.rank == 0),
        "kills_by_moment": dict(Counter(kill.aim for kill in kills)),
        "kills_with_half_written_files": sum(kill.half_written > 0 for kill in kills),
        "starts": sum(outcome.attempts for _, outcome in found),
        "equal": all(o.equal_weights and o.equal_curve for _, o in found),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning", "transformers", "deepspeed")},
        },
        "machine": f"{platform.machine()}, {platform.system()}",
    }


def write(strategy: str, lines: list[dict[str, object]]) -> None:
    """In place of the strategy's lines of an earlier time."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    before = [json.loads(line) for line in text.splitlines()]
    kept = [line for line in before if line["strategy"] != strategy]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *lines]))


if __name__ == "__main__":
    main()

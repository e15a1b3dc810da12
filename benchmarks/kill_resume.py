"""Kill `train.py` with -9 at random moments; do weights and loss curve stay bitwise the same?

python benchmarks/kill_resume.py [--stage pit] [--kills 20] [--seed 0]

Whole runs of a shrunk model on real codes (SFT and DPO: on short notes), by the real command line,
each killed up to four times and then left to end: while reading, tokenising, training, saving,
exporting, between phases, in the exam, in the reference pass of DPO. The stage's lines in
`results/kill_resume.jsonl`, one per run and a summary, are written anew; other stages' stay.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from end_to_end.killing import Outcome, killed_run  # noqa: E402
from end_to_end.tiny_chat import dpo, sft, write_chats  # noqa: E402
from end_to_end.tiny_run import PIT, Place, write_codes, write_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kill_resume.jsonl"
KILLS_PER_RUN = 4


def main() -> None:
    """Write the results; exit 1 when a run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("pit", "sft", "dpo"), default="pit")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = measure(
            Path(folder), stage=arguments.stage, kills=arguments.kills, seed=arguments.seed
        )
    summary = summarise(outcomes, stage=arguments.stage, seed=arguments.seed)
    rows = [{"stage": arguments.stage, "run": i, **row(o)} for i, o in enumerate(outcomes)]
    before = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = [*(line for line in before if line["stage"] != arguments.stage), *rows, summary]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(json.dumps(summary, indent=1))
    raise SystemExit(0 if summary["equal"] else 1)


def measure(folder: Path, *, stage: str, kills: int, seed: int) -> list[Outcome]:
    """Runs killed again and again until `kills` attempts died."""
    write_codes(folder / "assets" / "codes")
    write_model(folder / "assets" / "model")
    write_chats(folder / "assets")
    undisturbed = Place(folder / "undisturbed", folder / "cache", folder / "assets")
    command = prepare(undisturbed, stage)
    begun = time.monotonic()
    ended = undisturbed.program(*command).wait()
    assert ended.code == 0, ended
    seconds = time.monotonic() - begun
    reference = undisturbed.run_dir(stage)
    outcomes: list[Outcome] = []
    while sum(len(outcome.kills) for outcome in outcomes) < kills:
        number = len(outcomes)
        # A cache of its own, so that kills hit the tokenising, too.
        place = Place(folder / str(number), folder / str(number) / "cache", folder / "assets")
        outcome = killed_run(
            lambda place=place: place.program(*command),
            place,
            reference=reference,
            kills=KILLS_PER_RUN,
            rng=random.Random(seed + number),
            seconds=seconds,
        )
        outcomes.append(outcome)
        print(json.dumps(row(outcome)), file=sys.stderr, flush=True)
    return outcomes


def prepare(place: Place, stage: str) -> list[str]:
    """The command of a stage; DPO needs the model of SFT first."""
    if stage == "pit":
        return PIT
    if stage == "sft":
        return sft(place.assets)
    ended = place.program(*sft(place.assets)).wait()
    assert ended.code == 0, ended
    return dpo(place.assets, place.run_dir("sft"))


def row(outcome: Outcome) -> dict[str, object]:
    return {
        "kills": [f"{kill.aim}: {kill.checkpoint or 'no checkpoint'}" for kill in outcome.kills],
        "half_written": sum(kill.half_written > 0 for kill in outcome.kills),
        "attempts": outcome.attempts,
        "equal_weights": outcome.equal_weights,
        "equal_curve": outcome.equal_curve,
    }


def summarise(outcomes: list[Outcome], *, stage: str, seed: int) -> dict[str, object]:
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    return {
        "path": "kill -9 and resume of train.py",
        "stage": stage,
        "runs": len(outcomes),
        "kills": len(kills),
        "kills_by_moment": dict(Counter(kill.aim for kill in kills)),
        "kills_with_half_written_files": sum(kill.half_written > 0 for kill in kills),
        "attempts": sum(outcome.attempts for outcome in outcomes),
        "equal": all(o.equal_weights and o.equal_curve for o in outcomes),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning", "transformers")},
        },
        "machine": f"{platform.machine()}, {platform.system()}",
    }


if __name__ == "__main__":
    main()

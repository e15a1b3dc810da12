"""A program: kill -9 a merge by mergekit at every step on disk, look at what is there, begin anew.

    python killed_mergekit_merges.py FIRST SECOND PLACE

As `killed_merges.py` does with our own. Prints one JSON object.
"""

import json
import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import yaml
from killed_merges import content, forked, kill_at
from safetensors import torch as safetensors_torch

from mediphi.merge.by_mergekit import PARTIAL, merge_by_mergekit
from mediphi.merge.engine import MergeFacts

SHARD = 300_000


def merged(first: Path, second: Path, place: Path) -> MergeFacts:
    body = {
        "merge_method": "linear",
        "models": [{"model": str(one)} for one in (first, second)],
        "parameters": {"weight": 0.5},
        "dtype": "float32",
    }
    return merge_by_mergekit(
        yaml.safe_dump(body),
        scratch=place / "scratch",
        target=place / "model",
        seed=0,
        max_shard_bytes=SHARD,
    )


def kill_within_shard(number: int) -> None:
    """SIGKILL when half of a shard is written: Rust writes it, and Python sees nothing of it."""
    seen, whole = 0, safetensors_torch.save_file

    def half(tensors: object, filename: str, **options: object) -> None:
        nonlocal seen
        whole(tensors, filename, **options)  # type: ignore[arg-type]
        if seen == number:
            os.truncate(filename, Path(filename).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    safetensors_torch.save_file = half


def state(place: Path, whole: dict[str, bytes]) -> str:
    """What is published, and that nothing lies where nobody looks for it."""
    assert {path.name for path in place.iterdir()} <= {"scratch", "model"}
    assert not [path for path in (place / "scratch").glob("*") if path.name != PARTIAL]
    if not (place / "model").exists():
        return "no model"
    assert content(place / "model") == whole, f"{place}: half a model"
    return "whole"


def main(first: Path, second: Path, place: Path) -> None:
    undisturbed, own = place / "undisturbed", place / "own"
    merged(first, second, undisturbed)
    whole, states = content(undisturbed / "model"), Counter[str]()
    num_shards = sum(name.endswith(".safetensors") for name in whole)
    own.mkdir()
    # Every start finds what the last kill has left, and those `over` a model that was published.
    for kind, count in (("step", 10_000), ("within", num_shards), ("over", 8)):
        for number in range(count):

            def disturbed(kind: str = kind, number: int = number) -> MergeFacts:
                kill_within_shard(number) if kind == "within" else kill_at(number, own)
                return merged(first, second, own)

            if kind == "over":
                merged(first, second, own)
            killed = forked(disturbed)
            states[f"{kind}: {state(own, whole)}" if killed else "not killed"] += 1
            if not killed:
                break
    merged(first, second, own)
    assert state(own, whole) == "whole" and not list((own / "scratch").iterdir())
    print(json.dumps({"states": states, "num_shards": num_shards}))


if __name__ == "__main__":
    os.fsync = lambda handle: None
    warnings.simplefilter("ignore")
    main(*map(Path, sys.argv[1:4]))

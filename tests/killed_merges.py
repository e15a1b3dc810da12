"""A program: kill -9 a merge at every step on disk, look at what is there, and go on.

    python killed_merges.py BASE EXPERT PLACE

Every step that Python takes on disk is an audit event: the journal's line of every tensor, every
file, folder and renaming. A child kills itself before the first, a second before the second, and so
on until one comes to the end. Prints one JSON object.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from mediphi.merge import engine
from mediphi.merge.engine import Job, MergeFacts, merge
from mediphi.merge.storage import Target

STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
SHARD = 300_000


def merged(base: Path, expert: Path, place: Path) -> MergeFacts:
    job = Job("slerp", {"expert": expert}, base=base, max_shard_bytes=SHARD)
    return merge(
        job,
        values=lambda name: {"t": 0.3},
        scratch=place / "scratch",
        target=place / "model",
        progress=lambda done, total: None,
    )


def kill_at(step: int, place: Path) -> None:
    """SIGKILL before the given step of this process on a file in `place`."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in STEPS and any(str(place) in str(argument) for argument in arguments):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(count)


def kill_within(tensor: int) -> None:
    """SIGKILL when half of the given tensor is written, and that wrongly."""
    seen, whole = 0, engine.merge_tensor

    def half(*arguments: object, out: Target, **options: object) -> None:
        nonlocal seen
        if seen == tensor:
            count = out.shape.numel() // 2 + 1
            out.write(slice(0, count), torch.full((count,), 7.0))
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        whole(*arguments, out=out, **options)  # type: ignore[arg-type]

    engine.merge_tensor = half


def forked(body: object, report: Path | None = None) -> bool:
    """Run in a child; returns whether it was killed."""
    if (child := os.fork()) == 0:
        facts = body()  # type: ignore[operator]
        if report:
            report.write_text(json.dumps(facts.num_resumed))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def journal(place: Path) -> list[bytes]:
    """Lines of tensors."""
    path = place / "scratch" / "journal.jsonl"
    return path.read_bytes().split(b"\n")[1:-1] if path.exists() else []


def state(place: Path, whole: dict[str, bytes]) -> str:
    """What a killed merge left: no model at all, or the whole one, and where."""
    loadable = [path.parent for path in place.rglob("config.json")]
    if not loadable:
        assert not (place / "model").exists()
        return "no model"
    (folder,) = loadable
    assert content(folder) == whole, f"{folder} looks like a model and is none"
    return folder.relative_to(place).as_posix()


def main(base: Path, expert: Path, place: Path) -> None:
    undisturbed = place / "undisturbed"
    merged(base, expert, undisturbed)
    whole, states, num_tensors = (
        content(undisturbed / "model"),
        Counter(),
        len(journal(undisturbed)),
    )
    attempts = [("step", n) for n in range(10_000)], [("within", n) for n in range(num_tensors)]
    for kinds in attempts:
        for kind, number in kinds:
            own, report = place / "own", place / "resumed"

            def disturbed(kind: str = kind, number: int = number, own: Path = own) -> MergeFacts:
                kill_at(number, own) if kind == "step" else kill_within(number)
                return merged(base, expert, own)

            own.mkdir()
            killed = forked(disturbed)
            states[f"{kind}: {state(own, whole)}" if killed else "not killed"] += 1
            before = len(journal(own))
            assert not forked(lambda own=own: merged(base, expert, own), report)
            assert content(own / "model") == whole, f"{kind} {number}: another result"
            assert json.loads(report.read_text()) == before, f"{kind} {number}: begun anew"
            assert not list((own / "scratch").glob("*.partial"))
            shutil.rmtree(own)
            if not killed:
                break
    print(json.dumps({"states": states, "num_tensors": num_tensors}))


if __name__ == "__main__":
    # A kill loses nothing that the kernel has; syncs are for power cuts and take most of the time.
    os.fsync = lambda handle: None
    main(*map(Path, sys.argv[1:4]))

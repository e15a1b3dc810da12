"""A base and two experts, artifacts and plain folders, and what merges of them are compared by."""

import json
import random
import shutil
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from end_to_end.tiny_run import Ended, Place
from safetensors.torch import load_file
from small_checkpoints import change_tensors, write_model

from mediphi.artifacts import Parent, manifest_hash, publish

LICENCES = {
    "a": {"id": "CC0", "origin": "somebody", "commercial_ok": True},
    "b": {"id": "CC-BY-SA-4.0", "origin": "others", "commercial_ok": True, "share_alike": True},
}
QUIET = ["logger=csv", "hardware.num_threads=1"]
STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "shutil.rmtree")


class Models(NamedTuple):
    """Run directories of artifacts: experts `a` and `b` name `base` as their parent."""

    base: Path
    a: Path
    b: Path

    def of(self, *names: str) -> list[str]:
        """The experts of those names in a command."""
        return [f"merge.models.{name}.path={getattr(self, name)}" for name in names or ("a", "b")]

    def slerp(self, *more: str) -> list[str]:
        return ["stage=merge", "merge=slerp", *self.of("a"), *QUIET, *more]

    def crumbs(self, *more: str) -> list[str]:
        return ["stage=merge", "merge=breadcrumbs", *self.of(), *QUIET, *more]

    def search(self, questions: Path, *more: str) -> list[str]:
        """A short search with breadcrumbs; about as many questions in either part."""
        return ["stage=search", "merge=breadcrumbs", *self.of(), *asking(questions), *more]


class Finished(NamedTuple):
    """A run that nothing disturbed."""

    command: list[str]
    run_dir: Path
    ended: Ended


def asking(questions: Path) -> list[str]:
    """What every small search says of its questions and its end."""
    sets = ["validation=files", f"validation.sets.mine.path={questions}"]
    return [*sets, "stage.evaluations=14", "stage.population=4", *QUIET]


def write_models(place: Path) -> Models:
    base = published(write_model(place / "base" / "model", initializer_range=0.2).parent)
    parent = {"model": Parent(str(base), manifest_hash(base))}
    experts = []
    for seed, name in enumerate(("a", "b"), start=1):
        folder = Path(shutil.copytree(base / "model", place / name / "model"))
        change_tensors(folder, partial(_moved, seed=seed))
        experts.append(published(folder.parent, parents=parent, licence=name))
    return Models(base, *experts)


def published(
    run_dir: Path, *, parents: dict[str, Parent] | None = None, licence: str | None = None
) -> Path:
    """The folder as an artifact of a training stage."""
    licences = {} if licence is None else {f"corpus {licence}": LICENCES[licence]}
    data = {"fingerprint": "f", "counts": {}, "licences": licences}
    publish(run_dir, config_hash="c" * 64, parents=parents or {}, data=data, extra={})
    return run_dir


def plain(models: Models, place: Path) -> Models:
    """Copies of the model folders alone: nobody vouches for them."""
    return Models(*(Path(shutil.copytree(own / "model", place / own.name)) for own in models))


def _moved(tensors: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


def write_questions(path: Path, *, number: int = 60, num_words: int = 6) -> Path:
    """Multiple choice with words that mean nothing to anybody; so many words a question."""
    rng = random.Random(0)
    words = ["fever", "cough", "aspirin", "liver", "kidney", "chest", "pain", "insulin", "dose"]

    pairs = [f"{one} {two}" for one in words for two in words]

    def text(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count))

    rows = [
        {"id": f"q{n}", "prompt": text(num_words), "options": rng.sample(pairs, 4), "answer": n % 4}
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def looks_like_a_model(folder: Path) -> list[Path]:
    """Whatever somebody could take for a model or a part of one."""
    patterns: Iterable[str] = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
    return [path for pattern in patterns for path in folder.rglob(pattern)]


def run_of(place: Place, command: list[str]) -> Finished:
    """A run that must end well."""
    ended = place.run(*command)
    assert ended.code == 0, ended
    stage = command[0].partition("=")[2]
    return Finished(command, place.run_dir(stage), ended)


def die_at(step: int, where: str) -> None:
    """SIGKILL before the given step of this process on a file below a path that holds `where`."""
    import os
    import signal

    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in STEPS and any(where in str(argument) for argument in arguments):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(count)


def slowly() -> None:
    """A tenth of a second for every tensor: time for a signal."""
    import time

    from mediphi.merge import engine

    whole = engine.merge_tensor

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.1)
        whole(*arguments, **options)

    engine.merge_tensor = slow

"""A run that was killed or stopped ends like one that was not: bitwise."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from end_to_end.killing import killed_run
from end_to_end.tiny_chat import ChatRun
from end_to_end.tiny_run import PIT, Ended, Place, checkpoints, curve, wait_for, weights

from mediphi.artifacts import verify

Finished = tuple[Path, Ended]


SECONDS = 4.0
"""About what a forked run takes; moments are drawn from it."""
CHAT_SECONDS = 2.0


@pytest.fixture(params=["sft", "dpo"])
def chat(request: pytest.FixtureRequest) -> ChatRun:
    """The finished run of either stage."""
    return request.getfixturevalue(f"{request.param}_run")


def kill(place: Place, finished: Finished, *, kills: int, seed: int) -> int:
    return killed(place, PIT, finished[0], kills=kills, seed=seed, seconds=SECONDS)


def killed(
    place: Place, command: list[str], reference: Path, *, kills: int, seed: int, seconds: float
) -> int:
    """How many attempts died of a run that ends like the undisturbed one."""
    outcome = killed_run(
        lambda: place.start(*command),
        place,
        reference=reference,
        kills=kills,
        rng=random.Random(seed),
        seconds=seconds,
    )
    assert outcome.equal_weights, outcome
    assert outcome.equal_curve, outcome
    return len(outcome.kills)


def test_two_kills_change_neither_weights_nor_curve(place: Place, finished: Finished) -> None:
    assert kill(place, finished, kills=2, seed=1) > 0


def test_two_kills_change_neither_a_chat_run_s_weights_nor_its_curve(
    chat: ChatRun, alone: Place
) -> None:
    """With a cache of its own, so that kills hit the tokenising and the reference pass, too."""
    options: dict[str, Any] = {"kills": 2, "seed": 2, "seconds": CHAT_SECONDS}
    assert killed(alone, chat.command, chat.run_dir, **options) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_neither_a_chat_run_s_weights_nor_its_curve(
    chat: ChatRun, shared: Place, tmp_path: Path
) -> None:
    total, life = 0, 0
    while total < 20:
        place = Place(tmp_path / str(life), tmp_path / str(life) / "cache", shared.assets)
        options: dict[str, Any] = {"kills": 4, "seed": 100 + life, "seconds": CHAT_SECONDS}
        total += killed(place, chat.command, chat.run_dir, **options)
        life += 1
    assert total >= 20 and life >= 5


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_the_reference_pass() -> None:
    """Half of the pairs of one side are scored."""
    from mediphi.modules.dpo import DpoModule

    score, seen = DpoModule.predict_step, [0]

    def step(self: DpoModule, *arguments: Any) -> Any:
        seen[0] += 1
        return _die() if seen[0] == 3 else score(self, *arguments)

    DpoModule.predict_step = step


def _die_before_the_references_are_kept() -> None:
    import mediphi.references

    mediphi.references._write = _die


def _die_in_the_export() -> None:
    """The model folder is written and not vouched for."""
    import mediphi.phases

    mediphi.phases.reload_and_compare = _die


def _die_before_the_rename() -> None:
    import mediphi.phases

    mediphi.phases.rename_folder = _die


@pytest.mark.parametrize(
    ("stage", "die"),
    [
        ("sft", _die_in_the_export),
        ("dpo", _die_before_the_rename),
        ("dpo", _die_in_the_reference_pass),
        pytest.param("dpo", _die_before_the_references_are_kept, marks=pytest.mark.slow),
    ],
)
def test_a_kill_in_the_reference_pass_or_the_export_changes_nothing(
    stage: str, die: Callable[[], None], alone: Place, request: pytest.FixtureRequest
) -> None:
    chat: ChatRun = request.getfixturevalue(f"{stage}_run")
    assert alone.run(*chat.command, limit=die).code == -signal.SIGKILL
    run_dir = alone.run_dir(stage)
    assert not (run_dir / "model").exists()
    is_early = die in (_die_in_the_reference_pass, _die_before_the_references_are_kept)
    assert bool(checkpoints(run_dir)) != is_early
    assert bool(list(run_dir.rglob(".model.partial"))) != is_early
    kept = list(alone.cache.glob("references/*.bin"))
    assert len(kept) == (stage == "dpo" and not is_early)
    ended = alone.run(*chat.command)
    assert ended.code == 0, ended
    assert ended.out.count("pairs in ") == is_early
    verify(run_dir)
    assert weights(run_dir) == weights(chat.run_dir)
    assert curve(run_dir) == curve(chat.run_dir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_neither_weights_nor_curve(
    shared: Place, finished: Finished, tmp_path: Path
) -> None:
    total, life = 0, 0
    while total < 20:
        place = Place(tmp_path / str(life), shared.cache, shared.assets)
        total += kill(place, finished, kills=4, seed=100 + life)  # compares each run's end
        life += 1
    assert total >= 20 and life >= 5


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_says_so_and_the_run_goes_on_bitwise(
    number: int, code: int, place: Place, finished: Finished
) -> None:
    run_dir = stopped_and_resumed(place, PIT, finished[0], number=number, code=code)
    assert weights(run_dir) == weights(finished[0])


def test_sigterm_saves_says_so_and_a_chat_run_goes_on_bitwise(chat: ChatRun, near: Place) -> None:
    stopped_and_resumed(near, chat.command, chat.run_dir, number=signal.SIGTERM, code=143)
    samples = "samples.jsonl"
    if (chat.run_dir / samples).exists():
        run_dir = near.run_dir("sft")
        assert (run_dir / samples).read_bytes() == (chat.run_dir / samples).read_bytes()


def stopped_and_resumed(
    place: Place, command: list[str], reference: Path, *, number: int, code: int
) -> Path:
    """A signal behind the first checkpoint; then the same command again."""
    run_dir = place.runs / reference.parent.name / reference.name
    child = place.start(*command)
    assert wait_for(lambda: checkpoints(run_dir), child)
    child.send(number)
    ended = child.wait()
    assert ended.code == code, ended
    bars = ("phase", "sft", "dpo")
    (said,) = [line for line in ended.err.splitlines() if not line.startswith(bars)]
    assert signal.Signals(number).name in said and "same command" in said
    newest = checkpoints(run_dir)[-1]
    assert newest.name in said
    assert not (run_dir / "manifest.json").exists()
    assert place.run(*command).code == 0
    assert weights(run_dir) == weights(reference)
    assert curve(run_dir) == curve(reference)
    return run_dir

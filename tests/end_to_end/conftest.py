"""One token cache, one small model and one finished run a stage for all end-to-end tests."""

from pathlib import Path

import pytest
from end_to_end.tiny_chat import ChatRun, dpo, sft, write_chats
from end_to_end.tiny_run import PIT, Ended, Place, write_codes, write_model


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """What tests may read but not change."""
    folder = tmp_path_factory.mktemp("shared")
    write_codes(folder / "assets" / "codes")
    write_model(folder / "assets" / "model")
    write_chats(folder / "assets")
    return Place(folder, folder / "cache", folder / "assets")


@pytest.fixture(scope="session")
def finished(shared: Place) -> tuple[Path, Ended]:
    """The run directory and last words of an undisturbed run by the real command."""
    ended = shared.program(*PIT).wait()
    assert ended.code == 0, ended
    return shared.run_dir(), ended


@pytest.fixture(scope="session")
def sft_run(shared: Place) -> ChatRun:
    """An undisturbed run of SFT."""
    return _finished(shared, sft(shared.assets), "sft")


@pytest.fixture(scope="session")
def dpo_run(shared: Place, sft_run: ChatRun) -> ChatRun:
    """An undisturbed run of DPO from the model of `sft_run`."""
    return _finished(shared, dpo(shared.assets, sft_run.run_dir), "dpo")


def _finished(place: Place, command: list[str], stage: str) -> ChatRun:
    ended = place.run(*command)
    assert ended.code == 0, ended
    return ChatRun(command, place.run_dir(stage), ended)


@pytest.fixture
def near(tmp_path: Path, shared: Place) -> Place:
    """An empty place with the shared cache, filled by whatever ran before."""
    return Place(tmp_path, shared.cache, shared.assets)


@pytest.fixture
def place(tmp_path: Path, shared: Place, finished: tuple[Path, Ended]) -> Place:
    """An empty place with the shared cache, filled by the finished run."""
    return Place(tmp_path, shared.cache, shared.assets)


@pytest.fixture
def alone(tmp_path: Path, shared: Place) -> Place:
    """An empty place with a cache of its own."""
    return Place(tmp_path, tmp_path / "cache", shared.assets)

"""Buffers for pieces: lent again to the thread's next tensor, never to two at once."""

import threading

import pytest
import torch

from mediphi.merge import pieces
from mediphi.merge.pieces import Scratch, spans

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def piece(monkeypatch: pytest.MonkeyPatch) -> int:
    """A length of pieces that no other test takes."""
    monkeypatch.setattr(pieces, "PIECE", 5003)
    return 5003


def addresses(scratch: Scratch, length: int) -> set[int]:
    return {buffer.data_ptr() for buffer in scratch.take(slice(0, length))}


def test_buffers_come_back_to_the_next_tensor(piece: int) -> None:
    first = Scratch(3, piece, CPU)
    lent = addresses(first, piece)
    del first
    assert addresses(Scratch(2, piece, CPU), piece) < lent


def test_two_at_once_share_nothing(piece: int) -> None:
    first = Scratch(3, piece, CPU)
    second = Scratch(3, piece, CPU)
    assert len(addresses(first, piece) | addresses(second, piece)) == 6


def test_threads_share_nothing(piece: int) -> None:
    own = Scratch(1, piece, CPU)
    lent = addresses(own, piece)
    del own  # waits in this thread
    theirs: list[Scratch] = []
    thread = threading.Thread(target=lambda: theirs.append(Scratch(1, piece, CPU)))
    thread.start()
    thread.join()
    assert addresses(theirs[0], piece).isdisjoint(lent)


def test_buffers_of_another_length_do_not_wait(piece: int) -> None:
    scratch = Scratch(2, 17, CPU)
    assert [len(buffer) for buffer in scratch.take(slice(0, 17))] == [17, 17]
    assert [len(buffer) for buffer in scratch.take(slice(17, 20))] == [3, 3]
    del scratch
    assert 17 not in pieces._spare.buffers
    assert [s.stop - s.start for s in spans(23, 10, 3)] == [9, 9, 5]

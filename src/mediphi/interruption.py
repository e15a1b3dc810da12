"""SIGTERM and SIGINT outside the training loop: one line, then exit code 143 or 130."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mediphi.errors import Interrupted
from mediphi.launch import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN_AFTER = 0.05
"""Seconds."""


@contextmanager
def interruptible() -> Iterator[None]:
    """The first signal raises `Interrupted` wherever the program is, the second ends it at once.

    In a Slurm job a second SIGTERM is not heard: see `hear_once`.

    Whatever is on disk is whole, so nothing needs saving. Inside a training loop `StopOnSignal`
    takes over, and gives back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, received, told = os.getpid(), 0, False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal received, told
        hear_once(number)
        if received or os.getpid() != owner:  # a forked child has nothing to say
            os._exit(128 + number)
        if rank() == 0 and not told:
            name = signal.Signals(number).name
            # print is not reentrant
            os.write(2, f"stopped by {name}: the same command goes on from here\n".encode())
        received, told = number, True
        raise Interrupted(128 + number)

    def raise_again(ignored: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised while it finalises an object: the signal comes anew."""
        nonlocal received
        if isinstance(ignored.exc_value, Interrupted):
            number, received = received, 0
            signal.signal(number, leave)  # `hear_once` may have silenced it
            threading.Timer(AGAIN_AFTER, os.kill, (owner, number)).start()
        else:
            hook(ignored)

    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        give_back(before)
        sys.unraisablehook = hook


def hear_once(number: int) -> None:
    """From here on be deaf to SIGTERM, if `number` is that and this is a Slurm job.

    There one order to stop comes several times: from Slurm, and once more from torchrun.
    """
    if number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
        signal.signal(number, signal.SIG_IGN)


def give_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Set earlier handlers again, but stay deaf to what `hear_once` has silenced."""
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

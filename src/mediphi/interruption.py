"""SIGTERM and SIGINT outside the training loop: one line, then exit code 143 or 130."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mediphi.errors import Interrupted
from mediphi.launch import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN_AFTER = 0.05
"""Seconds."""


@contextmanager
def interruptible() -> Iterator[None]:
    """The first signal raises `Interrupted` wherever the program is, the second ends it at once.

    Whatever is on disk is whole, so nothing needs saving. Inside a training loop `StopOnSignal`
    takes over, and gives back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, received, told = os.getpid(), 0, False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal received, told
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
            threading.Timer(AGAIN_AFTER, os.kill, (owner, number)).start()
        else:
            hook(ignored)

    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        sys.unraisablehook = hook

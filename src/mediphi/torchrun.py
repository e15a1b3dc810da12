"""torchrun with this program's exit codes: `python -m mediphi.torchrun`, and torchrun's arguments.

torchrun ends every failure, and every signal, with a traceback of its own and exit code 1. Here the
first failure's code comes through, and being told to stop is 143, unless a rank failed in stopping.
"""

import signal
import sys
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.multiprocessing import SubprocessContext
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

from mediphi.interruption import hear_once
from mediphi.launch import shell_code

STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a rank that did as it was told."""
NO_FAILURE = {0, -signal.SIGKILL}
"""Exit codes of other ranks without an error; who is killed had no time left to save."""


class Ranks(SubprocessContext):
    """torchrun's ranks. It would forget their exit codes once it was told to stop.

    Attributes:
        codes: exit codes of this machine's ranks.
    """

    codes: tuple[int | None, ...] = ()

    def start(self) -> None:
        super().start()
        signal.signal(signal.SIGTERM, _stop)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        super().close(death_sig, timeout)
        Ranks.codes = tuple(rank.proc.poll() for rank in self.subprocess_handlers.values())


def run() -> None:
    """Run torchrun on `sys.argv`.

    Raises:
        SystemExit: a process of this machine failed, or a signal came.
    """
    setattr(multiprocessing, "SubprocessContext", Ranks)  # noqa: B010
    try:
        main()
    except SignalException as told:
        raise SystemExit(_code_after(told)) from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise SystemExit(shell_code(failure.exitcode)) from None
    except RendezvousError:
        print("error: another machine of this run ended", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _code_after(told: SignalException) -> int:
    """What the ranks made of a signal: all save together, or none does.

    Outside the training loop rank 0 may end while others wait for it, and lose it.
    """
    codes = [code for code in Ranks.codes if code is not None]
    failed = [code for code in codes if code not in NO_FAILURE]
    if not failed or STOPPED.intersection(failed):
        return 128 + told.sigval
    return shell_code(failed[0])


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """What torchrun does on a signal, once: a second one would kill ranks that save."""
    hear_once(number)
    raise SignalException("told to stop", signal.Signals(number))


if __name__ == "__main__":
    run()

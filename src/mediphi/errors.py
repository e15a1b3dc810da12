"""The one exception that users see: one clear line, no traceback.

`train.py` prints it and exits with `exit_code`: 2 when the user can mend the cause (config, data,
model folder), 1 when the machine failed (disk full, device lost).
"""

from collections.abc import Sequence

MAX_LINES = 20
"""Longest list of problems that a report shows: one screen."""


class UserError(Exception):
    """A problem told in one line: what, where, what is allowed, what to do.

    Never put document text into the message: it may be clinical.
    """

    exit_code = 2


class ConfigError(UserError):
    """All problems of a config in one report: a heading, then one line a problem."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        shown = list(lines[:MAX_LINES])
        if len(lines) > MAX_LINES:
            shown.append(f"... and {len(lines) - MAX_LINES} more")
        super().__init__("\n  ".join([f"{count} in the config", *shown]))


class DataError(UserError):
    """A bad row or file; the message starts with `file:line:`."""


class ArtifactError(UserError):
    """A run directory, checkpoint or model folder that is damaged, foreign or in use."""


class MergeError(UserError):
    """Tensors or values that a merge method is not defined for."""


class MachineError(UserError):
    """The machine failed, not the user: full disk, lost device."""

    exit_code = 1


class NonFiniteError(UserError):
    """The loss or a gradient became NaN or infinite; the parameters were left as they were."""

    exit_code = 1


class Interrupted(SystemExit):
    """A signal stopped the run after its state was saved; `code` is 128 + the signal's number."""

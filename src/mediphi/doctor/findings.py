"""What a check found, and the page on which it stands."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mediphi.tracking.redaction import redact

Status = Literal["ok", "warning", "FAIL"]
SIGNS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "32"),
    "warning": ("!", "33"),
    "FAIL": ("✗", "31"),
}
"""On a terminal: a sign before the word, and its ANSI colour."""
STATUS_WIDTH, NAME_WIDTH, MAX_WIDTH = 9, 18, 110


class Finding(NamedTuple):
    """One line of the page. Everything but `ok` has a remedy; no text of a document is in any."""

    check: str
    status: Status
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, *, remedy: str) -> Finding:
    return Finding(check, "warning", found, remedy)


def failure(check: str, found: str, *, remedy: str) -> Finding:
    return Finding(check, "FAIL", found, remedy)


def clean(finding: Finding) -> Finding:
    """On one line, without secrets."""
    found, remedy = (str(redact(" ".join(t.split()))) for t in (finding.found, finding.remedy))
    return finding._replace(found=found, remedy=remedy)


class Page:
    """Prints findings as they come: plain text, with signs and colours where a person looks."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._colours = self._is_terminal and "NO_COLOR" not in os.environ
        columns = shutil.get_terminal_size((MAX_WIDTH, 24)).columns if self._is_terminal else 0
        self._width = min(columns or MAX_WIDTH, MAX_WIDTH)

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def finding(self, finding: Finding) -> None:
        word = finding.status
        if self._is_terminal:
            sign, colour = SIGNS[finding.status]
            word = f"{sign} {word}"
        text = self._wrapped(f"{word:<{STATUS_WIDTH}}{finding.check:<{NAME_WIDTH}}", finding.found)
        if self._colours:
            text = text.replace(word, f"\033[{colour}m{word}\033[0m", 1)
        print(text, flush=True)
        if finding.remedy:
            print(self._wrapped(" " * (STATUS_WIDTH + NAME_WIDTH) + "-> ", finding.remedy))

    def summary(self, findings: Sequence[Finding]) -> None:
        """How many of each, and which checks failed."""
        counts = {status: [f.check for f in findings if f.status == status] for status in SIGNS}
        warned, failed = len(counts["warning"]), dict.fromkeys(counts["FAIL"])
        text = f"{len(counts['ok'])} ok, {warned} warning{'s' * (warned != 1)}, "
        text += f"{len(counts['FAIL'])} failed"
        print(f"doctor: {text}{': ' * bool(failed)}{', '.join(failed)}", flush=True)

    def _wrapped(self, lead: str, text: str) -> str:
        indent = "  "
        return textwrap.fill(
            text,
            self._width,
            initial_indent=indent + lead,
            subsequent_indent=indent + " " * len(lead),
            break_long_words=False,
            break_on_hyphens=False,
        )

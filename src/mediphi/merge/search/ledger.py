"""The ledger of a search: one JSON line an evaluation, synced before the search goes on.

The first line says which search it is. Every line ends in a checksum of its own text, so that a
flipped digit is no score. A process killed while it wrote leaves a line without an end, which is
cut off: that candidate is evaluated again.
"""

import errno
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from mediphi.errors import ArtifactError, MachineError
from mediphi.merge.search.evaluation import Evaluation, Items

FORMAT = 1
Status = Literal["ok", "failed", "stopped"]


class Record(NamedTuple):
    """One evaluation.

    Attributes:
        number: from 1, in the order of evaluation.
        generation: from 0.
        genome: rounded, as it was evaluated.
        status: ok; failed: could not be scored; stopped: given up as hopeless.
        evaluation: on the search split; None: it failed.
        holdout: on the hold-out split, of candidates that were the best when they were evaluated.
        seconds: wall time of both.
        reason: why it failed.
    """

    number: int
    generation: int
    genome: Mapping[str, float]
    status: Status
    evaluation: Evaluation | None
    holdout: Evaluation | None
    seconds: float
    reason: str = ""

    @property
    def fitness(self) -> float | None:
        """Score on the search split; an estimate where it was stopped; None: it failed."""
        return None if self.evaluation is None else self.evaluation.fitness


class Ledger:
    """An append-only file of records.

    Args:
        path: made where it is missing; its folder must exist.
        settings: what makes this search differ from others, as JSON takes it.

    Raises:
        ArtifactError: it is of a search with other settings, or a line is damaged; in one line.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self.records = self._open(json.loads(json.dumps(settings)))
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: Record) -> None:
        """Write a record and sync it.

        Raises:
            MachineError: the disk is full; the records before are intact.
        """
        self._write(_to_json(record))
        self.records.append(record)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, settings: dict[str, Any]) -> list[Record]:
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        lines = text[:whole].splitlines()
        if not lines:
            self._write({"format": FORMAT, "settings": settings})
            return []
        self._refuse_other(self._read(lines[0], 1), settings)
        return [
            self._record(self._read(line, number), number - 1)
            for number, line in enumerate(lines[1:], start=2)
        ]

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            content = json.loads(line)
            crc = content.pop("crc32")
        except (ValueError, KeyError, AttributeError, TypeError):
            crc, content = None, {}
        if crc != _crc(content):
            raise ArtifactError(
                f"{self.path}:{number}: this line of the search's ledger is damaged; delete it and "
                f"all lines below it to go on from the evaluation before"
            )
        return content

    def _record(self, content: dict[str, Any], number: int) -> Record:
        if content.get("number") != number:
            raise ArtifactError(
                f"{self.path}:{number + 1}: evaluation {number} belongs here, not "
                f"{content.get('number')}; delete this line and all below it to go on"
            )
        for split in ("evaluation", "holdout"):
            content[split] = _evaluation(content[split])
        return Record(**content)

    def _refuse_other(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        there = _flat({"format": header.get("format"), **header.get("settings", {})})
        here = _flat({"format": FORMAT, **settings})
        other = [key for key in here | there if there.get(key) != here.get(key)]
        if other:
            raise ArtifactError(
                f"{self.path} is the ledger of a search with {other[0]}="
                f"{_short(there.get(other[0]))}, not {_short(here.get(other[0]))}; "
                f"go on with the same settings or delete it to search anew"
            )

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps({**content, "crc32": _crc(content)}) + "\n"
        end = os.fstat(self._file).st_size
        try:
            rest = line.encode()
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise MachineError(
                    f"no space for {self.path}: what is in it is intact; free space and run again"
                ) from None
            raise


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of mappings as `coordinates.lambda`, so that an error names the one that differs."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": own for name, own in inner.items()} or {key: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _to_json(record: Record) -> dict[str, Any]:
    content = record._asdict()
    for split in ("evaluation", "holdout"):
        if content[split] is not None:
            own: Evaluation = content[split]
            items = {name: _pack(of_set) for name, of_set in own.items.items()}
            content[split] = {**own._asdict(), "by_set": dict(own.by_set), "items": items}
    return content


def _evaluation(content: dict[str, Any] | None) -> Evaluation | None:
    if content is None:
        return None
    items: Items = {name: _unpack(packed) for name, packed in content["items"].items()}
    return Evaluation(**{**content, "items": items})


def _pack(items: Any) -> str:
    """Eight items a byte: a candidate with 10,000 items takes 2.5 kB."""
    return f"{len(items)}:{np.packbits(np.asarray(items, bool)).tobytes().hex()}"


def _unpack(packed: str) -> tuple[bool, ...]:
    count, text = packed.split(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=int(count))
    return tuple(bits.astype(bool).tolist())

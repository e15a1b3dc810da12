"""Every fault of a data file is one line that names file and line; nothing hangs or crashes."""

import gzip
import json
import lzma
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
from pyarrow import parquet as pq

from mediphi.config.corpus import FileSource, Licence
from mediphi.data import sources
from mediphi.data.bad_rows import BadRows
from mediphi.errors import DataError

LICENCE = Licence(id="CC0-1.0", origin="test", commercial_ok=True)
SECRET = "canary-patient"
TEXTS = [f"{SECRET} note number {i}, seen on ward {i * 7 % 5}" for i in range(40)]
GOOD = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
ONE = b'{"text": "canary-patient"}\n'


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def parquet_bytes(texts: list[str], *, checksum: bool = True) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": texts})
    options = {"write_page_checksum": checksum, "compression": "none", "row_group_size": 8}
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def flipped(data: bytes, place: int, bit: int = 1) -> bytes:
    changed = bytearray(data)
    changed[place] ^= bit
    return bytes(changed)


PARQUET = parquet_bytes(TEXTS)
FLIPPED_PARQUET = flipped(PARQUET, PARQUET.index(b"number 9"))
GZIP = gzip.compress(GOOD, mtime=0)
XZ = lzma.compress(GOOD)


class Fault(NamedTuple):
    """A broken file; `line` None: the fault is the file's, and no line is to be named."""

    name: str
    data: bytes
    line: int | None
    reason: str
    kind: str = "jsonl"


FAULTS = {
    "bad_json": Fault("a.jsonl", ONE + b'{"text": }\n', 2, "not JSON"),
    "torn_tail": Fault("a.jsonl", ONE + ONE[:-8], 2, "the file ends inside this line"),
    "torn_then_appended": Fault("a.jsonl", ONE[:-8] + ONE, 1, "not JSON"),
    "two_on_a_line": Fault("a.jsonl", ONE[:-1] + ONE, 1, "Extra data"),
    "lone_cr": Fault("a.jsonl", ONE.replace(b"\n", b"\r") * 3, 1, "lone carriage return"),
    "inner_bom": Fault("a.jsonl", ONE + b"\xef\xbb\xbf" + ONE, 2, "not JSON"),
    "utf16": Fault("a.jsonl", ONE.decode().encode("utf-16"), 1, "UTF-16"),
    "utf16_no_bom": Fault("a.jsonl", ONE.decode().encode("utf-16-le"), 1, "NUL byte"),
    "latin1": Fault("a.jsonl", ONE + '{"text": "µ"}\n'.encode("latin-1"), 2, "invalid UTF-8"),
    "nul": Fault("a.jsonl", ONE + b"\0" * 50 + b"\n", 2, "NUL byte"),
    "escaped_nul": Fault("a.jsonl", b'{"text": "a\\u0000b"}\n', 1, "NUL character"),
    "half_surrogate": Fault("a.jsonl", b'{"text": "a\\ud800b"}\n', 1, "surrogate"),
    "empty_file": Fault("a.jsonl", b"", 1, "the file is empty"),
    "blank_line": Fault("a.jsonl", ONE + b"\n" + ONE, 2, "blank line"),
    "only_spaces": Fault("a.jsonl", b"  \t \n", 1, "blank line"),
    "empty_text": Fault("a.jsonl", ONE + b'{"text": ""}\n', 2, "is empty"),
    "blank_text": Fault("a.jsonl", b'{"text": " \\n\\u00a0"}\n', 1, "is empty"),
    "null_text": Fault("a.jsonl", b'{"text": null}\n', 1, "is null"),
    "numeric_text": Fault("a.jsonl", b'{"text": 5}\n', 1, "is int, expected a string"),
    "list_text": Fault("a.jsonl", b'{"text": ["a"]}\n', 1, "is list, expected a string"),
    "no_text": Fault("a.jsonl", b'{"body": "a"}\n', 1, "field 'text' is missing"),
    "an_array": Fault("a.jsonl", b'["text"]\n', 1, "expected a JSON object"),
    "pretty_printed": Fault("a.jsonl", b'{\n "text": "a"\n}\n', 1, "not JSON"),
    "long_line": Fault("a.jsonl", ONE + b'{"text": "' + b"x" * 20_000_000, 2, "more than 16777216"),
    "deep": Fault("a.jsonl", ONE + b"[" * 100_000 + b"]" * 100_000, 2, "nested too deeply"),
    "deep_open": Fault("a.jsonl", b'{"text":' * 100_000, 1, "nested too deeply"),
    "duplicate_key": Fault("a.jsonl", b'{"text": "a", "text": "b"}\n', 1, "a key stands twice"),
    "nan": Fault("a.jsonl", b'{"text": "a", "x": NaN}\n', 1, "NaN is not JSON"),
    "huge_number": Fault("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", 1, ""),
    "gzip_truncated": Fault("a.jsonl.gz", GZIP[:-20], None, "damaged or cut short"),
    "gzip_no_trailer": Fault("a.jsonl.gz", GZIP[:-8], None, "damaged or cut short"),
    "gzip_garbage": Fault("a.jsonl.gz", GZIP + b"garbage", 41, "damaged or cut short"),
    "gzip_torn_second": Fault("a.jsonl.gz", GZIP + GZIP[:30], None, "damaged or cut short"),
    "gzip_flipped": Fault("a.jsonl.gz", flipped(GZIP, len(GZIP) // 2), None, "damaged"),
    "gzip_bad_crc": Fault("a.jsonl.gz", flipped(GZIP, len(GZIP) - 8), 41, "damaged"),
    "gzip_empty": Fault("a.jsonl.gz", b"", 1, "is not .gz data"),
    "gzip_of_nothing": Fault("a.jsonl.gz", gzip.compress(b""), 1, "the file is empty"),
    "xz_truncated": Fault("a.jsonl.xz", XZ[:-20], None, "damaged or cut short"),
    "xz_garbage": Fault("a.jsonl.xz", XZ + b"garbage!", 41, "damaged or cut short"),
    "xz_torn_second": Fault("a.jsonl.xz", XZ + XZ[:20], 41, "damaged or cut short"),
    "xz_flipped": Fault("a.jsonl.xz", flipped(XZ, len(XZ) // 2), None, "damaged"),
    "zst_truncated": Fault("a.jsonl.zst", zstd(GOOD)[:-9], None, "damaged or cut short"),
    "plain_named_gz": Fault("a.jsonl.gz", GOOD, 1, "is not .gz data"),
    "gz_named_plain": Fault("a.jsonl", GZIP, 1, "is .gz data"),
    "parquet_named_jsonl": Fault("a.jsonl", PARQUET, 1, "is Parquet"),
    "jsonl_named_parquet": Fault("a.parquet", GOOD, 1, "not Parquet", "parquet"),
    "parquet_empty": Fault("a.parquet", b"", 1, "not Parquet", "parquet"),
    "parquet_no_rows": Fault("a.parquet", parquet_bytes([]), 1, "string", "parquet"),
    "parquet_truncated": Fault("a.parquet", PARQUET[:-50], 1, "not Parquet", "parquet"),
    "parquet_tail_only": Fault("a.parquet", PARQUET[-300:], 1, "not Parquet", "parquet"),
    "parquet_flipped": Fault("a.parquet", FLIPPED_PARQUET, None, "damaged", "parquet"),
    "text_utf16": Fault("a.txt", "abc".encode("utf-16"), 1, "is UTF-16", "text"),
    "text_latin1": Fault("a.txt", b"one\n\xb5g", 2, "invalid UTF-8", "text"),
    "text_nul": Fault("a.txt", b"one\0", 1, "NUL character", "text"),
    "text_empty": Fault("a.txt", b"\xef\xbb\xbf \r\n", 1, "is empty", "text"),
    "text_long": Fault("a.txt", b"x" * 20_000_000, 1, "more than 16777216", "text"),
}


def read(
    path: Path | str, kind: str, bad_rows: BadRows | None = None, *, layout: str = "text"
) -> list[str]:
    options: dict[str, Any] = {"kind": kind, "format": layout}
    source = FileSource(path=str(path), licence=LICENCE, **options)
    found = sources.read(source, name="s", bad_rows=bad_rows or BadRows())
    return [record.text for record in found]


def message_of(path: Path | str, kind: str, *, layout: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(path, kind, layout=layout)
    message = str(caught.value)
    assert message.isprintable()
    assert SECRET not in message
    return message


Row = dict[str, Any]

MESSAGES: Row = {
    "messages": [
        {"role": "user", "content": f"{SECRET}, how are you?"},
        {"role": "assistant", "content": "Well."},
    ]
}
PAIR: Row = {"prompt": SECRET, "chosen": " is well", "rejected": " is ill"}
FLOW: Row = {"instruction": "Summarise.", "input": f"{SECRET} has a cough.", "output": "A cough."}
FLOW_DPO: Row = {**FLOW, "rejected_output": "A cold."}


def jsonl(*rows: Row | bytes) -> bytes:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return b"".join(line + b"\n" for line in lines)


def parquet_of(*rows: Row) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pq.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def without(row: Row, name: str) -> Row:
    return {key: value for key, value in row.items() if key != name}


CHAT_JSON = jsonl(MESSAGES, MESSAGES)
CHAT_GZIP = gzip.compress(CHAT_JSON, mtime=0)
ASK = MESSAGES["messages"][:1]
TURN = '{"role": "user", "content": "%s"}'
CHAT_FAULTS: dict[str, tuple[str, Fault]] = {
    "torn": ("messages", Fault("a.jsonl", CHAT_JSON[:-9], 2, "the file ends inside this line")),
    "empty": ("messages", Fault("a.jsonl", b"", 1, "the file is empty")),
    "array": ("messages", Fault("a.jsonl", jsonl(MESSAGES, b"[" + TURN.encode() + b"]"), 2, "obj")),
    "gzip_torn": ("messages", Fault("a.jsonl.gz", CHAT_GZIP[:-9], None, "damaged or cut short")),
    "no_messages": (
        "messages",
        Fault("a.jsonl", jsonl(MESSAGES, FLOW), 2, "'messages' is missing"),
    ),
    "no_answer": (
        "messages",
        Fault(
            "a.jsonl", jsonl(MESSAGES, {"messages": ASK}), 2, "must end with a message of the as"
        ),
    ),
    "text_of_messages": (
        "messages",
        Fault("a.jsonl", jsonl({"messages": json.dumps(ASK)}), 1, "is str, expected a list"),
    ),
    "nul_in_turn": (
        "messages",
        Fault("a.jsonl", CHAT_JSON.replace(b"Well.", b"W\\u0000"), 1, "NUL character"),
    ),
    "half_surrogate": (
        "messages",
        Fault("a.jsonl", CHAT_JSON.replace(b"Well.", b"\\ud800"), 1, "surrogate"),
    ),
    "doubled_key": (
        "messages",
        Fault("a.jsonl", CHAT_JSON.replace(b'"role"', b'"role": "user", "role"'), 1, "twice"),
    ),
    "equal_answers": (
        "preference",
        Fault("a.jsonl", jsonl(PAIR, PAIR | {"rejected": PAIR["chosen"]}), 2, "are the same"),
    ),
    "null_answer": (
        "preference",
        Fault("a.jsonl", jsonl(PAIR, PAIR | {"chosen": None}), 2, "'chosen' is null"),
    ),
    "no_rejected": (
        "preference",
        Fault("a.jsonl", jsonl(without(PAIR, "rejected")), 1, "'rejected' is missing"),
    ),
    "prompt_alone": (
        "prompt_completion",
        Fault("a.jsonl", jsonl({"prompt": SECRET}), 1, "'completion' is missing"),
    ),
    "no_output": (
        "mediflow",
        Fault("a.jsonl", jsonl(FLOW, without(FLOW, "output")), 2, "'output' is missing"),
    ),
    "quality_in_words": (
        "mediflow",
        Fault("a.jsonl", jsonl(FLOW | {"quality": "good"}), 1, "'quality' is str, expected a num"),
    ),
    "equal_outputs": (
        "mediflow_dpo",
        Fault("a.jsonl", jsonl(FLOW_DPO | {"rejected_output": "A cough. "}), 1, "are the same"),
    ),
    "not_judged_worse": (
        "mediflow_dpo",
        Fault("a.jsonl", jsonl(FLOW_DPO, FLOW), 2, "'rejected_output' is missing"),
    ),
    "parquet_no_output": (
        "mediflow",
        Fault("a.parquet", parquet_of(without(FLOW, "output")), 1, "'output'", "parquet"),
    ),
    "parquet_no_rejected": (
        "preference",
        Fault("a.parquet", parquet_of(without(PAIR, "rejected")), 1, "'rejected'", "parquet"),
    ),
    "parquet_messages_text": (
        "messages",
        Fault("a.parquet", parquet_of({"messages": SECRET}), 1, "messages", "parquet"),
    ),
    "parquet_numbers": (
        "prompt_completion",
        Fault("a.parquet", parquet_of({"prompt": 1, "completion": 2}), 1, "prompt", "parquet"),
    ),
    "parquet_no_answer": (
        "messages",
        Fault("a.parquet", parquet_of(MESSAGES, {"messages": ASK}), 2, "must end with", "parquet"),
    ),
    "parquet_equal": (
        "mediflow_dpo",
        Fault(
            "a.parquet",
            parquet_of(FLOW_DPO, FLOW_DPO | {"rejected_output": "A cough."}),
            2,
            "are the same",
            "parquet",
        ),
    ),
    "parquet_torn": (
        "preference",
        Fault("a.parquet", parquet_of(PAIR)[:-30], 1, "not Parquet", "parquet"),
    ),
}
"""Format of the rows, and the broken file."""


@pytest.mark.parametrize(("layout", "fault"), CHAT_FAULTS.values(), ids=CHAT_FAULTS.keys())
def test_a_broken_file_of_conversations_or_pairs_gives_one_line(
    layout: str, fault: Fault, tmp_path: Path
) -> None:
    check_fault(fault, tmp_path, layout=layout)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_broken_file_gives_one_line_with_file_and_line(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path, layout="text")


def check_fault(fault: Fault, folder: Path, *, layout: str) -> None:
    path = folder / fault.name
    path.write_bytes(fault.data)
    message = message_of(path, fault.kind, layout=layout)
    place, _, reason = message.removeprefix(f"{path}:").partition(": ")
    assert message.startswith(f"{path}:")
    assert place.isdigit()
    assert fault.line is None or int(place) == fault.line
    assert fault.reason in reason


ROW_FAULTS = [name for name, fault in FAULTS.items() if name.endswith(("_text", "_key", "_line"))]


@pytest.mark.parametrize("name", [*ROW_FAULTS, "bad_json", "nul", "latin1", "deep", "torn_tail"])
def test_skip_keeps_the_good_rows_and_names_the_bad_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + FAULTS[name].data)
    quarantine = tmp_path / "bad.txt"
    with BadRows("skip", max_share=1.0, quarantine=quarantine) as bad_rows:
        texts = read(path, "jsonl", bad_rows)
    assert texts[: len(TEXTS)] == TEXTS
    assert set(texts[len(TEXTS) :]) <= {SECRET}
    lines = quarantine.read_text().splitlines()
    assert len(lines) == bad_rows.rejected > 0
    assert all(line.startswith(f"{path}:4") for line in lines)
    assert SECRET not in quarantine.read_text()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
@pytest.mark.parametrize("what", ["missing", "folder", "loop", "dangling", "pipe", "glob"])
def test_what_is_no_file_gives_one_line(what: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd\nname"
    make: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to(tmp_path / "nowhere"),
        "pipe": lambda: os.mkfifo(path),
        "glob": lambda: None,
    }
    make[what]()
    message = message_of(f"{path}*" if what == "glob" else path, kind)
    assert message.startswith(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_a_folder_named_like_a_file_is_refused_in_a_glob(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").mkdir()
    kind = "text" if suffix == "txt" else suffix
    assert "is a folder" in message_of(f"{tmp_path}/*.{suffix}", kind)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_file_without_permission_gives_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(GOOD)
    path.chmod(0)
    assert "Permission denied" in message_of(path, kind)


def test_a_repeated_id_names_the_second_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n{"text": "c", "id": "1"}\n')
    source = FileSource(kind="jsonl", path=str(path), licence=LICENCE, id_field="id")
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'id' repeats the id"):
        list(sources.read(source, name="s", bad_rows=BadRows()))


@pytest.mark.parametrize("value", ["null", "true", "1.5", "[]", '""', '"\\u0000"'])
@pytest.mark.parametrize("field", ["id_field", "group_field"])
def test_an_unusable_id_or_group_is_a_bad_row(field: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "key": {value}}}\n')
    names = {field: "key"}
    source = FileSource(kind="jsonl", path=str(path), licence=LICENCE, **names)  # type: ignore
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'key'"):
        list(sources.read(source, name="s", bad_rows=BadRows()))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One random damage: bytes changed, cut out, doubled, inserted or torn off."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 12))
    noise = rng.choice([rng.randbytes(end - start), b"\0", b"\n", b"\r", b"", b"\xff\xfe", b"["])
    return rng.choice(
        [
            data[:start] + noise + data[end:],
            flipped(data, start, 1 << rng.randrange(8)),
            data[:start],
            data[:end] + data[start:],
            data + data[start:end],
        ]
    )


FILES = {
    "a.jsonl": ("jsonl", GOOD, False),
    "a.jsonl.gz": ("jsonl", GZIP, True),
    "a.jsonl.xz": ("jsonl", XZ, True),
    "a.parquet": ("parquet", PARQUET, False),
}
"""File name -> reader, content, and whether its format carries a checksum of all rows."""


def check_mutation(path: Path, name: str, seed: int) -> None:
    """Accepted rows are original ones, or the fault is reported, or it is a valid other text.

    Without a checksum nobody can tell a changed letter from a written one: there the number of
    strange rows is bounded by the lines that one damage can touch.
    """
    kind, data, has_checksum = FILES[name]
    changed = mutated(data, random.Random(seed))
    path.write_bytes(changed)
    bad_rows = BadRows("skip", max_share=1.0)
    try:
        texts = read(path, kind, bad_rows)
    except DataError as error:
        assert str(error).startswith(str(path)), seed
        assert str(error).isprintable() and SECRET not in str(error), seed
        return
    strange = Counter(texts) - Counter(TEXTS)
    lost = Counter(TEXTS) - Counter(texts)
    if has_checksum:
        # A whole stream doubled is valid data; its rows are original ones.
        assert not strange and not lost and not bad_rows.rejected, seed
    elif kind == "jsonl":
        is_bounded = strange.total() <= 13 and lost.total() <= 13
        assert is_bounded or changed == data[: len(changed)], seed
    else:
        assert not strange and not lost, seed


@pytest.mark.parametrize("name", FILES)
def test_random_damage_never_passes_unseen(name: str, tmp_path: Path) -> None:
    for seed in range(200):
        check_mutation(tmp_path / name, name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_random_damage_never_passes_unseen_10000(name: str, tmp_path: Path) -> None:
    for seed in range(10_000):
        check_mutation(tmp_path / name, name, 1_000_000 + seed)

"""Broken config files: one line that names file and line, and nothing is executed or expanded."""

from pathlib import Path

import pytest
from composing import report

ON_TOP = "defaults: [config, _self_]\n"

FILES = {
    "tab": ("a: 1\n\tb: 2\n", "file.yaml:2: found a tab character"),
    "duplicate": ("seed: 1\nseed: 2\n", "file.yaml:2: found duplicate key seed"),
    "tag": ('seed: !!python/object/apply:os.system ["touch pwned"]\n', "file.yaml:1: could not"),
    "alias": ("a: &a [x, x]\nb: *a\n", "file.yaml:2: aliases (*name) are not allowed"),
    "bomb": (
        "a0: &a0 [x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "file.yaml:2: aliases",
    ),
    "not_utf8": (b"seed: 1\nname: \xff\xfe\n", "file.yaml:2: not UTF-8"),
    "utf16": ("seed: 1\n".encode("utf-16"), "file.yaml:1: not UTF-8"),
    "open_list": ("seed: [1\n", "file.yaml:2: did not find expected"),
    "nul": ('a: "\x00"\n', "file.yaml:1: control characters"),
    "deep": ("a: " + "[" * 3000, "file.yaml:1: nested more than"),
    "two_documents": ("seed: 1\n---\nseed: 3\n", "file.yaml:2: expected a single document"),
    "surrogate": ('name: "\\ud800"\n', "file.yaml:"),
    "huge": ("# " + "x" * 1_100_000, "larger than"),
    "huge_number": (ON_TOP + "seed: " + "9" * 5000 + "\n", "digits"),
    "list": ("- 1\n", "must be a DictConfig"),
    "scalar": ("hello\n", "stage: missing"),
    "empty": ("", "stage: missing"),
    "defaults_not_a_list": ("defaults: {a: 1}\n", "defaults must be a list"),
    "unknown_default": (
        "defaults: [config, {override stage: nope}]\n",
        "allowed: dapt, doctor, dpo, merge, pit, search, sft",
    ),
    "missing_default": ("defaults: [nowhere]\n", "nowhere: no such config"),
    "typo": (ON_TOP + "stage: {phase2: {lrr: 1}}\n", "did you mean stage.phase2.lr?"),
    "unknown_root": (ON_TOP + "beta: 0.1\n", "beta=0.1: unknown key"),
    "wrong_shapes": (ON_TOP + "stage: [1, 2]\n", "Cannot merge DictConfig with ListConfig"),
    "null_section": (ON_TOP + "logger: null\n", "logger=null: must be a section"),
    "number_section": (ON_TOP + "corpus: 3\n", "corpus"),
    "bytes": (ON_TOP + "model: {path: !!binary aGVsbG8=}\n", "bytes is not a config value"),
    "number_key": (ON_TOP + "logger: {2: 3}\n", "logger.2=3: unknown key"),
    "itself": (ON_TOP + "corpus: ${corpus}\n", "refers to itself"),
    "its_parent": (ON_TOP + "stage: {phase1: '${stage}'}\n", "stage.phase1=${stage}"),
    "half_interpolation": (ON_TOP + "seed: '${'\n", "no viable alternative"),
    "key_of_hydra": (ON_TOP + "hydra: {sweeper: {jobz: 3}}\n", "jobz"),
    "mode_of_hydra": (ON_TOP + "hydra: {mode: FOO}\n", "FOO"),
    "secret": (ON_TOP + "logger: {api_key: canary}\n", "logger.api_key=***: unknown key"),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES.keys())
def test_a_broken_file_is_told_in_lines(text: str | bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    lines = report(name="file", extra=tmp_path)
    assert any(expected in told for told in lines), lines
    for told in lines:
        assert told.isprintable()
        assert len(told) < 400
        assert "canary" not in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.yaml"]


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(b"\xef\xbb\xbf" + ON_TOP.encode() + b"seed: 7\n")
    assert report(name="file", extra=tmp_path) == []


def test_a_good_file_has_no_problem(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(ON_TOP + "seed: 7\nlogger: {tags: [a]}\n")
    assert report(name="file", extra=tmp_path) == []

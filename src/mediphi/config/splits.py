"""Which files, folders and splits say by their names that they are for testing."""

import re

TEST_REFUSED = "searching against a test split is refused; take training or validation items"

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_TEST = re.compile(r"test(set|split|data|file|ing)?|.+test(set)?")
_ENGLISH = """
attest brightest contest detest fastest fittest greatest hottest latest lightest protest pytest
shortest slightest smartest strictest sweetest tightest unittest
"""
"""Words, and names of programs, that end like a data set's name with `test` behind it."""
_NO_SPLITS = frozenset(_ENGLISH.split())
_WHOLLY = ("test", "tests", "testset", "test_set", "test-set")


def names_a_test_split(path: str) -> bool:
    """Whether the name of a file, of a folder that counts, or of a split has the word test.

    Letter case, digits and signs part words, and a data set's name may stand before:
    `medqa_test.jsonl`, `MedQATest.csv`, `medqatest.jsonl`, `test-00000-of-00001.parquet` and
    `medqa_test/part-0.jsonl` are for testing, `latest.jsonl`, `contest.csv`, `lab_tests.jsonl` and
    `attestation.txt` are not.

    Folders count where the path begins at the working directory, and behind a wildcard. Of a path
    that begins at the root or at home the last one counts if its name ends with the word
    (`medqa_test`), and those above it, but the first two, if the word is their name: whoever named
    the others had no data set in mind.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    own = 0
    if path.startswith(("/", "~")):
        wild = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
        is_file = parts != [] and "." in parts[-1]
        own = min(wild, len(parts) - is_file)
    above = any(part.lower() in _WHOLLY for part in parts[2:own])
    nearest = own > 0 and _says_test(parts[own - 1], only_last=True)
    return above or nearest or any(map(_says_test, parts[own:]))


def _says_test(name: str, *, only_last: bool = False) -> bool:
    if name.partition(".")[0].lower() in _WHOLLY:
        return True
    words = [word.lower() for word in _WORDS.findall(name)]
    if only_last:
        words = words[-2:] if words[-1:] == ["set"] else words[-1:]
    return any(_TEST.fullmatch(word) and word not in _NO_SPLITS for word in words)

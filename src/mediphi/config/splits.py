"""Which files, folders and splits say by their names that they are for testing."""

import re
from collections.abc import Sequence

TEST_REFUSED = "searching against a test split is refused; take training or validation items"

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_ENGLISH = """
acutest alertest aptest attest bluntest brightest compactest completest contest correctest curtest
cutest deftest detest directest exactest faintest fastest fattest fittest flattest fleetest
greatest hottest justest latest lightest minutest moistest mutest neatest politest promptest
protest pytest quaintest quietest remotest rightest robustest shortest slightest smartest softest
stoutest straightest strictest sweetest swiftest tautest tightest unittest vastest wettest whitest
"""
"""Words, and names of programs, that end like a data set's name with `test` behind it."""
_END_IN_TEST = frozenset(_ENGLISH.split())
_OTHERS = re.compile(r"test(?:s|a|bed|e[ders]|ic|if|imo|is|o|y)")
"""How words begin that are no data set's name behind `test`: testament, tester, testosterone."""
_TEST_OF = re.compile(r"test(?=set|split|data|file|$)")
_WHOLLY = ("test", "testset", "test_set", "test-set")
_OF_PYTEST = re.compile(r"test_\w*[A-Za-z_]\d+")
"""`test_what_it_claims0`: a temporary folder that pytest makes."""


def names_a_test_split(path: str) -> bool:
    """Whether the name of a file, of a folder that counts, or of a split has the word test.

    Folders count where the path begins at the working directory. Of a path that begins at the root
    (or at home) the last one counts, what stands behind a wildcard, and above it what is called
    `test` and no more, if two folders or more stand before it. Whoever named the others, and the
    temporary folders of pytest, had no data set in mind.

    Letter case, digits and signs part words; a data set's name may stand before or behind:
    `medqa_test.jsonl`, `MedQATest.csv`, `medqatest.jsonl`, `test-00000-of-00001.parquet` and
    `medqa_test/part-0.jsonl` are for testing, `latest.jsonl`, `contest.csv`, `lab_tests.jsonl` and
    `attestation.txt` are not.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if path.startswith(("/", "~")):
        parts = _of_data(parts)
    return any(_says_test(part) for part in parts)


def _of_data(parts: Sequence[str]) -> list[str]:
    """What counts of an absolute path."""
    wild = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    first = max(min(wild, len(parts) - 1) - 1, 0)
    near = [part for part in parts[first:] if not _OF_PYTEST.fullmatch(part)]
    return near + [part for part in parts[2:first] if part.lower() in _WHOLLY]


def _says_test(name: str) -> bool:
    if name.partition(".")[0].lower() == "tests":
        return True
    return any(_is_test(word) for word in map(str.lower, _WORDS.findall(name)))


def _is_test(word: str) -> bool:
    if any(word[: found.end()] not in _END_IN_TEST for found in _TEST_OF.finditer(word)):
        return True
    return word.startswith("test") and not _OTHERS.match(word)

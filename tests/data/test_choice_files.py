"""Multiple-choice questions from files: what is understood, and every fault with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mediphi.config.splits import TEST_REFUSED
from mediphi.data.choice_files import read_questions
from mediphi.errors import DataError

GOOD: dict[str, Any] = {"prompt": "Fever is", "options": ["a sign", "a bone"], "answer": 0}
SECRET = "Mrs Smith"


def write(folder: Path, *rows: dict[str, Any] | str, name: str = "q.jsonl") -> Path:
    path = folder / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_a_row_is_a_question(tmp_path: Path, name: str) -> None:
    row = GOOD | {"id": 7, "split": "holdout", "group": "page 3"}
    [read] = read_questions(str(write(tmp_path, row, name=name)))
    assert read == ("7", "page 3", "holdout", "Fever is", ("a sign", "a bone"), 0)


@pytest.mark.parametrize(
    ("answer", "index"), [(0, 0), (1, 1), ("A", 0), ("b", 1), ("a bone", 1), (" a sign ", 0)]
)
def test_an_answer_is_an_index_a_letter_or_a_text(
    tmp_path: Path, answer: object, index: int
) -> None:
    [read] = read_questions(str(write(tmp_path, GOOD | {"answer": answer})))
    assert read.answer == index


def test_a_question_is_set_as_in_the_made_sets(tmp_path: Path) -> None:
    row = {"question": " What is fever? ", "options": ["x", "y"], "answer": 1}
    [read] = read_questions(str(write(tmp_path, row)))
    assert read.prompt == "Question: What is fever?\nAnswer:"
    assert read.id == "q:1" and read.part is None


def test_rows_with_one_prompt_are_one_group(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"prompt": "fever  IS"}, GOOD | {"prompt": "Pain is"}]
    first, second, third = read_questions(str(write(tmp_path, *rows)))
    assert first.group == second.group != third.group


def test_a_letter_that_is_its_own_text_is_no_riddle_but_two_meanings_are(tmp_path: Path) -> None:
    [same] = read_questions(str(write(tmp_path, GOOD | {"options": ["A", "B"], "answer": "B"})))
    assert same.answer == 1
    path = write(tmp_path, GOOD | {"options": ["B", "A"], "answer": "B"})
    with pytest.raises(DataError, match="letter of one option and the text of another"):
        list(read_questions(str(path)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[]", "is list, expected a JSON object"),
        ({}, "needs one of the fields 'prompt' and 'question'"),
        (GOOD | {"question": SECRET}, "needs one of the fields 'prompt' and 'question'"),
        (GOOD | {"prompt": " "}, "field 'prompt' is empty"),
        (GOOD | {"prompt": 3}, "field 'prompt' is int, expected a string"),
        ({"prompt": SECRET, "answer": 0}, "field 'options' is missing"),
        (GOOD | {"options": SECRET}, "field 'options' must be a list of 2 to 26 strings"),
        (GOOD | {"options": [SECRET]}, "field 'options' must be a list of 2 to 26 strings"),
        (GOOD | {"options": [SECRET, ""]}, "option 2 is empty"),
        (GOOD | {"options": [SECRET, SECRET.upper()]}, "two options are the same, letter case"),
        ({"prompt": SECRET, "options": ["a", "b"]}, "field 'answer' is missing"),
        (GOOD | {"answer": 2}, "field 'answer' is 2, options are counted 0 to 1"),
        (GOOD | {"answer": -1}, "field 'answer' is -1, options are counted 0 to 1"),
        (GOOD | {"answer": True}, "field 'answer' is bool, expected a string"),
        (GOOD | {"answer": SECRET}, "field 'answer' is no index, no letter A to B and no option"),
        (GOOD | {"answer": "C"}, "field 'answer' is no index, no letter A to B and no option"),
        (GOOD | {"id": None}, "field 'id' is null"),
        (GOOD | {"id": 1}, "field 'id' repeats the id of an earlier row"),
        (GOOD | {"split": "dev"}, "field 'split' must be one of search, holdout, validation"),
        (GOOD | {"split": "test"}, TEST_REFUSED),
        (GOOD | {"split": "TEST-set 1"}, TEST_REFUSED),
    ],
)
def test_a_bad_row_is_named_with_file_and_line_and_without_its_text(
    tmp_path: Path, row: dict[str, Any] | str, reason: str
) -> None:
    path = write(tmp_path, GOOD | {"id": 1}, row)
    with pytest.raises(DataError) as told:
        list(read_questions(str(path)))
    assert str(told.value).startswith(f"{path}:2: {reason}")
    assert told.value.exit_code == 2
    assert "\n" not in str(told.value) and SECRET not in str(told.value)


def test_a_file_of_a_test_split_in_a_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, GOOD, name="a.jsonl")
    path = write(tmp_path, GOOD, name="medqa_test.jsonl")
    with pytest.raises(DataError) as told:
        list(read_questions(str(tmp_path)))
    assert str(told.value) == f"{path}: {TEST_REFUSED}"


@pytest.mark.parametrize("name", ["test", "medqa_test", "MedQATest/en", "a/test-set/b"])
@pytest.mark.parametrize("given", ["folder", "glob", "one folder above"])
def test_a_folder_of_a_test_split_is_refused_wherever_it_lies_below(
    tmp_path: Path, name: str, given: str
) -> None:
    root = tmp_path / "questions"
    (root / name).mkdir(parents=True)
    path = write(root / name, GOOD)
    places = {"folder": root, "glob": root / "**" / "*.jsonl", "one folder above": tmp_path}
    with pytest.raises(DataError) as told:
        list(read_questions(str(places[given])))
    assert str(told.value) == f"{path}: {TEST_REFUSED}"


def test_files_in_a_folder_of_pytest_are_read(tmp_path: Path) -> None:
    assert tmp_path.name.startswith("test_")
    path = write(tmp_path, GOOD, name="latest.jsonl")
    for given in (path, tmp_path, tmp_path / "*.jsonl"):
        assert len(list(read_questions(str(given)))) == 1


def test_no_file_and_an_empty_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file"):
        list(read_questions(str(tmp_path / "nothing.jsonl")))
    with pytest.raises(DataError, match=r"q\.jsonl:1: the file is empty"):
        list(read_questions(str(write(tmp_path))))

"""Names of test splits: those that are, those that only look like it, and which folders count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediphi.config.splits import names_a_test_split

TEST_NAMES = """
test test.jsonl TEST.jsonl tests.jsonl test1.jsonl test_2023.jsonl test-00000-of-00001.parquet
medqa_test.jsonl.gz medqa-test.jsonl medqa.test.jsonl medqatest.jsonl MedQATest.jsonl
medqaTestSet.jsonl MedQA-test.jsonl.gz MTS-Dialog-TestSet-2.csv test_medqa.jsonl
medqatest_4options.jsonl medqatestset.jsonl x-testing.jsonl test_ground_truth.json
MEDQATEST.jsonl testsplit.jsonl medqa_test_en.jsonl testfile.jsonl posttest.jsonl
"""
TEST_FOLDERS = """
test tests medqa_test MedQATest medqatest TestSet medqa-test-set test-2023
"""
OTHER_NAMES = """
latest.jsonl Latest.jsonl LATEST.jsonl latest_2023.jsonl latestdata.jsonl contest.jsonl
contest-2.csv attestation.jsonl attested.jsonl protest.jsonl greatest_hits.jsonl fastest.jsonl
lab_tests.jsonl testament.jsonl testosterone.jsonl testicular_cancer.jsonl testimony.jsonl
tester.jsonl testes.jsonl validation dev.jsonl train.jsonl MyLatest.jsonl pytest unittest.jsonl
text.jsonl tempest.jsonl intestinal.jsonl tes.jsonl shortest_first.jsonl q.latest
"""
SPLITS = ["test", "test[:10%]", "train+test", "TEST-set 1", "medqa/test"]
PLACES = st.sampled_from(["", "./", "data/", "../a/", "/data/", "~/", "/data/medqa/en/"])


@pytest.mark.parametrize("name", [*TEST_NAMES.split(), *SPLITS])
def test_a_name_of_a_test_split_is_known(name: str) -> None:
    assert names_a_test_split(name)


@pytest.mark.parametrize("name", [*OTHER_NAMES.split(), "validation[:10%]", "train+validation"])
def test_other_names_pass(name: str) -> None:
    assert not names_a_test_split(name)


# A path that ends in a name without a dot is a folder's.
FILES = st.sampled_from([name for name in TEST_NAMES.split() if "." in name])
OTHER_FILES = st.sampled_from([name for name in OTHER_NAMES.split() if "." in name])


@given(PLACES, FILES, st.sampled_from(TEST_FOLDERS.split()), OTHER_FILES)
def test_a_file_counts_wherever_it_lies_and_its_folder_too(
    place: str, test: str, folder: str, other: str
) -> None:
    for path in (place + test, f"{place}{folder}/{other}", f"{place}{folder}/"):
        assert names_a_test_split(path), path
    folder = other.partition(".")[0]
    for path in (place + other, f"{place}{folder}/{other}", f"{place}{folder}/"):
        assert not names_a_test_split(path), path


@given(
    st.sampled_from(["test", "medqa_test", "MedQATest"]),
    st.lists(st.sampled_from(["a", "en", "part-0"]), max_size=3),
)
def test_every_folder_of_a_relative_path_counts_and_what_stands_behind_a_wildcard(
    folder: str, inner: list[str]
) -> None:
    rest = "/".join([folder, *inner, "q.jsonl"])
    for place in ("", "data/", "../", "/srv/me/data/*/", "/srv/me/**/"):
        assert names_a_test_split(place + rest)
    assert names_a_test_split(f"/srv/{folder}/**/*.jsonl")


def test_far_above_the_data_only_what_is_called_test_counts() -> None:
    for path in ("/data/medqa/test/en/q.jsonl", "~/data/medqa/TestSet/en/part-0/q.jsonl"):
        assert names_a_test_split(path)
    assert not names_a_test_split("/data/medqa/my-test-runs/en/q.jsonl")


@pytest.mark.parametrize(
    "path",
    [
        "/home/test/project/data/q.jsonl",
        "/srv/my-test-project/data/questions/q.jsonl",
        "/tmp/pytest-of-test/pytest-0/test_search0/q.jsonl",
        "/tmp/pytest-of-me/pytest-0/test_x_q_jsonl_0/*.jsonl",
        "/srv/data/test_bench/q.jsonl",
    ],
)
def test_folders_above_the_data_are_no_splits(path: str) -> None:
    assert not names_a_test_split(path)

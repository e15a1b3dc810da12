from pathlib import Path

import pytest
from bundled_data import CORPORA, bundled, documents

from mediphi.errors import DataError, UserError


def test_wikidoc_and_dailymed_are_sources_of_their_own():
    labels = documents("markdown_pages", path=CORPORA / "dailymed")
    assert (len(bundled("markdown_pages")), len(labels)) == (8, 7)
    pages = [path for path in CORPORA.glob("*/*.md") if path.name != "README.md"]
    assert {path.parent.name for path in pages} == {"wikidoc", "dailymed"}


def test_comments_go_and_the_first_heading_is_the_title():
    page = next(d for d in bundled("markdown_pages") if d.id == "markdown_pages/heart-failure")
    assert page.title == "Heart Failure"
    assert page.text.startswith("# Heart Failure\n\n## Definition\n\nHeart failure (HF) is a")
    assert all("<!--" not in document.text for document in bundled("markdown_pages"))


def test_a_folder_without_pages_names_the_override(tmp_path: Path):
    with pytest.raises(UserError, match=r"no \.md files .*corpus\.sources\.markdown_pages\.path"):
        documents("markdown_pages", path=tmp_path)


def test_bad_pages_are_named(tmp_path: Path):
    (tmp_path / "a.md").write_text("<!-- nothing -->\n")
    with pytest.raises(DataError, match=r"a\.md:1: the page is empty"):
        documents("markdown_pages", path=tmp_path)
    (tmp_path / "a.md").write_bytes(b"# fine\n\xff")
    with pytest.raises(DataError, match=r"a\.md:2: not utf-8"):
        documents("markdown_pages", path=tmp_path)

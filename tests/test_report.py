"""The report is one page that needs nothing else, says what it shows, and repeats byte for byte."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mediphi.report import Table, read_rows, write_report
from mediphi.tracking.csv_log import CsvLogger
from mediphi.tracking.names import header

KINDS = ["document", "summary"]
NAMES = header("tokens", {"kind": KINDS, "source": ["icd10cm"]})
QUIZ = Table("Quiz", ("when", "easy"), [("before", "25.0 %"), ("after <2>", "72.4 %")], "chance")


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    logger = CsvLogger(tmp_path / "metrics.csv", NAMES)
    for number, phase in enumerate(("phase1", "phase2")):
        logger.begin_phase(phase, first_step=40 * number, resumed_step=None)
        for step in (10, 20, 30, 40):
            loss = 3.0 - number - step / 100
            row = {"train/loss": loss, "lr": 1e-3 / step, "grad_norm": 1 / step}
            logger.log_metrics({**row, "tokens_per_second": 41000.0 + step}, step=step)
            heldout = {f"heldout/loss/kind/{k}": loss + i for i, k in enumerate(KINDS)}
            one_source = {"heldout/loss/source/icd10cm": loss}
            logger.log_metrics({"heldout/loss": loss, **heldout, **one_source}, step=step)
    return tmp_path


def page_of(run_dir: Path) -> str:
    path = write_report(
        run_dir,
        title="PIT of tiny <b>",
        metrics_csv=run_dir / "metrics.csv",
        tables=[QUIZ],
        facts={"tokens": 5898240, "loss": 2.123456, "model": "tiny & co"},
    )
    return path.read_text("utf-8")


def test_points_and_phases_are_read_as_written(run_dir: Path) -> None:
    rows = read_rows(run_dir / "metrics.csv")
    assert rows.values["train/loss"][0] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert rows.values["train/loss"][1][0] == 2.9
    assert rows.phases == {"phase1": 0, "phase2": 40}, "a phase begins where the last one ended"


def test_page_loads_nothing_from_outside(run_dir: Path) -> None:
    page = page_of(run_dir)
    reader = Reader(page)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in reader.tags}
    addresses = [v for _, attrs in reader.tags for k, v in attrs.items() if k in ("href", "src")]
    assert "@import" not in page
    assert all(a is None or a.startswith("#") for a in addresses)
    assert not re.search(r"url\((?!#)", page)


def test_every_chart_is_valid_svg_with_a_description_and_units(run_dir: Path) -> None:
    charts = re.findall(r"<svg.*?</svg>", page_of(run_dir), flags=re.DOTALL)
    texts = []
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert "optimizer step" in root.attrib["aria-label"] and root.attrib["role"] == "img"
        texts.append("".join(root.itertext()))
    assert len(charts) == 5  # one source alone gets no chart of its own
    assert "loss (nats/token)" in texts[0] and "held-out" in texts[0]
    assert "speed (tokens/s)" in texts[-1]
    assert all("phase2" in text and "optimizer step" in text for text in texts)


def test_a_preference_run_shows_margin_and_accuracy_and_a_loss_without_unit(tmp_path: Path) -> None:
    names = header("pairs", {"error": ["ambiguity", "spelling errors"]})
    logger = CsvLogger(tmp_path / "metrics.csv", names)
    logger.begin_phase("dpo", first_step=0, resumed_step=None)
    row = {"train/loss": 0.69, "heldout/loss": 0.7, "heldout/margin": 0.1, "train/accuracy": 0.5}
    by_error = {f"heldout/accuracy/error/{e}": 0.5 for e in ("ambiguity", "spelling errors")}
    logger.log_metrics({**row, **by_error}, step=10)
    page = write_report(tmp_path, title="dpo", metrics_csv=tmp_path / "metrics.csv").read_text()
    text = Reader(page).text
    assert "Loss per pair over" in text and "nats/token" not in text
    assert "Margin over optimizer steps: held-out from 0.1 to 0.1." in text
    assert "Accuracy over optimizer steps: ambiguity from 0.5 to 0.5; spelling errors" in text
    assert "accuracy (share right)" in text


def test_more_lines_than_colours_can_be_told_apart(tmp_path: Path) -> None:
    tasks = [f"task {letter}" for letter in "abcdefghijkl"]
    logger = CsvLogger(tmp_path / "metrics.csv", header("tokens", {"task": tasks}))
    logger.begin_phase("sft", first_step=0, resumed_step=None)
    for step in (1, 2):
        logger.log_metrics({f"heldout/loss/task/{task}": 2.0 for task in tasks}, step=step)
    page = write_report(tmp_path, title="sft", metrics_csv=tmp_path / "metrics.csv").read_text()
    lines = re.findall(r'style="(fill: none; stroke[^"]*stroke-width: 1.8[^"]*)"', page)
    assert len(set(lines)) == len(tasks)


def test_tables_and_facts_are_shown_and_escaped(run_dir: Path) -> None:
    reader = Reader(page_of(run_dir))
    for text in ("PIT of tiny <b>", "after <2>", "72.4 %", "chance", "5,898,240", "2.123"):
        assert text in reader.text
    assert "b" not in {tag for tag, _ in reader.tags}


def test_same_numbers_give_the_same_bytes(run_dir: Path) -> None:
    assert page_of(run_dir) == page_of(run_dir)


def test_run_without_rows_still_has_a_page(tmp_path: Path) -> None:
    CsvLogger(tmp_path / "metrics.csv", ["lr"]).begin_phase("p", first_step=0, resumed_step=None)
    page = page_of(tmp_path)
    assert "Quiz" in page and "<svg" not in page


def test_non_finite_points_do_not_stop_the_page(run_dir: Path) -> None:
    path = run_dir / "metrics.csv"
    logger = CsvLogger(path, NAMES)
    logger.begin_phase("phase2", first_step=40, resumed_step=40)
    logger.log_metrics({"train/loss": float("nan"), "grad_norm": float("inf")}, step=50)
    assert "<svg" in page_of(run_dir)

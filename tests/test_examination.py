"""What an exam tells goes through metrics.json into the table that users see."""

import json
from dataclasses import dataclass, field

import pytest

from mediphi.announcement import ExamTable, read_exams
from mediphi.backbone import BackboneSpec
from mediphi.evaluate.scores import Scored, Unit, improvement, summarise
from mediphi.examination import Exam, headline, marks

SHORT = [Scored("1", "short", 0.2), Scored("2", "short", 0.4), Scored("3", "long", 0.0)]
LATER = [Scored("1", "short", 0.5), Scored("2", "short", 0.9), Scored("3", "long", 0.1)]


@dataclass(frozen=True)
class Prompts:
    title: str = "Held-out prompts"
    noun: str = "prompts"
    metric: str = "exam"
    unit: Unit = "%"
    groups: tuple[str, ...] = ("short", "long")
    overall: bool = True
    baseline: str = ""
    scored: list[Scored] = field(default_factory=lambda: SHORT)

    def sit(self, backbone: BackboneSpec) -> list[Scored]:
        return self.scored


def test_what_is_told_comes_back_as_the_table() -> None:
    exam: Exam = Prompts()
    told = json.loads(json.dumps(marks(exam, {"before": SHORT, "after sft": LATER}, seed=3)))
    (table,) = read_exams({"exams": {"exam": told}})
    assert isinstance(table, ExamTable) and table.title == "Held-out prompts"
    head, *rows = table.rows
    assert head[1:] == ("before", "after sft", "gain in points, paired", "prompts")
    assert [row[0] for row in rows] == ["short", "long", "all"]
    assert rows[0][1].startswith("30.0 % [") and rows[2][2].startswith("50.0 % [")
    assert rows[1][3:] == ("+10.0 [+10.0, +10.0]", "1")
    assert list(told["results"]["after sft"]["short"].values()) == list(summarise(LATER, seed=3)[0])
    expected = improvement(SHORT, LATER, seed=3, overall=True)
    assert {g: tuple(d.values()) for g, d in told["gain"].items()} == expected


@pytest.mark.parametrize(
    ("exam", "name", "value"),
    [
        (Prompts(), "exam/all", 0.5),
        (Prompts(overall=False), "exam/short", 0.7),
        (Prompts(overall=False, metric="quiz"), "quiz/short", 0.7),
    ],
)
def test_the_headline_is_the_last_moments_mean(exam: Exam, name: str, value: float) -> None:
    told = marks(exam, {"before": SHORT, "after sft": LATER}, seed=0)
    assert headline(exam, told) == {"name": name, "value": pytest.approx(value)}


def test_a_run_without_an_exam_has_no_table() -> None:
    assert read_exams({"exams": {}}) == []


def test_losses_are_shown_in_their_unit() -> None:
    exam: Exam = Prompts(unit="nats/token", overall=False)
    told = marks(exam, {"before": LATER, "after sft": SHORT}, seed=0)
    head, short, _ = read_exams({"exams": {"loss": told}})[0].rows
    assert head[0] == "nats/token [95 % interval]" and head[3] == "difference, paired"
    assert short[1].startswith("0.700 [") and short[3].startswith("-0.400 [")

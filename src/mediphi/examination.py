"""What a stage is examined in, before, between and after its phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from mediphi.backbone import BackboneSpec
from mediphi.engine import Device
from mediphi.evaluate.scores import OVERALL, Scored, Unit, improvement, summarise
from mediphi.records import DIFFICULTIES, MultipleChoice
from mediphi.scoring import score_quiz


class Exam(Protocol):
    """A fixed set of items that a model is scored on.

    Attributes:
        title: heads its table.
        noun: what its items are called, in the plural.
        metric: first part of its metrics' names, `<metric>/<group>`, and of its files' names.
        unit: of its scores.
        groups: every group that `sit` may yield, in order.
        overall: whether the mean over all items is told beside the groups'.
        baseline: the rule whose scores the items bring along; "": none.
    """

    @property
    def title(self) -> str: ...
    @property
    def noun(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def unit(self) -> Unit: ...
    @property
    def groups(self) -> tuple[str, ...]: ...
    @property
    def overall(self) -> bool: ...
    @property
    def baseline(self) -> str: ...

    def sit(self, backbone: BackboneSpec) -> list[Scored]:
        """Score the model on every item, always in the same order."""
        ...


@dataclass(frozen=True, slots=True)
class CodeQuiz:
    """The quiz on medical codes: multiple choice by log-likelihood."""

    tokenizer: PreTrainedTokenizerFast
    questions: Sequence[MultipleChoice]
    device: Device
    title: str = "What does code X mean?"
    noun: str = "questions"
    metric: str = "quiz"
    unit: Unit = "%"
    groups: tuple[str, ...] = DIFFICULTIES
    overall: bool = False
    baseline: str = ""

    def sit(self, backbone: BackboneSpec) -> list[Scored]:
        answers = score_quiz(
            backbone, tokenizer=self.tokenizer, questions=self.questions, device=self.device
        )
        return [one.scored() for one in answers]


def marks(exam: Exam, answers: Mapping[str, Sequence[Scored]], *, seed: int) -> dict[str, Any]:
    """The exam in `metrics.json`: each group at each moment, and what was gained in between.

    Args:
        answers: moment -> what `sit` gave then, at least one.
        seed: of the bootstrap.
    """
    first, last = next(iter(answers.values())), list(answers.values())[-1]
    results = {
        moment: summarise(scored, overall=exam.overall, seed=seed)
        for moment, scored in answers.items()
    }
    gains = improvement(first, last, seed=seed, overall=exam.overall)
    return {
        "title": exam.title,
        "noun": exam.noun,
        "unit": exam.unit,
        "baseline": exam.baseline,
        "results": {name: {r.group: r._asdict() for r in own} for name, own in results.items()},
        "gain": {group: gain._asdict() for group, gain in gains.items()},
    }


def headline(exam: Exam, told: Mapping[str, Any]) -> dict[str, Any]:
    """The one number of `marks` that sweeps compare: all items, or the first group, at the end."""
    final = list(told["results"].values())[-1]
    group = OVERALL if OVERALL in final else next(iter(final))
    return {"name": f"{exam.metric}/{group}", "value": final[group]["score"]}

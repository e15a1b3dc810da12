"""What a search asks of its merge: one line, with the key that is at fault."""

import pytest
from composing import report

from mediphi.config.methods import METHODS

MODELS = ["merge.models.a.path=a", "merge.models.b.path=b"]
OWN = [f"merge.models.{name}.parameters.weight=0.5" for name in "ab"]
SEARCHED = (
    "linear, slerp, multislerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, "
    "breadcrumbs_ties"
)


def told(*overrides: str) -> list[str]:
    return report("stage=search", *MODELS, *overrides)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        # A number that the search moves is one number.
        (
            ["merge.parameters.weight=[0.1,0.9]"],
            "merge.parameters.weight=[0.1, 0.9]: weight is searched: give one number from 0 to 1, "
            "or leave weight out: stage.searched=[density,lambda]",
        ),
        (
            ["merge.models.a.parameters.density=[{value: 0.3}]", "stage.strategy=random"],
            'merge.models.a.parameters.density=[{"value": 0.3}]: density is searched: give one '
            "number from 0.05 to 1, or leave density out: stage.searched=[weight,lambda]",
        ),
        (
            ["merge.parameters.weight=[0.1,0.9]", "stage.searched=[weight]"],
            "merge.parameters.weight=[0.1, 0.9]: weight is searched: give one number from 0 to 1",
        ),
        (
            ["stage.one_for_all=[weight]", OWN[0]],
            "merge.models.a.parameters.weight=0.5: stage.one_for_all has one weight; give "
            "merge.parameters.weight",
        ),
        # CMA-ES begins within its bounds.
        (
            ["merge.parameters.weight=5"],
            "merge.parameters.weight=5: the search begins here: give one number from 0 to 1, or "
            "set stage.bounds.weight",
        ),
        (
            ["stage.bounds.density=[0.1,0.4]"],
            "merge.parameters.density=0.5: the search begins here: give one number from 0.1 to "
            "0.4, or set stage.bounds.density",
        ),
        (
            ["+merge.parameters.lambda=2", "seed=-1"],
            "merge.parameters.lambda=2: the search begins here: give one number from 0.5 to 1.5, "
            "or set stage.bounds.lambda",
        ),
        # The key that is at fault.
        (
            ["merge.backend=mergekit"],
            "merge.backend=mergekit: a search builds its candidates itself; allowed: mediphi",
        ),
        (
            ["merge=karcher"],
            f"merge.method=karcher: has nothing to search; allowed: {SEARCHED}",
        ),
        (
            ["merge=model_stock"],
            f"merge.method=model_stock: has nothing to search; allowed: {SEARCHED}",
        ),
        (["stage.bounds.density=[0.1,4]"], "stage.bounds.density=[0.1, 4]: must be [low, high] wi"),
        (["stage.searched=[t]"], 'stage.searched=["t"]: unknown parameter t; ties has weight, den'),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], line: str) -> None:
    method = [] if any(own.startswith("merge=") for own in overrides) else ["merge=ties"]
    found = told(*method, *overrides)
    assert [one for one in found if one.startswith(line)], found
    assert len(found) == 1 + ("seed=-1" in overrides)


def test_a_file_is_told_by_its_own_key() -> None:
    [found] = report("stage=search", "merge=mergekit", "merge.config=x.yml")
    assert found == f"merge.config=x.yml: a search takes no file; say it here: merge={SEARCHED}"


def test_methods_that_can_be_searched_are_those_that_a_refusal_names() -> None:
    for method in METHODS:
        models = MODELS[: METHODS[method].max_models]
        assert (report("stage=search", f"merge={method}", *models) == []) == (
            method in SEARCHED.split(", ")
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ["merge.parameters.weight=[0.1,0.9]", "stage.searched=[density]"],
        ["merge.parameters.weight=[0.1,0.9]", *OWN],
        ["merge.parameters.weight=5", *OWN],
        ["merge.parameters.weight=5", "stage.bounds.weight=[0,9]"],
        ["merge.parameters.weight=5", "stage.strategy=random"],
        ["stage.bounds.lambda=[0.1,0.4]"],
        ["stage.bounds.density=[0.1,0.4]", "stage.strategy=grid", "stage.grid.density=[0.2]"],
        ["merge.parameters.weight=0", "merge.models.a.parameters.weight=1"],
    ],
)
def test_what_begins_nothing_is_not_judged(overrides: list[str]) -> None:
    assert told("merge=ties", *overrides) == []

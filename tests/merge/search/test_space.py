"""Points of the unit cube and genomes are two faces of one candidate."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediphi.config.methods import METHODS
from mediphi.errors import UserError
from mediphi.merge.search import Space, SpaceOptions

EXPERTS = ("pubmed", "clinical", "medcode")
SEARCHABLE = [m.name for m in METHODS.values() if any(p.searched for p in m.parameters)]


def models_of(method: str) -> tuple[str, ...]:
    return EXPERTS[: METHODS[method].max_models or len(EXPERTS)]


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    method = draw(st.sampled_from(SEARCHABLE))
    bounds = {}
    for own in METHODS[method].parameters:
        if own.searched and draw(st.booleans()):
            low, high = max(own.low, -5.0), min(own.high, 5.0)
            ends = sorted(draw(st.tuples(st.floats(low, high), st.floats(low, high))))
            if ends[1] - ends[0] > 1e-3:
                bounds[own.name] = (ends[0], ends[1])
    options = SpaceOptions(
        bounds=bounds,
        shared=draw(st.sampled_from([(), ("weight",)])) if method != "slerp" else (),
        num_layer_groups=draw(st.integers(1, 3)),
        digits=draw(st.integers(1, 10)),
    )
    return Space(method, models_of(method), options)


@given(spaces(), st.data())
def test_a_genome_survives_encoding_and_json(space: Space, data: st.DataObject) -> None:
    size = len(space.coordinates)
    point = np.array(data.draw(st.lists(st.floats(-1, 2), min_size=size, max_size=size)))
    genome = space.decode(point)
    assert space.decode(space.encode(genome)) == genome
    assert space.rounded(genome) == genome
    assert json.loads(json.dumps(genome)) == genome


@given(spaces(), st.data())
def test_every_genome_lies_within_its_bounds(space: Space, data: st.DataObject) -> None:
    size = len(space.coordinates)
    point = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=size, max_size=size)))
    genome = space.decode(point)
    assert tuple(genome) == space.names
    for own in space.coordinates:
        assert own.low <= genome[own.name] <= own.high
    for of_group in space.tensor_values(genome):
        assert list(of_group) == [own.name for own in space.method.parameters]


def test_the_ends_of_the_cube_are_the_bounds() -> None:
    space = Space("ties", EXPERTS, SpaceOptions(bounds={"lambda": (0.12345, 1.98765)}, digits=2))
    for end, side in ((0.0, "low"), (1.0, "high")):
        genome = space.decode(np.full(len(space.coordinates), end))
        assert genome == {own.name: getattr(own, side) for own in space.coordinates}


def test_coordinates_are_named_by_parameter_model_and_group() -> None:
    assert Space("breadcrumbs", ("a", "b")).names == (
        "weight/a",
        "weight/b",
        "density/a",
        "density/b",
        "gamma/a",
        "gamma/b",
        "lambda",
    )
    grouped = SpaceOptions(searched=["lambda", "weight"], num_layer_groups=2)
    assert Space("task_arithmetic", ("a", "b"), grouped).names == (
        "weight/a@0",
        "weight/a@1",
        "weight/b@0",
        "weight/b@1",
        "lambda@0",
        "lambda@1",
    )
    assert Space("slerp", ("a",)).names == ("t",)


def test_the_start_is_mergekit_evolves() -> None:
    space = Space("breadcrumbs", ("a", "b", "c", "d"))
    start = space.decode(space.start)
    assert start["weight/a"] == 0.25
    assert start["density/a"] == 0.9
    assert start["gamma/d"] == 0.01
    assert start["lambda"] == 1.0
    assert Space("slerp", ("a",), SpaceOptions(bounds={"t": (0.1, 0.5)})).start.tolist() == [1.0]


def test_operators_get_all_parameters_for_every_layer_group() -> None:
    options = SpaceOptions(
        searched=["weight", "density"],
        fixed={"gamma": {"b": 0.2, "a": 0.1}, "rescale": True},
        shared=["density"],
        num_layer_groups=2,
    )
    space = Space("breadcrumbs", ("a", "b"), options)
    genome = dict(zip(space.names, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    rest = {"gamma": (0.1, 0.2), "normalize": False, "rescale": True, "lambda": 1.0}
    assert space.tensor_values(genome) == (
        {"weight": (0.1, 0.3), "density": (0.5, 0.5)} | rest,
        {"weight": (0.2, 0.4), "density": (0.6, 0.6)} | rest,
    )


@pytest.mark.parametrize(
    ("method", "models", "options", "words"),
    [
        ("tie", EXPERTS, {}, "merge method tie is not known; there are linear"),
        ("slerp", EXPERTS, {}, "at least 1 and at most 1"),
        ("ties", ("a", "a"), {}, "names that differ"),
        ("ties", EXPERTS, {"searched": ["gamma"]}, "has no parameter gamma; it has weight"),
        ("ties", EXPERTS, {"searched": ["weight", "normalize"]}, "normalize has no b"),
        ("ties", EXPERTS, {"searched": ["density"]}, "weight is neither searched nor given"),
        ("ties", EXPERTS, {"bounds": {"density": (0.5, 0.5)}}, "must rise and lie within [0, 1]"),
        ("ties", EXPERTS, {"bounds": {"density": (0.5, 1.5)}}, "must rise and lie within [0, 1]"),
        ("ties", EXPERTS, {"fixed": {"density": 2.0}}, "density=2 must lie within [0, 1]"),
        ("ties", EXPERTS, {"fixed": {"density": {"a": 0.1}}}, "has values for a; allowed is pubm"),
        ("ties", EXPERTS, {"fixed": {"lambda": {"a": 0.1}}}, "allowed is one number"),
        ("ties", EXPERTS, {"searched": ["weight"], "fixed": {"weight": 1.0}}, "both searched and"),
        ("karcher", EXPERTS, {}, "nothing is left to search"),
        ("ties", EXPERTS, {"num_layer_groups": 0}, "num_layer_groups=0"),
        ("ties", EXPERTS, {"digits": 11}, "digits=11"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(
    method: str, models: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        Space(method, models, SpaceOptions(**options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

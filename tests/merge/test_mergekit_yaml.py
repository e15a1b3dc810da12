"""mergekit's YAML: whatever a file holds is a merge or told in lines; what is written is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration

from mediphi.config.merging import Merge
from mediphi.errors import ConfigError
from mediphi.merge.headers import Header, with_header
from mediphi.merge.mergekit_writing import write_mergekit
from mediphi.merge.mergekit_yaml import Recipe, read_mergekit, short_names
from mediphi.merge.settings import values_of
from mediphi.sources import find_sources, mergekits_sources

MALFORMED = {
    "slices: [{parameters: {t: 1}}]": "slices[0].sources must be a list of models",
    "slices: 5": "slices must be a list",
    "slices: []": "slices must be a list",
    "slices: [{sources: [{model: a, layer_range: 5}]}]": "slices[0]: layer_range must be [first",
    "slices: [{sources: [{model: a, layer_range: [0, x]}]}]": "slices[0]: layer_range must be",
    "slices: [{sources: [{model: a}]}]": "slices[0]: layer_range must be",
    "slices: [{sources: [5]}]": "slices[0].sources[0], a model: must be keys with values",
    "models: 5": "models must be a list of models",
    "models: [{model: a}]\nparameters: [1]": "parameters: must be keys with values",
    "models: [{model: a, parameters: [1]}]": "models[0], a model: parameters: must be keys",
    "models: [{model: a}]\nparameters: {t: [0, x]}": "parameters.t: must be a number, a list",
    "models: [{model: a}]\nparameters: {t: [{value: [0, [1]]}]}": "parameters.t: must be a number",
    "models: [{model: a}]\nparameters: {t: [{value: 1, layers: [0, 2]}]}": "unknown key layers",
    "models: [{model: a}, {model: a}]\nparameters: {t: 1}": "models[1], a model: a is listed twice",
    "models: [{model: 2001-99-99}]": "not a merge: month must be in 1..12",
    "models: " + "[" * 700 + "]" * 700: "nested too deeply",
    "models: [{model: a, parameters: {t: null}}]": "parameters.t: the value is missing",
    "models: [{model: a}]\nparameters: {t: [{filter: mlp, value: null}]}": (
        "parameters.t: the value is missing"
    ),
    "slices: [{sources: [{model: a, layer_range: [0, 2]}], base_model: b}]": (
        "slices[0]: base_model is mergekit's alone: merge.backend=mergekit"
    ),
    "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]": (
        "slices[0]: lacks the base model b, which mergekit refuses, too"
    ),
    "slices:\n- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]\n"
    "- sources: [{model: b, layer_range: [1, 2]}]": (
        "slices[1]: has other models than slices[0]: merge.backend=mergekit"
    ),
    "models: &x [*x]": "more than 100000 values, its aliases",
    "models:\n" + "\n".join(f"- &x{n + 1} [{f'*x{n}, ' * 9 * (n > 0)}1]" for n in range(40)): (
        "more than 100000 values, its aliases"
    ),
    "models:\n- &x0 {k0: 1}\n"
    + "\n".join(f"- &x{n + 1} {{<<: [*x{n}, *x{n}], k{n + 1}: 1}}" for n in range(40)): (
        "more than 100000 values, its aliases"
    ),
}


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:40]))
def test_a_malformed_file_is_one_line_that_names_the_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(f"merge_method: slerp\nbase_model: b\n{text}")
    with pytest.raises(ConfigError) as caught:
        read_mergekit(path)
    (line,) = caught.value.lines
    assert line.startswith(str(path)) and MALFORMED[text] in line and "\n" not in line


scalars = st.sampled_from(
    [None, True, 0, 1, 2, 10**400, 0.5, float("nan"), "a", "b", "a+b", "x\ny", "\0", "a" * 300]
)
KEYS = ["model", "layer_range", "parameters", "sources", "value", "filter", "t", "path", "lora"]
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, 5, "?"]), inner, max_size=4)
    ),
    max_leaves=8,
)
references = trees | st.just("a")
parameters = trees | st.dictionaries(st.sampled_from(["t", "weight"]), trees)
sources = trees | st.lists(
    st.fixed_dictionaries(
        {"model": references, "layer_range": trees | st.just([0, 2])},
        optional={"parameters": parameters},
    ),
    max_size=2,
)
models = st.fixed_dictionaries({"model": references}, optional={"parameters": parameters})
files = trees | st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["slerp", "linear", "breadcrumbs"]) | scalars},
    optional={
        "base_model": references,
        "models": trees | st.lists(models),
        "slices": trees | st.lists(st.fixed_dictionaries({"sources": sources}), max_size=2),
        "parameters": parameters,
        "dtype": scalars,
        "tokenizer_source": scalars,
    },
)


@given(body=files)
@settings(max_examples=400, deadline=None)
def test_any_tree_is_a_merge_or_told_in_lines(
    tmp_path_factory: pytest.TempPathFactory, body: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yml"
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    try:
        assert isinstance(read_mergekit(path), Recipe)
    except ConfigError as error:
        assert error.lines
        assert all(line.startswith(str(path)) and line.isprintable() for line in error.lines)


def test_aliases_mean_what_they_stand_for(tmp_path: Path) -> None:
    path, settings_ = tmp_path / "merge.yml", {"weight": 0.5, "density": [0.1, 0.9]}
    models = [{"model": "a", "parameters": settings_}, {"model": "b", "parameters": settings_}]
    body = {"merge_method": "ties", "base_model": "x", "models": models}
    path.write_text(text := yaml.safe_dump(body))
    assert "&id001" in text and "*id001" in text
    aliased = read_mergekit(path)
    path.write_text(json.dumps(body))
    assert aliased == read_mergekit(path)
    assert aliased.merge.models["b"].parameters == {"weight": 0.5, "density": (0.1, 0.9)}


paths = st.lists(st.sampled_from(["a", "a_2", "a_2_2", "base", "base_2", "model", "."]), min_size=1)


@given(st.lists(paths.map("/".join), unique=True, max_size=12))
def test_every_folder_has_a_name_of_its_own(folders: list[str]) -> None:
    names = short_names(folders)
    assert [*names] == folders and len({*names.values()}) == len(folders)
    assert "base" not in names.values()


def test_no_model_of_a_file_is_lost_where_names_are_alike(tmp_path: Path) -> None:
    folders = [tmp_path / own for own in ("p/a", "p/a_2", "q/a", "base")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    path = tmp_path / "merge.yml"
    path.write_text(text := yaml.safe_dump({"merge_method": "linear", "models": models}))
    read = read_mergekit(path).merge
    assert {name: own.path for name, own in read.models.items()} == dict(
        zip(("a", "a_2", "a_3", "base_2"), map(str, folders), strict=True)
    )
    assert [*find_sources(read).models.values()] == folders
    assert {*mergekits_sources(text).models.values()} == {*folders}


def test_mergekit_adds_a_base_to_models_and_not_to_slices(tmp_path: Path) -> None:
    """Of a method without one."""
    head = "merge_method: linear\nbase_model: x\nparameters: {weight: 1}\n"
    path = tmp_path / "merge.yml"
    path.write_text(f"{head}models: [{{model: a}}]")
    assert [*read_mergekit(path).merge.models] == ["a", "x"]
    path.write_text(f"{head}slices: [{{sources: [{{model: a, layer_range: [0, 2]}}]}}]")
    assert [*read_mergekit(path).merge.models] == ["a"]


def test_a_uniform_soup_is_written_as_a_mean_that_mergekit_knows(tmp_path: Path) -> None:
    merge = Merge.model_validate(
        {"method": "uniform_soup", "models": {"a": {"path": "a"}, "b": {"path": "b"}}}
    )
    models = {"a": Path("a"), "b": Path("b")}
    text = write_mergekit(merge, base=None, models=models, num_layers=2, dtype="float32")
    body = yaml.safe_load(text)
    assert (body["merge_method"], body["parameters"]) == ("linear", {"weight": 1.0})
    MergeConfiguration.model_validate(body)
    (tmp_path / "merge.yml").write_text(text)
    read = read_mergekit(tmp_path / "merge.yml").merge
    values = values_of(read, num_layers=2)("model.norm.weight")
    assert values == {"weight": (1.0, 1.0), "normalize": True}


def test_the_first_line_carries_what_mergekits_yaml_cannot(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    body = "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
    text = with_header(body, Header("paper", 7), method="ties")
    assert "mergekit would give other weights" in text.splitlines()[0]
    path.write_text(text)
    recipe = read_mergekit(path)
    assert recipe.header == Header("paper", 7) and recipe.merge.semantics == "paper"
    assert with_header(text, Header("paper", 7), method="ties") == text
    MergeConfiguration.model_validate(yaml.safe_load(text))
    path.write_text(body)
    assert read_mergekit(path).header is None
    own = with_header(body, Header("mergekit", 7, own_dtypes=True), method="ties")
    path.write_text(f"{own}dtype: float32\n")
    assert read_mergekit(path).header == Header("mergekit", 7, own_dtypes=True)
    assert read_mergekit(path).merge.dtype is None
    path.write_text(f"# mediphi: semantics=other seed=1\n{body}")
    with pytest.raises(ConfigError, match=r"merge.yml:1: must be '# mediphi: semantics="):
        read_mergekit(path)

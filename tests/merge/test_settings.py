"""A setting's value for a tensor, against mergekit's own resolution of the same YAML."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.architecture import arch_info_for_config
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ValidationError
from transformers import Phi3Config

from mediphi.config.merging import Merge
from mediphi.config.methods import METHODS
from mediphi.errors import ConfigError, DataError, UserError
from mediphi.merge.mergekit_writing import write_mergekit
from mediphi.merge.mergekit_yaml import read_mergekit
from mediphi.merge.settings import check_layers, place_of, resolve, values_of

NUM_LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(NUM_LAYERS)
        for name in ("self_attn.qkv_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]

numbers = st.floats(0, 1).map(lambda x: round(x, 3))
gradients = st.lists(numbers, min_size=1, max_size=4).map(tuple)
plain = st.one_of(numbers, gradients)
filters = st.sampled_from(["mlp", "self_attn", "norm", "embed", "*"])


@st.composite
def conditionals(draw: st.DrawFn) -> tuple[dict[str, Any], ...]:
    entries = draw(
        st.lists(
            st.fixed_dictionaries({"value": plain}, optional={"filter": filters}),
            min_size=1,
            max_size=3,
        )
    )
    return (*entries, {"value": draw(plain)})


@st.composite
def layered(draw: st.DrawFn) -> tuple[dict[str, Any], ...]:
    cut = draw(st.integers(1, NUM_LAYERS - 1))
    return (
        {"value": draw(plain), "layers": (0, cut)},
        {"value": draw(plain), "layers": (cut, NUM_LAYERS)},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("base", "a", "b"):
        Phi3Config(num_hidden_layers=NUM_LAYERS, architectures=["Phi3ForCausalLM"]).save_pretrained(
            root / name
        )
    return {name: root / name for name in ("base", "a", "b")}


def theirs(text: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What mergekit resolves for each tensor of `NAMES`: (shared, by model)."""
    found: dict[str, Any] = {}
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    model_config = Phi3Config.from_pretrained(folders["base"])
    arch = arch_info_for_config(model_config)
    assert arch is not None
    planner = MergePlanner(config, arch, MergeOptions(), model_config)

    def look(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        from mergekit.parameter_resolver import resolve_parameters

        shared, own = resolve_parameters(
            planner._method.spec,
            tensor_name=weight.name,
            inputs={model: w.name for model, w in zip(models, weights_in, strict=True)},
            sources=cfg_reader.parameter_sources,
            base_model=cfg_reader.base_model,
            t=cfg_reader.t,
        )
        by_folder = {str(model.model.path): values for model, values in own.items()}
        found[weight.name] = (shared, by_folder)

    monkeypatch.setattr(planner, "plan_tensor", look)
    planner._plan()
    return found


@given(
    weight=st.one_of(plain, conditionals(), layered()),
    own=st.one_of(st.none(), plain, conditionals(), layered()),
    factor=st.one_of(numbers, gradients, layered()),
)
@settings(max_examples=150, deadline=None)
def test_every_tensor_gets_the_values_that_mergekit_gives_it(
    folders: dict[str, Path], weight: Any, own: Any, factor: Any
) -> None:
    merge = Merge.model_validate(
        {
            "method": "breadcrumbs",
            "models": {
                "a": {"path": "a", "parameters": {} if own is None else {"weight": own}},
                "b": {"path": "b"},
            },
            "parameters": {"weight": weight, "lambda": factor, "density": 0.5},
        }
    )
    ours = values_of(merge, num_layers=NUM_LAYERS)
    text = write_mergekit(
        merge,
        base=folders["base"],
        models={name: folders[name] for name in ("a", "b")},
        num_layers=NUM_LAYERS,
        dtype="float32",
    )
    with pytest.MonkeyPatch.context() as patch:
        resolved = theirs(text, folders, patch)
    for name in NAMES:
        shared, by_folder = resolved[name]
        values = ours(name)
        assert values["lambda"] == pytest.approx(shared["lambda"], abs=1e-12)
        expected = [by_folder[str(folders[model])]["weight"] for model in ("a", "b")]
        assert values["weight"] == pytest.approx(tuple(expected), abs=1e-12)
        assert values["density"] == (0.5, 0.5)
        assert values["gamma"] == (0.01, 0.01)


@given(weight=st.one_of(plain, conditionals(), layered()), own=st.one_of(plain, conditionals()))
@settings(max_examples=150, deadline=None)
def test_a_written_file_is_read_as_the_same_merge(
    tmp_path_factory: pytest.TempPathFactory, weight: Any, own: Any
) -> None:
    merge = Merge.model_validate(
        {
            "method": "ties",
            "base": "x/base",
            "models": {"a": {"path": "x/a", "parameters": {"weight": own}}, "b": {"path": "x/b"}},
            "parameters": {"weight": weight},
        }
    )
    text = write_mergekit(
        merge,
        base=Path("x/base"),
        models={"a": Path("x/a"), "b": Path("x/b")},
        num_layers=NUM_LAYERS,
        dtype="float32",
    )
    path = tmp_path_factory.mktemp("yaml") / "merge.yml"
    path.write_text(text)
    again, num_layers, _ = read_mergekit(path)
    assert num_layers in (None, NUM_LAYERS)
    assert [*again.models] == ["a", "b"]
    first, second = values_of(merge, num_layers=NUM_LAYERS), values_of(again, num_layers=NUM_LAYERS)
    for name in NAMES:
        assert first(name)["weight"] == pytest.approx(second(name)["weight"], abs=1e-12)
        assert first(name)["normalize"] == second(name)["normalize"]


ends = st.integers(0, NUM_LAYERS + 2)
ranges = st.tuples(ends, ends).filter(lambda two: two[0] < two[1])
any_layers = st.lists(
    st.fixed_dictionaries({"value": plain}, optional={"filter": filters, "layers": ranges}),
    max_size=3,
).map(lambda entries: (*entries, {"value": 0.5}))


@given(weight=any_layers, own=any_layers)
@settings(max_examples=300, deadline=None)
def test_any_layers_are_written_and_read_as_the_same_merge_or_refused(
    tmp_path_factory: pytest.TempPathFactory, weight: Any, own: Any
) -> None:
    merge = Merge.model_validate(
        {
            "method": "ties",
            "base": "x/base",
            "models": {"a": {"path": "x/a", "parameters": {"weight": own}}},
            "parameters": {"weight": weight},
        }
    )
    beyond = [e for e in (*weight, *own) if e.get("layers", (0, 0))[1] > NUM_LAYERS]
    if beyond:
        allowed = rf"weight: layers=\[\d, \d\]: the models have {NUM_LAYERS} layers; allowed"
        with pytest.raises(UserError, match=allowed):
            check_layers(merge, num_layers=NUM_LAYERS)
        return
    check_layers(merge, num_layers=NUM_LAYERS)
    text = write_mergekit(
        merge,
        base=Path("x/base"),
        models={"a": Path("x/a")},
        num_layers=NUM_LAYERS,
        dtype="float32",
    )
    path = tmp_path_factory.getbasetemp() / "layers.yml"
    path.write_text(text)
    again = read_mergekit(path).merge
    first, second = values_of(merge, num_layers=NUM_LAYERS), values_of(again, num_layers=NUM_LAYERS)
    for name in NAMES:
        assert first(name)["weight"] == pytest.approx(second(name)["weight"], abs=1e-12)


def test_a_gradient_of_whole_numbers_that_passes_others_is_refused() -> None:
    body = {"method": "karcher", "models": {"a": {"path": "a"}}, "parameters": {"max_iter": [1, 4]}}
    values = values_of(Merge.model_validate(body), num_layers=NUM_LAYERS)
    assert values(NAMES[0])["max_iter"] == 1
    with pytest.raises(DataError, match=r"max_iter: 1.75 for model.layers.1.* whole numbers only"):
        values("model.layers.1.mlp.down_proj.weight")


def test_embeddings_count_to_the_first_layer_and_the_head_to_the_last() -> None:
    setting = ({"value": 0.1, "layers": (0, 1)}, {"value": 0.9, "layers": (1, NUM_LAYERS)})
    values = [resolve(setting, place_of(name, num_layers=NUM_LAYERS)) for name in NAMES]
    assert values == [0.1] * 4 + [0.9] * 14


def test_a_tensor_that_no_entry_fits_is_named() -> None:
    merge = Merge.model_validate(
        {
            "method": "slerp",
            "models": {"a": {"path": "a"}},
            "parameters": {"t": ({"value": 0.5, "filter": "mlp"},)},
        }
    )
    with pytest.raises(
        DataError, match=r"merge.parameters.t: no entry fits model.norm.weight; add"
    ):
        values_of(merge, num_layers=NUM_LAYERS)("model.norm.weight")


WRONG = {
    "unknown: 1\nmerge_method: slerp": "unknown key unknown",
    "merge_method: slerp\nbase_model: b\nmodels: [{model: a}]": "parameters.t: needs a value",
    "merge_method: slerp\nmodels: [{model: a, weight: 1}]": "a model: unknown key weight",
    "merge_method: nothing\nmodels: [{model: a}]": "method: allowed: linear",
    "merge_method: linear": "give models or slices",
    "merge_method: linear\nmodels: [{model: a+b}]": "models with adapters are mergekit's alone",
    "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}, "
    "{sources: [{model: a, layer_range: [1, 3]}]}]": "slices[1]: moves layers about",
    "merge_method: linear\ntokenizer_source: union\nmodels: [{model: a}]": "tokenizer_source is",
    "a: *x": "found undefined alias",
    "merge_method: [": "expected the node content",
    "- 1": "must be keys with values",
    "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n"
    "parameters: {weight: 1, density: 2}": "parameters.density: must be from 0 to 1",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: WRONG[text])
def test_what_a_file_may_not_say_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_mergekit(path)
    (line,) = caught.value.lines
    assert line.startswith(str(path)) and WRONG[text] in line


def test_breadcrumbs_has_the_density_of_whoever_left_it_out(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    models = "base_model: b\nmodels: [{model: a}]\nparameters: {weight: 1}"
    path.write_text(f"merge_method: breadcrumbs\n{models}")
    assert read_mergekit(path).merge.parameters["density"] == 1.0
    ours = Merge.model_validate(
        {"method": "breadcrumbs", "models": {"a": {"path": "a"}}, "parameters": {"weight": 1.0}}
    )
    text = write_mergekit(
        ours, base=Path("b"), models={"a": Path("a")}, num_layers=2, dtype="float32"
    )
    assert yaml.safe_load(text)["parameters"]["density"] == 0.9


# --- mergekit's defaults --------------------------------------------------------------------------


def test_no_default_but_the_density_of_breadcrumbs_is_not_mergekits() -> None:
    from mergekit.merge_methods import registered_methods

    specs = {method.spec.name: method.spec for method in registered_methods()}
    differ, none_of_ours = set(), set()
    for name in METHODS.keys() & specs.keys():
        ours = {own.name: own for own in METHODS[name].parameters}
        for theirs_ in specs[name].parameters:
            if theirs_.name not in ours:
                none_of_ours.add((name, theirs_.name))
                continue
            own = ours[theirs_.name]
            assert own.is_switch == (theirs_.value_type is bool)
            if own.default != (None if theirs_.required else theirs_.default):
                differ.add((name, own.name))
    assert differ == {("breadcrumbs", "density"), ("breadcrumbs_ties", "density")}
    assert {parameter for _, parameter in none_of_ours} == {
        "eps",
        "int8_mask",
        "rescale",
        "density",
    }
    rest = {method for method, parameter in none_of_ours if parameter in ("rescale", "density")}
    assert rest == {"task_arithmetic"}  # where mergekit makes nothing of them


filtered = st.lists(
    st.fixed_dictionaries({"value": plain, "filter": filters}), min_size=1, max_size=2
).map(tuple)
partial = st.one_of(st.none(), plain, filtered)


def crumbs_of(density: Any, own: Any) -> Merge:
    """Of models `a` and `b`; what is None is left out."""
    return Merge.model_validate(
        {
            "method": "breadcrumbs",
            "base": "x/base",
            "models": {
                "a": {"path": "x/a", "parameters": {} if own is None else {"density": own}},
                "b": {"path": "x/b"},
            },
            "parameters": {"weight": 0.5} | ({} if density is None else {"density": density}),
        }
    )


@given(density=partial, own=partial)
@settings(max_examples=100, deadline=None)
def test_a_file_of_mergekits_has_mergekits_density_where_no_entry_fits(
    folders: dict[str, Path], density: Any, own: Any
) -> None:
    models: list[dict[str, Any]] = [{"model": str(folders[name])} for name in ("a", "b")]
    if own is not None:
        models[0]["parameters"] = {"density": own}
    body = {
        "merge_method": "breadcrumbs",
        "base_model": str(folders["base"]),
        "models": models,
        "parameters": {"weight": 0.5} | ({} if density is None else {"density": density}),
    }
    path = folders["base"].parent / "theirs.yml"
    path.write_text(text := json.dumps(body))
    ours = values_of(read_mergekit(path).merge, num_layers=NUM_LAYERS)
    assert_alike(ours, text, folders)


def assert_alike(ours: Any, text: str, folders: dict[str, Path]) -> None:
    """All that mergekit resolves for `a` and `b` from a text is what we do."""
    with pytest.MonkeyPatch.context() as patch:
        resolved = theirs(text, folders, patch)
    for name in NAMES:
        shared, by_folder = resolved[name]
        expected = [by_folder[str(folders[model])]["density"] for model in ("a", "b")]
        assert ours(name)["density"] == pytest.approx(tuple(expected), abs=1e-12)
        assert ours(name)["normalize"] is shared["normalize"]


within = st.tuples(st.integers(0, NUM_LAYERS), st.integers(0, NUM_LAYERS)).filter(
    lambda two: two[0] < two[1]
)
layered_partial = st.lists(
    st.fixed_dictionaries({"value": plain}, optional={"filter": filters, "layers": within}),
    min_size=1,
    max_size=3,
).map(tuple)
some_layers = st.just(({"filter": "mlp", "layers": (0, 2), "value": 0.3},))


@given(
    density=st.one_of(some_layers, partial, layered_partial),
    own=st.one_of(some_layers, partial, layered_partial),
)
@settings(max_examples=150, deadline=None)
def test_our_density_is_written_where_no_entry_fits(
    folders: dict[str, Path], density: Any, own: Any
) -> None:
    merge = crumbs_of(density, own)
    ours = values_of(merge, num_layers=NUM_LAYERS)
    text = crumbs_text(merge, folders)
    assert_alike(ours, text, folders)
    path = folders["base"].parent / "ours.yml"
    path.write_text(text)
    again = read_mergekit(path).merge
    second = values_of(again, num_layers=NUM_LAYERS)
    for name in NAMES:
        assert ours(name)["density"] == pytest.approx(second(name)["density"], abs=1e-12)


def crumbs_text(merge: Merge, folders: dict[str, Path]) -> str:
    return write_mergekit(
        merge,
        base=folders["base"],
        models={name: folders[name] for name in ("a", "b")},
        num_layers=NUM_LAYERS,
        dtype="float32",
    )


def test_our_density_is_nine_tenths_and_a_recipe_is_written_alike_twice(
    folders: dict[str, Path],
) -> None:
    merge = crumbs_of(({"filter": "mlp", "layers": (0, 2), "value": 0.3},), None)
    text = crumbs_text(merge, folders)
    ours = values_of(merge, num_layers=NUM_LAYERS)
    assert ours("model.layers.1.mlp.down_proj.weight")["density"] == (0.3, 0.3)
    assert ours("model.layers.2.mlp.down_proj.weight")["density"] == (0.9, 0.9)
    slices = yaml.safe_load(text)["slices"]
    written = [one["parameters"]["density"] for one in slices]
    assert written == [[{"value": 0.3, "filter": "mlp"}, {"value": 0.9}], 0.9]
    path = folders["base"].parent / "ours.yml"
    path.write_text(text)
    assert crumbs_text(read_mergekit(path).merge, folders) == text


# --- switches -------------------------------------------------------------------------------------

bits = st.sampled_from([0, 1, 0.0, 1.0, False, True])
switches = st.one_of(
    bits,
    st.lists(bits, min_size=1, max_size=4),
    st.lists(
        st.fixed_dictionaries(
            {"value": bits | st.lists(bits, min_size=1, max_size=3)}, optional={"filter": filters}
        ),
        min_size=1,
        max_size=3,
    ),
)


@given(switch=switches)
@settings(max_examples=100, deadline=None)
def test_a_switch_may_be_0_or_1_as_in_mergekit(folders: dict[str, Path], switch: Any) -> None:
    body = {
        "merge_method": "breadcrumbs_ties",
        "base_model": str(folders["base"]),
        "models": [{"model": str(folders[name])} for name in ("a", "b")],
        "parameters": {"weight": 0.5, "density": 0.5, "normalize": switch},
    }
    path = folders["base"].parent / "switch.yml"
    path.write_text(text := json.dumps(body))
    merge = read_mergekit(path).merge
    ours = values_of(merge, num_layers=NUM_LAYERS)
    assert_alike(ours, text, folders)
    assert_alike(ours, crumbs_text(merge, folders), folders)
    assert merge == Merge.model_validate_json(merge.model_dump_json())


@pytest.mark.parametrize("wrong", [2, 0.5, -1, "a", [0, 2], [{"value": 2}], [{"filter": "mlp"}]])
def test_a_switch_is_nothing_else(wrong: Any) -> None:
    models = {"a": {"path": "a"}}
    body = {"method": "ties", "models": models, "parameters": {"weight": 1, "normalize": wrong}}
    with pytest.raises(ValidationError, match="normalize"):
        Merge.model_validate(body)


def test_only_switches_may_be_told_as_such() -> None:
    for wrong in (True, [True, False]):
        body = {"method": "ties", "models": {"a": {"path": "a"}}, "parameters": {"weight": wrong}}
        with pytest.raises(ValidationError, match="weight: must be a number"):
            Merge.model_validate(body)

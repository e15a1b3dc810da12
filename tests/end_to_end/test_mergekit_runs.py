"""Merges with mergekit's YAML and by mergekit: types, layers, keys that are refused, full disks."""

import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from end_to_end.tiny_merge import Models, looks_like_a_model, plain, run_of, same, write_models
from end_to_end.tiny_merge import tensors as tensors_of_run
from end_to_end.tiny_run import Place, one_line, weights
from small_checkpoints import Tensors, change_json, change_tensors

NORM = "model.norm.weight"
FILE = ["stage=merge", "merge=mergekit"]
BY_MERGEKIT = "merge.backend=mergekit"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


def _halve(own: Tensors, *, but: str = "") -> None:
    own |= {n: t if n == but else t.to(torch.bfloat16) for n, t in own.items()}


def halves(models: Models, place: Path, *, but: str = "", key: str | None = None) -> Models:
    """The models in bfloat16 but for one tensor; what their configs say of it stands in `key`."""
    found = plain(models, place)
    for folder in found:
        change_tensors(folder, partial(_halve, but=but))
        said = {"dtype": None, "torch_dtype": None} | ({key: "bfloat16"} if key else {})
        change_json(folder / "config.json", **said)
    return found


def dtypes(run_dir: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors_of_run(run_dir).values()}


# --- the type of the weights ----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_the_type_is_that_of_the_weights_whatever_the_config_calls_it(
    key: str | None, near: Place, models: Models, tmp_path: Path
) -> None:
    theirs = halves(models, tmp_path / "theirs", key=key)
    command = theirs.slerp(f"merge.base={theirs.base}", "merge.parameters.t=0.25")
    ours = run_of(near, command).run_dir
    assert dtypes(ours) == {torch.bfloat16}
    recipe = ours / "merge.yml"
    assert yaml.safe_load(recipe.read_text())["out_dtype"] == "bfloat16"
    assert near.run(*FILE, f"merge.config={recipe}", "name=again").code == 0
    assert weights(near.runs / "merge" / "again") == weights(ours)
    ended = near.run(*command, BY_MERGEKIT, "name=mergekit")
    assert ended.code == 0 and "torch_dtype" not in ended.err, ended
    assert "note " not in ended.out  # it computes in float32, too
    assert dtypes(near.runs / "merge" / "mergekit") == {torch.bfloat16}


def test_tensors_of_several_types_keep_them_when_the_recipe_is_merged_again(
    near: Place, models: Models, tmp_path: Path
) -> None:
    theirs = halves(models, tmp_path / "theirs", but=NORM, key="dtype")
    command = theirs.slerp(f"merge.base={theirs.base}", "merge.parameters.t=0.25")
    ours = run_of(near, command).run_dir
    assert dtypes(ours) == {torch.bfloat16, torch.float32}
    recipe = ours / "merge.yml"
    assert recipe.read_text().startswith("# mediphi: semantics=mergekit seed=0 dtypes=own\n")
    assert near.run(*FILE, f"merge.config={recipe}", "name=again").code == 0
    assert weights(near.runs / "merge" / "again") == weights(ours)
    assert (near.runs / "merge" / "again" / "merge.yml").read_text() == recipe.read_text()
    chosen = [f"merge.config={recipe}", "merge.dtype=bfloat16", "name=chosen"]
    assert near.run(*FILE, *chosen).code == 0
    assert dtypes(near.runs / "merge" / "chosen") == {torch.bfloat16}
    assert "dtypes=own" not in (near.runs / "merge" / "chosen" / "merge.yml").read_text()


def test_a_type_that_mergekit_computes_in_is_told(near: Place, models: Models) -> None:
    recipe = near.folder / "recipe.yml"
    recipe.write_text(written(models, dtype="bfloat16"))
    ended = near.run(*FILE, f"merge.config={recipe}", BY_MERGEKIT)
    assert ended.code == 0, ended
    (note,) = [line for line in ended.out.splitlines() if line.startswith("note ")]
    assert "mergekit computes in bfloat16, merge.backend=mediphi in float32" in note
    assert "torch_dtype" not in ended.err, ended


def written(models: Models, **changes: object) -> str:
    body = {
        "merge_method": "slerp",
        "base_model": str(models.base / "model"),
        "models": [{"model": str(models.a / "model")}],
        "parameters": {"t": 0.25},
        "dtype": "float32",
    }
    return yaml.safe_dump(body | changes)


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mediphi", "mergekit"])
@pytest.mark.parametrize("more", [[], ["check_only=true"]], ids=["run", "plan"])
def test_layers_that_the_models_do_not_have_are_refused(
    more: list[str], backend: str, near: Place, models: Models
) -> None:
    setting = "merge.parameters.t=[{value:0.3,layers:[50,60]},{value:0.1}]"
    ended = near.run(*models.slerp(setting, f"merge.backend={backend}", *more))
    assert ended.code == 2
    said = one_line(ended)
    assert "merge.parameters.t: layers=[50, 60]: the models have 1 layers; allowed: " in said
    assert "end up to 1" in said and not near.runs.exists()


def test_layers_that_are_all_layers_are_the_same_by_all(near: Place, models: Models) -> None:
    setting = "merge.parameters.t=[{value:0.3,layers:[0,1],filter:mlp},{value:0.1}]"
    ours = run_of(near, models.slerp(setting)).run_dir
    recipe = ours / "merge.yml"
    assert "layers" not in yaml.safe_load(recipe.read_text())["parameters"]["t"][0]
    assert near.run(*FILE, f"merge.config={recipe}", "name=again").code == 0
    assert weights(near.runs / "merge" / "again") == weights(ours)
    assert near.run(*models.slerp(setting, BY_MERGEKIT, "name=mergekit")).code == 0
    theirs, merged = tensors_of_run(near.runs / "merge" / "mergekit"), tensors_of_run(ours)
    for name, tensor in merged.items():  # 0.1 and 0.3 are farther apart than roundings
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)


# --- defaults, switches, folders ------------------------------------------------------------------


def test_a_density_of_some_tensors_is_the_same_by_all(near: Place, models: Models) -> None:
    """Of the others it is ours, which is not mergekit's."""
    command = models.crumbs("merge.parameters.density=[{filter:mlp,layers:[0,1],value:0.3}]")
    ours = run_of(near, command).run_dir
    assert near.run(*command, BY_MERGEKIT, "name=mergekit").code == 0
    assert same(tensors_of_run(near.runs / "merge" / "mergekit"), tensors_of_run(ours))
    recipe = ours / "merge.yml"
    assert near.run(*FILE, f"merge.config={recipe}", "name=again").code == 0
    assert weights(near.runs / "merge" / "again") == weights(ours)
    assert (near.runs / "merge" / "again" / "merge.yml").read_text() == recipe.read_text()
    stated = models.crumbs("merge.parameters.density=[{filter:mlp,value:0.3},{value:0.9}]")
    assert near.run(*stated, "name=stated").code == 0
    assert weights(near.runs / "merge" / "stated") == weights(ours)


@pytest.mark.parametrize(("told", "meant"), [("0", "false"), ("[1,0]", "true")])
def test_a_switch_may_be_told_as_a_number(
    told: str, meant: str, near: Place, models: Models
) -> None:
    """The models have one layer: it gets the last of a list, and all else the first."""

    def merged(value: str, name: str, *more: str) -> Tensors:
        values = [f"merge.parameters.normalize={value}", "merge.parameters.weight=0.7"]
        assert near.run(*models.crumbs(*values, f"name={name}", *more)).code == 0
        return tensors_of_run(near.runs / "merge" / name)

    number, word = merged(told, "number"), merged(meant, "word")
    alike = [name for name in number if torch.equal(number[name], word[name])]
    outside = [name for name in number if "layers." not in name]
    assert alike == (outside if told == "[1,0]" else list(number))
    assert same(number, merged(told, "mergekit", BY_MERGEKIT))


def test_a_recipe_does_not_depend_on_the_working_directory(near: Place, models: Models) -> None:
    near.cwd.mkdir(parents=True, exist_ok=True)
    (near.cwd / "expert").symlink_to(models.a / "model")
    base = os.path.relpath(models.base, near.cwd)
    command = ["stage=merge", "merge=slerp", "merge.models.a.path=expert", f"merge.base={base}"]
    ours = run_of(near, [*command, "merge.parameters.t=0.25"]).run_dir
    recipe = yaml.safe_load((ours / "merge.yml").read_text())
    assert recipe["base_model"] == str(models.base / "model")
    assert [own["model"] for own in recipe["models"]] == [str(models.a / "model")]
    assert str(models.a) not in (ours / "README.md").read_text()


def test_a_folder_stands_in_a_merge_once(near: Place, models: Models) -> None:
    near.cwd.mkdir(parents=True, exist_ok=True)
    (near.cwd / "link").symlink_to(models.a)
    base = f"merge.base={models.base}"
    for again, by in ((f"{models.a}/", []), ("link", [BY_MERGEKIT])):
        said = one_line(near.run(*models.crumbs(base, f"merge.models.b.path={again}", *by)))
        assert said.endswith(f"models a and b are one folder, {models.a}/model: leave one out")
    said = one_line(near.run(*models.crumbs(base, f"merge.models.b.path={models.base}/model")))
    assert said.endswith(f"model b is the base itself, {models.base}/model: leave it out")
    assert not near.runs.exists()
    start = f"merge.models.start.path={models.base}"  # of a method that begins nowhere
    command = ["stage=merge", "merge=linear", *models.of("a"), start, "merge.parameters.weight=1"]
    assert near.run(*command).code == 0


# --- what is refused, and a full disk -------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["check_only=true"]], ids=["run", "plan"])
def test_a_key_that_mergekit_passes_over_is_refused_before_the_run(
    more: list[str], near: Place, models: Models
) -> None:
    recipe = near.folder / "recipe.yml"
    recipe.write_text(written(models, parameters={"t": [{"value": 0.9, "filtr": "mlp"}]}))
    ended = near.run(*FILE, f"merge.config={recipe}", BY_MERGEKIT, *more)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "parameters.t[0]: unknown key 'filtr'; allowed: value, filter" in ended.err
    assert not near.runs.exists()


def test_a_parameter_of_a_method_that_mergekit_alone_has_is_judged_too(
    near: Place, models: Models
) -> None:
    method = ["merge=mergekit", "merge.config=null", "++merge.method=nuslerp", BY_MERGEKIT]
    base = f"merge.base={models.base}"
    command = ["stage=merge", *method, *models.of(), base, "+merge.parameters.weigth=0.5"]
    ended = near.run(*command, "check_only=true")
    assert ended.code == 2, ended
    assert "unknown parameter of nuslerp 'weigth'" in ended.err, ended
    assert "did you mean weight?" in ended.err, ended


def _small_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [2**16, 2**19])
def test_a_full_disk_is_one_line_and_the_same_command_ends_well(
    size: int, near: Place, models: Models
) -> None:
    command = models.slerp("merge.parameters.t=0.25", BY_MERGEKIT)
    ended = near.run(*command, limit=partial(_small_files, size))
    assert ended.code == 1, ended
    said = one_line(ended)
    assert "disk full: " in said and str(near.runs) in said and "make room and run again" in said
    assert not (near.run_dir("merge") / "model").exists()
    assert near.run(*command).code == 0
    assert looks_like_a_model(near.run_dir("merge") / "model")

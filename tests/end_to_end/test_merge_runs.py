"""Merges by the command: whole artifacts, inputs that are refused, and runs that were killed."""

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from end_to_end.test_run import composed, last_words
from end_to_end.tiny_merge import (
    Finished,
    Models,
    die_at,
    looks_like_a_model,
    plain,
    published,
    run_of,
    same,
    slowly,
    tensors,
    write_models,
)
from end_to_end.tiny_run import CODES, DAPT, Ended, Place, files_in, one_line, wait_for, weights
from small_checkpoints import INDEX, change_json, change_tensors, copied, into_shards

from mediphi.artifacts import manifest_hash, verify

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def crumbs(tmp_path_factory: pytest.TempPathFactory, models: Models, shared: Place) -> Finished:
    """An undisturbed run of BreadCrumbs; its base stands in the experts' manifests."""
    folder = tmp_path_factory.mktemp("crumbs")
    return run_of(Place(folder, folder / "cache", shared.assets), models.crumbs())


# --- what comes out -------------------------------------------------------------------------------


def test_a_merge_is_an_artifact_with_its_parents_and_recipe(
    crumbs: Finished, models: Models
) -> None:
    manifest = verify(crumbs.run_dir)
    hashes = {name: manifest_hash(path) for name, path in models._asdict().items()}
    assert {name: own["sha256"] for name, own in manifest["parents"].items()} == hashes
    assert manifest["data"]["licences"].keys() == {"corpus a", "corpus b"}
    files = {"README.md", "config.yaml", "data.json", "merge.yml", "metrics.json"}
    assert {name for name in manifest["files"] if "/" not in name} == files
    recipe = yaml.safe_load((crumbs.run_dir / "merge.yml").read_text())
    assert recipe["merge_method"] == "breadcrumbs"
    assert recipe["base_model"] == str(models.base / "model")
    assert [own["model"] for own in recipe["models"]] == [
        str(path / "model") for path in (models.a, models.b)
    ]
    assert not (crumbs.run_dir / "checkpoints").exists()


def test_the_card_names_every_parent_its_hash_and_its_licences(
    crumbs: Finished, models: Models
) -> None:
    card = (crumbs.run_dir / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("---\n", 1)
    told = yaml.safe_load(front)
    assert told["base_model"] == ["base", "a", "b"]  # no hub knows them, and nobody our folders
    assert "license" not in told and "No licence is given to this model: base, a, b " in body
    for path in models:
        assert manifest_hash(path)[:16] in body
        assert str(path) not in card
    assert "| corpus a | CC0 | commercial use |" in body
    assert "| corpus b | CC-BY-SA-4.0 | commercial use, share alike |" in body
    recipe = (crumbs.run_dir / "merge.yml").read_text()
    for name, path in models._asdict().items():
        recipe = recipe.replace(str(path / "model"), name)
    assert recipe in body
    assert "None" not in card


def test_the_card_has_the_licence_that_all_state(
    near: Place, models: Models, tmp_path: Path
) -> None:
    theirs = plain(models, tmp_path)
    for place, name in zip(theirs, ("mit", "mit", "apache-2.0"), strict=True):
        (place / "README.md").write_text(f"---\nlicense: {name}\nbase_model: owner/phi\n---\n")
    for command in (theirs.slerp("name=slerp"), theirs.crumbs("name=crumbs")):
        assert near.run(*command, f"merge.base={theirs.base}").code == 0
    folders = [near.runs / "merge" / name for name in ("slerp", "crumbs")]
    cards = [(folder / "README.md").read_text() for folder in folders]
    fronts = [yaml.safe_load(card.split("---\n")[1]) for card in cards]
    assert [front["license"] for front in fronts] == ["mit", "other"]
    assert all(front["base_model"] == ["owner/phi"] for front in fronts)
    assert "| b | apache-2.0 |" in cards[1] and "They differ" in cards[1]


def test_the_last_lines_name_path_hash_and_next_command(crumbs: Finished) -> None:
    words = last_words(crumbs.ended)
    assert list(words) == ["done", "model", "sha256", "next"]
    assert words["done"] == f"{crumbs.run_dir}  (merge.yml, README.md)"
    assert words["sha256"] == manifest_hash(crumbs.run_dir)
    config = composed(words["next"])
    assert config.stage.kind == "sft" and config.model.path == str(crumbs.run_dir)


def test_the_real_program_needs_no_server_and_no_gpu(near: Place, models: Models) -> None:
    ended = near.program(*models.slerp("merge.parameters.t=0.25")).wait()
    assert (ended.code, ended.err) == (0, "")
    run_dir = near.run_dir("merge")
    verify(run_dir)
    base, expert = tensors(models.base), tensors(models.a)
    for name, merged in tensors(run_dir).items():
        assert not torch.equal(merged, base[name])
        assert (merged - base[name]).norm() < (merged - expert[name]).norm()


def test_folders_of_others_are_merged_too_and_their_licence_is_unknown(
    near: Place, models: Models, crumbs: Finished, tmp_path: Path
) -> None:
    theirs = plain(models, tmp_path)
    run = run_of(near, theirs.crumbs(f"merge.base={theirs.base}"))
    assert verify(run.run_dir)["parents"] == {}
    assert (run.run_dir / "README.md").read_text().count("licence unknown") == 4
    assert (run.run_dir / "README.md").read_text().count(" of its files, sampled") == 3
    assert weights(run.run_dir) == weights(crumbs.run_dir)


def test_the_same_command_again_only_announces(
    near: Place, models: Models, crumbs: Finished
) -> None:
    before = files_in(crumbs.run_dir)
    near.folder = crumbs.run_dir.parents[2]
    ended = near.run(*crumbs.command)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out and crumbs.ended.out.endswith(ended.out)
    assert files_in(crumbs.run_dir) == before


def test_check_only_prints_the_plan_and_leaves_nothing(near: Place, models: Models) -> None:
    ended = near.run(*models.crumbs("check_only=true"))
    assert ended.code == 0, ended
    words = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert list(words) == ["method", "base", "a", "b", "tensors", "disk"]
    assert words["base"] == f"{models.base / 'model'}  (manifest checked)"
    assert not near.runs.exists()


# --- the base, found ------------------------------------------------------------------------------


def test_experts_of_two_bases_need_one_named(near: Place, models: Models, tmp_path: Path) -> None:
    other = write_models(tmp_path / "other")
    change_tensors(other.base / "model", lambda own: own[NORM].add_(1))
    published(other.base)
    ended = near.run(*models.crumbs(f"merge.models.b.path={crumb_of(other, tmp_path)}"))
    assert ended.code == 2
    assert one_line(ended) == (
        "error: merge.base=null: the models were made from different ones; give "
        "merge.base=RUN_DIRECTORY_OR_FOLDER"
    )
    assert not near.runs.exists()


def crumb_of(models: Models, place: Path) -> Path:
    """An expert whose manifest names the base as it is now."""
    from mediphi.artifacts import Parent

    folder = Path(shutil.copytree(models.b, place / "expert"))
    parent = {"model": Parent(str(models.base), manifest_hash(models.base))}
    return published(folder, parents=parent)


def test_a_folder_that_names_no_base_needs_one(near: Place, models: Models, tmp_path: Path) -> None:
    theirs = plain(models, tmp_path)
    ended = near.run(*theirs.slerp())
    assert ended.code == 2
    assert "a's folder does not name the model it was made from" in one_line(ended)


def test_a_base_that_was_made_anew_since_is_refused(near: Place, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    change_tensors(models.base / "model", lambda own: own[NORM].add_(1))
    published(models.base)
    ended = near.run(*models.slerp())
    assert ended.code == 2
    assert f"{models.base}: not what the models were made from any more" in one_line(ended)


@pytest.mark.slow
def test_experts_trained_by_the_real_command_find_their_base(
    place: Place, finished: tuple[Path, Ended]
) -> None:
    """DAPT twice from one model, and their mean deltas on top of it."""
    experts = []
    for seed in (1, 2):
        options = ["model.init=pretrained", f"model.path={finished[0]}", f"seed={seed}"]
        ended = place.run(*DAPT, *CODES, *options, f"name=expert{seed}")
        assert ended.code == 0, ended
        experts.append(place.runs / "dapt" / f"expert{seed}")
    named = [f"merge.models.e{n}.path={path}" for n, path in enumerate(experts)]
    ended = place.run("stage=merge", "merge=task_arithmetic", *named)
    assert ended.code == 0, ended
    manifest = verify(place.run_dir("merge"))
    assert manifest["parents"]["base"]["path"] == str(finished[0] / "model")
    assert manifest["parents"].keys() == {"base", "e0", "e1"}


# --- parents that change --------------------------------------------------------------------------


def change(run_dir: Path) -> None:
    """Another model of the same name, published."""
    folder = run_dir / "model" if (run_dir / "model").exists() else run_dir
    change_tensors(folder, lambda own: own[NORM].add_(1))
    if run_dir != folder:
        published(run_dir)


@pytest.mark.parametrize("vouched", [True, False], ids=["artifact", "plain"])
@pytest.mark.parametrize("ends", [True, False], ids=["finished", "killed"])
def test_a_parent_that_changed_is_refused(
    ends: bool, vouched: bool, near: Place, tmp_path: Path
) -> None:
    models = write_models(tmp_path / "models")
    own = models if vouched else plain(models, tmp_path / "plain")
    command = own.slerp(f"merge.base={own.base}")
    ended = near.run(*command, limit=None if ends else _die_before_publishing)
    assert ended.code == (0 if ends else -signal.SIGKILL)
    before = files_in(near.run_dir("merge") / "model")
    change(own.a)
    ended = near.run(*command)
    assert ended.code == 2
    said = one_line(ended)
    assert f"the model a at {own.a} changed since this run began" in said
    assert "on_existing=overwrite" in said
    assert files_in(near.run_dir("merge") / "model") == before
    assert near.run(*command, "on_existing=overwrite").code == 0


def _die_before_publishing() -> None:
    import mediphi.merging

    mediphi.merging.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


# --- mergekit -------------------------------------------------------------------------------------


def test_the_recipe_of_a_run_gives_the_same_model_again(near: Place, crumbs: Finished) -> None:
    recipe = Path(shutil.copy(crumbs.run_dir / "merge.yml", near.folder / "recipe.yml"))
    command = ["stage=merge", "merge=mergekit", f"merge.config={recipe}"]
    run = run_of(near, command)
    assert weights(run.run_dir) == weights(crumbs.run_dir)
    assert (run.run_dir / "merge.yml").read_text() == recipe.read_text()
    recipe.write_text(recipe.read_text().replace("gamma: 0.01", "gamma: 0.02"))
    ended = near.run(*command)
    assert ended.code == 2
    assert f"the merge.config at {recipe} changed since this run began" in one_line(ended)
    recipe.unlink()
    assert near.run(*command).code == 0  # it still stands


@pytest.mark.parametrize("method", ["breadcrumbs", "ties"])
def test_mergekit_gives_the_same_numbers(method: str, near: Place, models: Models) -> None:
    """Bitwise in float32: the arithmetic is the same."""
    command = [argument.replace("breadcrumbs", method) for argument in models.crumbs()]
    ours = run_of(near, command).run_dir
    theirs = Place(near.folder / "theirs", near.cache, near.assets)
    ended = theirs.run(*command, "merge.backend=mergekit")
    assert ended.code == 0, ended
    run_dir = theirs.run_dir("merge")
    assert same(tensors(ours), tensors(run_dir))
    assert verify(run_dir)["parents"].keys() == {"base", "a", "b"}


def test_a_file_for_mergekit_alone_has_a_card_too(near: Place, models: Models) -> None:
    """A method that only mergekit has."""
    body = {
        "merge_method": "nuslerp",
        "base_model": str(models.base / "model"),
        "models": [
            {"model": str(own / "model"), "parameters": {"weight": 0.5}}
            for own in (models.a, models.b)
        ],
        "dtype": "float32",
    }
    recipe = near.folder / "recipe.yml"
    recipe.write_text(yaml.safe_dump(body))
    command = ["stage=merge", "merge=mergekit", f"merge.config={recipe}", "merge.backend=mergekit"]
    planned = near.run(*command, "check_only=true")
    assert planned.code == 0 and "by mergekit" in planned.out, planned
    assert not near.runs.exists()
    run = run_of(near, command)
    card = (run.run_dir / "README.md").read_text()
    assert "# nuslerp of " in card and "None" not in card and "| method | nuslerp |" in card
    assert len(verify(run.run_dir)["parents"]) == 3


def test_a_run_by_mergekit_killed_before_its_manifest_is_made_anew(
    near: Place, models: Models
) -> None:
    command = models.slerp("merge.parameters.t=0.25", "merge.backend=mergekit")
    assert near.run(*command, limit=_die_before_publishing).code == -signal.SIGKILL
    before = tensors(near.run_dir("merge"))
    ended = near.run(*command)
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended
    verify(near.run_dir("merge"))
    assert same(tensors(near.run_dir("merge")), before)


def test_the_recipe_of_a_run_in_a_papers_reading_gives_the_same_model(
    near: Place, models: Models
) -> None:
    """Signs elected by the paper's rule, and random masks: the file's first line knows both."""
    experts = [f"{own}.parameters.weight={value}" for own, value in _weights()]
    method = ["merge=dare_ties", "merge.parameters.density=0.5", "merge.semantics=paper", "seed=3"]
    command = ["stage=merge", *models.of(), *method, *experts, *models.slerp()[3:]]
    run = run_of(near, command)
    text = (run.run_dir / "merge.yml").read_text()
    assert text.startswith("# mediphi: semantics=paper seed=3 (mergekit would give other weights")
    assert "| seed | 3 |" in (run.run_dir / "README.md").read_text()
    recipe = near.folder / "recipe.yml"
    recipe.write_text(text)
    again = ["stage=merge", "merge=mergekit", f"merge.config={recipe}", "name=again"]
    assert near.run(*again, "merge.backend=mergekit").code == 2
    assert near.run(*again).code == 0
    there = near.runs / "merge" / "again"
    assert weights(there) == weights(run.run_dir)
    assert (there / "merge.yml").read_text() == text
    recipe.write_text(text.partition("\n")[2])  # without the line it is another model
    assert near.run(*again, "on_existing=overwrite").code == 0
    assert weights(there) != weights(run.run_dir)


def _weights() -> list[tuple[str, float]]:
    return [("merge.models.a", 0.8), ("merge.models.b", 0.4)]


@pytest.mark.parametrize("backend", ["mediphi", "mergekit"])
def test_a_uniform_soup_is_merged_by_both(backend: str, near: Place, models: Models) -> None:
    command = ["stage=merge", "merge=uniform_soup", *models.of(), f"merge.backend={backend}"]
    run = run_of(near, command)
    a, b = tensors(models.a), tensors(models.b)
    for name, merged in tensors(run.run_dir).items():
        torch.testing.assert_close(merged, (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
    assert yaml.safe_load((run.run_dir / "merge.yml").read_text())["merge_method"] == "linear"


@pytest.mark.parametrize("backend", ["mediphi", "mergekit"])
def test_a_recipe_that_is_not_there(backend: str, near: Place) -> None:
    ended = near.run(
        "stage=merge", "merge=mergekit", "merge.config=x.yml", f"merge.backend={backend}"
    )
    assert ended.code == 2
    assert "x.yml" in ended.err and "No such file" in ended.err
    assert "Traceback" not in ended.err and not near.runs.exists()


# --- kills, signals, full disks -------------------------------------------------------------------


def nothing_half_done(run_dir: Path, whole: Finished) -> None:
    """No folder that can be loaded, or the whole one, for an instant under another name."""
    found = [path.parent for path in run_dir.rglob("config.json")]
    assert not (run_dir / "model").exists() or found == [run_dir / "model"]
    for folder in found:
        assert files_in(folder) == files_in(whole.run_dir / "model")


def kill_and_go_on(place: Place, whole: Finished, *, steps: list[int]) -> int:
    """Kill one attempt after another at these steps on disk, and let the last one end."""
    run_dir, died = place.runs / "merge" / whole.run_dir.name, 0
    for step in steps:
        ended = place.run(*whole.command, limit=partial(die_at, step, str(place.runs)))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended
        nothing_half_done(run_dir, whole)
        if (run_dir / "manifest.json").exists():  # nothing was left to do but to say so
            verify(run_dir)
        died += 1
    assert place.run(*whole.command).code == 0
    verify(run_dir)
    assert files_in(run_dir / "model") == files_in(whole.run_dir / "model")
    for name in ("merge.yml", "README.md", "metrics.json"):
        assert (run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()
    return died


def test_six_kills_change_nothing(near: Place, crumbs: Finished) -> None:
    steps = sorted(random.Random(1).sample(range(2, 30), 6))
    assert kill_and_go_on(near, crumbs, steps=steps) >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_any_step_changes_nothing(
    shared: Place, crumbs: Finished, tmp_path: Path
) -> None:
    died = 0
    for step in range(0, 200, 2):
        place = Place(tmp_path / str(step), shared.cache, shared.assets)
        if not kill_and_go_on(place, crumbs, steps=[step]):
            break
        died += 1
    assert 30 < died < 100


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_one_line_and_the_merge_goes_on(
    number: int, code: int, near: Place, crumbs: Finished
) -> None:
    run_dir = near.runs / "merge" / crumbs.run_dir.name
    journal = run_dir / "checkpoints" / "model" / "journal.jsonl"

    def begun() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") >= 3

    child = near.start(*crumbs.command, limit=slowly)
    assert wait_for(begun, child)
    child.send(number)
    ended = child.wait()
    assert ended.code == code, ended
    name = signal.Signals(number).name
    assert ended.err == f"stopped by {name}: the same command goes on from here\n"
    assert not looks_like_a_model(run_dir)
    done = journal.read_bytes().count(b"\n")
    assert done < len(tensors(crumbs.run_dir))
    assert near.run(*crumbs.command).code == 0
    assert files_in(run_dir / "model") == files_in(crumbs.run_dir / "model")


def _small_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [2**16, 2**19])
def test_a_full_disk_is_one_line_and_the_merge_goes_on(
    size: int, near: Place, crumbs: Finished
) -> None:
    """No room for the shard, or for no more than half of it."""
    ended = near.run(*crumbs.command, limit=partial(_small_files, size))
    assert ended.code == 1
    said = one_line(ended)
    assert str(near.runs) in said and "free" in said
    assert not looks_like_a_model(near.runs)
    assert near.run(*crumbs.command).code == 0
    assert weights(near.run_dir("merge")) == weights(crumbs.run_dir)


# --- inputs that are refused ----------------------------------------------------------------------


def _nan(folder: Path) -> None:
    change_tensors(folder, lambda own: own[NORM].__setitem__(-1, float("nan")))


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)


def _renamed(folder: Path) -> None:
    change_tensors(folder, lambda own: own.update({"model.other.weight": own.pop(NORM)}))


def _reshaped(folder: Path) -> None:
    change_tensors(folder, lambda own: own.update({NORM: own[NORM][:-1].clone()}))


def _other_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _larger_vocabulary(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=5000)


def _pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _opposite(folder: Path) -> None:
    change_tensors(folder, lambda own: own.update({NORM: -own[NORM]}))


def _outside(folder: Path) -> None:
    into_shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def _missing_shard(folder: Path) -> None:
    (into_shards(folder) / "model-b.safetensors").unlink()


REFUSED: list[tuple[Callable[[Path], object], list[str]]] = [
    (_nan, [f"tensor {NORM} holds numbers that are not finite"]),
    (_truncated, ["model.safetensors: damaged"]),
    (_renamed, ["tensor model."]),
    (_reshaped, [NORM, "[31]", "[32]"]),
    (_other_vocabulary, ["tokenizer"]),
    (_larger_vocabulary, ["vocab_size=5000", "4096"]),
    (_pickles, ["only pickles (pytorch_model.bin), which are refused"]),
    (_opposite, [f"tensor {NORM}: ", "opposite directions"]),
    (_outside, ["'../model-a.safetensors', outside of the folder"]),
    (_missing_shard, ["'model-b.safetensors' is named by its index but missing"]),
]


@pytest.mark.parametrize(("damage", "words"), REFUSED, ids=[d.__name__[1:] for d, _ in REFUSED])
def test_an_input_is_refused_in_one_line_and_nothing_stays(
    damage: Callable[[Path], object], words: list[str], near: Place, models: Models, tmp_path: Path
) -> None:
    theirs = plain(models, tmp_path / "theirs")
    if damage is _opposite:  # norms that are nearly ones stay so
        change_tensors(theirs.a, lambda own: own.update(tensors(models.base)))
    damage(theirs.a)
    ended = near.run(*theirs.slerp(f"merge.base={theirs.base}"))
    assert ended.code == 2
    said = one_line(ended)
    for word in [*words, str(theirs.a)] if damage is not _opposite else words:
        assert word in said, said
    assert not near.runs.exists()


def test_mergekits_result_that_is_not_finite_is_refused_and_nothing_stays(
    near: Place, models: Models, tmp_path: Path
) -> None:
    theirs = plain(models, tmp_path / "theirs")
    _nan(theirs.a)
    ended = near.run(*theirs.slerp(f"merge.base={theirs.base}", "merge.backend=mergekit"))
    assert ended.code == 2
    assert f"{theirs.a}: tensor {NORM} holds numbers that are not finite" in ended.err
    assert "Traceback" not in ended.err and not near.runs.exists()


@pytest.mark.parametrize("more", [[], ["check_only=true"]], ids=["run", "plan"])
def test_a_setting_that_fits_no_tensor_is_refused_before_the_run(
    more: list[str], near: Place, models: Models
) -> None:
    setting = "merge.parameters.t=[{filter:mlp,value:0.5}]"
    ended = near.run(*models.slerp(setting, *more))
    assert ended.code == 2
    assert "merge.parameters.t: no entry fits lm_head.weight" in one_line(ended)
    assert "run  " not in ended.out and not near.runs.exists()


def test_a_resumed_merge_that_is_refused_leaves_nothing_like_a_model(
    near: Place, models: Models, crumbs: Finished
) -> None:
    """Stopped half-way, and then an expert is damaged by a disk: its manifest knows."""
    run_dir = near.runs / "merge" / crumbs.run_dir.name
    limit = partial(die_at, 12, str(near.runs))
    assert near.run(*crumbs.command, limit=limit).code == -signal.SIGKILL
    shard = models.a / "model" / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        ended = near.run(*crumbs.command)
    finally:
        shard.write_bytes(whole)
    assert ended.code == 2
    assert f"{shard}: damaged: its hash is not the manifest's" in one_line(ended)
    assert not looks_like_a_model(run_dir)
    assert near.run(*crumbs.command).code == 0
    assert files_in(run_dir / "model") == files_in(crumbs.run_dir / "model")


def test_a_copy_is_a_model_of_its_own(near: Place, crumbs: Finished, tmp_path: Path) -> None:
    """A merged folder is itself merged again, by its path alone."""
    again = copied(crumbs.run_dir / "model", tmp_path / "again")
    command = ["stage=merge", "merge=uniform_soup", f"merge.models.one.path={crumbs.run_dir}"]
    run = run_of(near, [*command, f"merge.models.two.path={again}"])
    assert same(tensors(run.run_dir), tensors(crumbs.run_dir))

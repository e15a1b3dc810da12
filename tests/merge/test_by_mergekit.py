"""Around mergekit's own merge: stop ids, numbers that are not finite, what kills leave."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_merges
import pytest
import torch
import yaml
from small_checkpoints import change_json, change_tensors, copied, tensors_of, write_model

from mediphi.errors import ConfigError, UserError
from mediphi.merge.engine import MergeFacts

by_mergekit = pytest.importorskip("mediphi.merge.by_mergekit")
NORM = "model.norm.weight"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    first = write_model(tmp_path / "a", seed=1)
    return [first, write_model(tmp_path / "b", seed=2)]


def merged(models: list[Path], place: Path, **parameters: Any) -> MergeFacts:
    body = {
        "merge_method": "linear",
        "models": [{"model": str(one)} for one in models],
        "parameters": {"weight": 0.5, **parameters},
        "dtype": "float32",
    }
    return by_mergekit.merge_by_mergekit(
        yaml.safe_dump(body),
        scratch=place / "scratch",
        target=place / "model",
        seed=0,
        max_shard_bytes=10**9,
    )


def test_the_stop_ids_are_those_of_all_models(models: list[Path], tmp_path: Path) -> None:
    for number, model in enumerate(models, start=11):
        change_json(model / "generation_config.json", eos_token_id=number)
    facts = merged(models, tmp_path)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {11, 12} <= set(facts.stop_ids) == set(written["eos_token_id"])


def test_what_a_killed_attempt_has_published_is_made_anew(
    models: list[Path], tmp_path: Path
) -> None:
    merged(models, tmp_path)
    before = tensors_of(tmp_path / "model")
    change_tensors(tmp_path / "model", lambda own: own[NORM].zero_())
    (tmp_path / "model" / "left.txt").touch()
    merged(models, tmp_path)
    after = tensors_of(tmp_path / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "model" / "left.txt").exists()


def test_what_a_killed_attempt_has_left_goes_with_the_next_start(
    models: list[Path], tmp_path: Path
) -> None:
    partial = tmp_path / "scratch" / by_mergekit.PARTIAL
    (partial / "deeper").mkdir(parents=True)
    (partial / "model-00009-of-00009.safetensors").write_bytes(b"half")
    merged(models, tmp_path)
    left = {path.name for path in (tmp_path / "model").iterdir()}
    assert not {"deeper", "model-00009-of-00009.safetensors"} & left
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.slow
def test_kill_9_at_every_step_and_within_every_shard(models: list[Path], tmp_path: Path) -> None:
    """What is published is bitwise the undisturbed model, or not there; asserted in the program."""
    program = Path(killed_merges.__file__).with_name("killed_mergekit_merges.py")
    command = [sys.executable, program, *models, tmp_path]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=280, check=True)
    report = json.loads(done.stdout)
    states = report["states"]
    assert states["within: no model"] == report["num_shards"] == 3
    assert states["step: no model"] > 20 and states["not killed"] == 1
    assert states["step: whole"] >= 1 and states["over: whole"] >= 1 <= states["over: no model"]


def test_a_parent_that_is_not_finite_is_named_and_nothing_published(
    models: list[Path], tmp_path: Path
) -> None:
    bad = copied(models[1], tmp_path / "bad")
    change_tensors(bad, lambda own: own[NORM].__setitem__(3, float("nan")))
    with pytest.raises(UserError) as caught:
        merged([models[0], bad], tmp_path)
    assert str(caught.value).startswith(f"{bad}: tensor {NORM} holds numbers that are not finite")
    assert caught.value.exit_code == 2 and not (tmp_path / "model").exists()


def test_a_result_that_is_not_finite_is_named(models: list[Path], tmp_path: Path) -> None:
    for model in models:
        change_tensors(model, lambda own: own[NORM].fill_(3e38))
    with pytest.raises(UserError, match=f"tensor {NORM}: merged, it is not finite in float32"):
        merged(models, tmp_path, weight=1.0, normalize=False)
    assert not (tmp_path / "model").exists()


HEAD = "merge_method: ties\nbase_model: x\n"
MODELS = "models: [{model: x}, {model: y, parameters: {weight: 1, density: 0.5}}]\n"
SLICE = "{model: x, layer_range: [0, 1]}"
PASSED_OVER = {
    f"{HEAD}{MODELS}foo: 1": "unknown key 'foo'; allowed: modules, slices, models, ",
    f"{HEAD}{MODELS}dtyp: float32": "unknown key 'dtyp'; allowed: ",
    f"{HEAD}{MODELS}parameters: {{foo: 1}}": "parameters: unknown parameter of ties 'foo'; allowed",
    f"{HEAD}{MODELS}parameters: {{t: 1}}": "parameters: unknown parameter of ties 't'; allowed",
    f"{HEAD}{MODELS}parameters: {{weight: {{value: 1, filtr: mlp}}}}": (
        "parameters.weight: unknown key 'filtr'; allowed: value, filter; did you mean filter?"
    ),
    f"{HEAD}{MODELS}parameters: {{weight: [{{value: 1}}, {{value: 1, layers: [0, 1]}}]}}": (
        "parameters.weight[1]: unknown key 'layers'; allowed: value, filter"
    ),
    f"{HEAD}models: [{{model: x, weight: 1}}]": "models[0]: unknown key 'weight'; allowed: model, ",
    f"{HEAD}models: [{{model: x, parameters: {{wieght: 1}}}}]": (
        "models[0].parameters: unknown parameter of ties 'wieght'; allowed: weight, density"
    ),
    f"{HEAD}models: [{{model: x, parameters: {{normalize: true}}}}]": (
        "models[0].parameters.normalize: one for all models, not for one"
    ),
    f"{HEAD}slices: [{{sources: [{SLICE}], filter: a}}]": "slices[0]: unknown key 'filter'",
    f"{HEAD}slices: [{{sources: [{{model: x, layer_range: [0, 1], scale: 1}}]}}]": (
        "slices[0].sources[0]: unknown key 'scale'"
    ),
    f"{HEAD}modules: {{default: {{models: [{{model: x}}], foo: 1}}}}": (
        "modules.default: unknown key 'foo'"
    ),
    f"{HEAD}{MODELS}tokenizer: {{source: base, tokns: {{}}}}": "tokenizer: unknown key 'tokns'",
    f"merge_method: tie\n{MODELS}": "merge_method: unknown method 'tie'; allowed: multislerp, ",
}


@pytest.mark.parametrize("text", PASSED_OVER, ids=lambda text: PASSED_OVER[text][:50])
def test_what_mergekit_passes_over_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        by_mergekit.notes_on(text)
    (line,) = caught.value.lines
    assert line.startswith("merge.backend=mergekit: ") and PASSED_OVER[text] in line


def test_what_mergekit_reads_is_let_through() -> None:
    body = {
        "merge_method": "ties",
        "base_model": {"model": {"path": "x"}},
        "slices": [
            {
                "sources": [
                    {"model": "x", "layer_range": [0, 1]},
                    {"model": "y+z", "layer_range": [0, 1], "parameters": {"weight": [0, 1]}},
                ],
                "parameters": {"density": [{"value": 1, "filter": "mlp"}, {"value": "5e-1"}]},
                "base_model": "x",
            }
        ],
        "parameters": {"normalize": True, "int8_mask": True, "lambda": 1},
        "tokenizer": {"source": "union", "tokens": {"<a>": {"source": "x", "force": True}}},
        "chat_template": "auto",
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    assert by_mergekit.notes_on(yaml.safe_dump(body)) == ()


@pytest.mark.parametrize("dtype", ["", "dtype: bfloat16", "dtype: float32"])
def test_the_note_says_what_mergekit_computes_in(dtype: str) -> None:
    notes = by_mergekit.notes_on(f"{HEAD}{MODELS}{dtype}")
    words = ["in the models' own type", "in bfloat16"]
    assert [word for word in words if word in " ".join(notes)] == (
        [] if "float32" in dtype else [words["bfloat16" in dtype]]
    )
    assert len(notes) == ("float32" not in dtype)

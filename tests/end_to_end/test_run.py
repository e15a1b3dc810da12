"""A run from the command to the artifact, as a user sees it."""

import json
import shlex
from pathlib import Path

import pytest
from end_to_end.tiny_run import (
    CODES,
    DAPT,
    PIT,
    ROOT,
    STEPS,
    Ended,
    Place,
    curve,
    files_in,
    weights,
)

from mediphi.artifacts import manifest_hash, verify
from mediphi.config import load
from mediphi.config.schema import Config
from mediphi.door import forced
from mediphi.door.compose import compose, make_loader
from mediphi.door.files import tame_hydra

Finished = tuple[Path, Ended]


def last_words(ended: Ended) -> dict[str, str]:
    """First word and rest of the last four lines."""
    return dict(line.split(maxsplit=1) for line in ended.out.splitlines()[-4:])


def test_an_artifact_comes_out_whole(finished: Finished) -> None:
    run_dir, _ = finished
    manifest = verify(run_dir)
    assert {"report.html", "metrics.csv", "metrics.json", "README.md", "config.yaml"} <= set(
        manifest["files"]
    )
    counts = manifest["data"]["counts"]["icd10cm"]
    assert counts["train"] + counts["heldout"] == 40
    assert counts["read"] == counts["not_chosen"] + 40
    assert "public domain" in manifest["data"]["licences"]["icd10cm"]["id"]
    assert not list(run_dir.rglob(".*partial*"))
    assert not list(run_dir.rglob(".tmp-*"))


def test_a_stranger_loads_the_model_and_it_stops_at_every_stop_token(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = {"<|end|>", "<|assistant|>", "<|endoftext|>"}
    assert set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == stops
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does A00 mean?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert 0 < written.shape[1] - inputs["input_ids"].shape[1] <= 4


def test_the_curve_covers_both_phases_and_the_quiz(finished: Finished) -> None:
    rows = (finished[0] / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert header[:2] == ["step", "phase"]
    assert {row.split(",")[1] for row in rows[1:]} == {"phase1", "phase2"}
    assert int(rows[-1].split(",")[0]) == 2 * STEPS
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert list(metrics["exams"]["quiz"]["results"]) == ["before", "after phase1", "after phase2"]


def test_compiled_layers_train_as_plain_ones_do(near: Place) -> None:
    """By the C++ compiler, as a user's run; its rows are padded, which no number shows."""
    near.environment["TORCHINDUCTOR_CACHE_DIR"] = str(near.folder / "compiled")
    command = [*DAPT, *CODES, "hardware.precision=32-true", "hardware.checkpoints.keep=1"]
    curves = []
    for switch in ("false", "true"):
        ended = near.run(*command, f"hardware.compile={switch}", f"name=is_{switch}")
        assert ended.code == 0, ended
        assert "Warning" not in ended.err
        curves.append(curve(near.runs / "dapt" / f"is_{switch}"))
    assert (near.folder / "compiled").is_dir()  # something has been compiled
    plain, compiled = ([float(v or 0) for row in own for v in row if v != "dapt"] for own in curves)
    assert len(plain) > 100
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_the_last_lines_name_path_hash_and_next_command(finished: Finished) -> None:
    run_dir, ended = finished
    words = last_words(ended)
    assert list(words) == ["done", "model", "sha256", "next"]
    assert words["done"].startswith(str(run_dir))
    assert words["model"] == str(run_dir / "model")
    assert words["sha256"] == json.loads((run_dir / "manifest.json").read_text())["sha256"]
    assert words["next"].startswith("python train.py ")


def composed(command: str) -> Config:
    """The judged config of a command as the last line gives it."""
    program, *arguments = shlex.split(command)[1:]
    assert program == "train.py"
    tame_hydra()
    overrides = [forced(argument) for argument in arguments]
    return load(compose(make_loader(ROOT / "conf"), "config", overrides))


def test_the_next_command_is_a_valid_one_from_this_model(finished: Finished) -> None:
    config = composed(last_words(finished[1])["next"])
    assert config.model.path == str(finished[0])
    assert config.model.is_pretrained and config.stage.kind == "sft"


def test_dapt_with_neftune_trains_the_model_on(place: Place, finished: Finished) -> None:
    """From the weights that PIT ended with; and it names a next command, too."""
    model = finished[0] / "model"
    ended = place.run(*DAPT, *CODES, "model.init=pretrained", f"model.path={model}")
    assert ended.code == 0, ended
    run_dir = place.run_dir("dapt")
    assert "neftune_alpha: 5.0" in (run_dir / "config.yaml").read_text()
    verify(run_dir)
    assert {row[1] for row in curve(run_dir)} == {"dapt"}
    assert composed(last_words(ended)["next"]).model.path == str(run_dir)
    assert weights(run_dir) != weights(finished[0])
    parent = {"path": str(model), "sha256": manifest_hash(model)}
    assert verify(run_dir)["parents"] == verify(run_dir / "model")["parents"] == {"model": parent}


def test_the_same_command_again_does_nothing(finished: Finished, shared: Place) -> None:
    run_dir, first = finished
    before = files_in(run_dir)
    ended = shared.run(*PIT)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out and first.out.endswith(ended.out)
    assert files_in(run_dir) == before


def test_check_only_shows_the_plan_and_writes_no_run(place: Place, finished: Finished) -> None:
    ended = place.run(*PIT, "check_only=true")
    assert ended.code == 0, ended
    assert f"phase1      {STEPS} steps" in ended.out
    assert not place.runs.exists()


def test_a_log_file_gets_plain_lines(finished: Finished) -> None:
    _, ended = finished
    for text in (ended.out, ended.err):
        assert "\r" not in text
        assert "\x1b" not in text
    lines = ended.err.splitlines()
    assert [line.split()[0] for line in lines] == ["phase1", "phase2"], ended.err


def test_a_bare_environment_and_a_read_only_folder_do_not_matter(
    place: Place, finished: Finished
) -> None:
    """The same weights as in a friendly environment, and nothing in the working directory."""
    place.cwd.mkdir()
    place.cwd.chmod(0o555)
    place.environment |= {"LANG": "C", "LC_ALL": "C", "HOME": ""}
    child = place.start(*PIT, limit=_without_home)
    ended = child.wait()
    place.cwd.chmod(0o755)
    assert ended.code == 0, ended
    assert weights(place.run_dir()) == weights(finished[0])
    assert not list(place.cwd.iterdir())


def _without_home() -> None:
    import os

    del os.environ["HOME"]


@pytest.mark.slow
def test_two_processes_give_an_artifact_too(place: Place) -> None:
    ended = place.program(*PIT, "hardware.devices=2", "hardware.micro_batch=1").wait()
    assert ended.code == 0, ended
    verify(place.run_dir())

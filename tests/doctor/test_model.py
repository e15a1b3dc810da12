"""Does a model folder hold together? Each check beside a folder that does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doctor_cases import doctor_config, only

from mediphi.backbone import BackboneSpec, build_model, load_tokenizer
from mediphi.doctor import model
from mediphi.doctor.case import Case
from mediphi.errors import ArtifactError, UserError
from mediphi.export import export_model

MakeCase = Callable


@pytest.fixture
def trained(make_case: MakeCase, tmp_path: Path) -> Path:
    """A folder with weights of four layers."""
    make_case()
    change(tmp_path / "model" / "config.json", num_hidden_layers=4)
    spec = BackboneSpec(str(tmp_path / "model"), init="random", revision="main", kernel="sdpa")
    folder = tmp_path / "trained"
    export_model(build_model(spec), load_tokenizer(spec.folder), folder)
    return folder


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_whole_folder_is_fine(trained: Path, make_case: MakeCase) -> None:
    case = make_case(f"model.path={trained}")
    assert "4,096 rows" in only(model.vocabulary, case, "ok").found
    assert "all in generation_config.json" in only(model.stop_tokens, case, "ok").found
    assert "long factors beyond 512" in only(model.positions, case, "ok").found
    assert f"read from {trained}; they fit" in only(model.weights, case, "ok").found


def test_random_weights_are_called_so(make_case: MakeCase) -> None:
    assert "random: no model.path" in only(model.weights, make_case(), "ok").found


def test_another_model_s_tokenizer_fails(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    change(tmp_path / "model" / "config.json", vocab_size=4000, pad_token_id=3)
    assert "do not belong together" in only(model.vocabulary, case, "FAIL").found


def test_a_lost_stop_token_is_named(trained: Path, make_case: MakeCase) -> None:
    change(trained / "generation_config.json", eos_token_id=4085)
    text = only(model.stop_tokens, make_case(f"model.path={trained}"), "warning").found
    assert "does not stop at <|end|>, <|assistant|>: answers run on" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_position_embeddings": 512}, "512 positions"),
        ({"sliding_window": 600}, "window of 600"),
    ],
)
def test_rows_beyond_the_model_s_reach_fail(
    values: dict[str, int], words: str, make_case: MakeCase, tmp_path: Path
) -> None:
    case = make_case("stage.max_length=700")
    change(tmp_path / "model" / "config.json", **values)
    assert words in only(model.positions, case, "FAIL").found


def test_of_a_large_model_the_first_layers_are_looked_at(
    trained: Path, make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_case(f"model.path={trained}").model()
    monkeypatch.setattr(model, "MOST_ON_CPU", 1)
    case = make_case(f"model.path={trained}")
    assert (
        "first 2 layers are looked at, with own weights"
        in only(model.weights, case, "warning").found
    )
    layers = [built.model.model.layers for built in (whole, case.model())]
    assert [len(found) for found in layers] == [4, 2]
    for theirs, ours in zip(layers[0], layers[1], strict=False):
        assert all(
            torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)
        )


def test_weights_that_cannot_be_used_are_an_error_of_one_line(
    trained: Path, make_case: MakeCase
) -> None:
    change(trained / "config.json", intermediate_size=64)
    with pytest.raises(ArtifactError, match="of another shape"):
        list(model.weights(make_case(f"model.path={trained}")))


def test_a_folder_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    with Case(doctor_config(tmp_path, f"model.path={tmp_path}/none")) as case:
        with pytest.raises(UserError, match=r"no config\.json there; give model\.path"):
            list(model.vocabulary(case))
        with pytest.raises(Exception, match="model folder"):
            list(model.weights(case))

"""What model folders say of themselves: licences that add up, and names without a local path."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mediphi.artifacts import Parent, manifest_hash, publish
from mediphi.origins import Licences, hub_names, is_hub_id, licences_behind

PHI = "microsoft/Phi-3.5-mini-instruct"


def folder(place: Path, *, front: dict[str, Any] | str | None = None, **config: Any) -> Path:
    """A model folder of others."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    if front is not None:
        text = front if isinstance(front, str) else f"---\n{yaml.safe_dump(front)}---\n# A card\n"
        (place / "README.md").write_text(text)
    return place


def run(
    place: Path,
    *parents: Path,
    data: str | None = None,
    model: dict[str, Any] | None = None,
    merge: dict[str, Any] | None = None,
    front: dict[str, Any] | None = None,
) -> Path:
    """A run of ours; returns its model folder."""
    folder(place / "model")
    if front is not None:
        folder(place, front=front)
    if model is not None:
        (place / "config.yaml").write_text(yaml.safe_dump({"model": model, "merge": merge}))
    named = {f"m{n}": Parent(str(own), manifest_hash(own)) for n, own in enumerate(parents)}
    licences = {} if data is None else {"notes": {"id": data, "origin": "x", "commercial_ok": True}}
    content = {"fingerprint": "f", "counts": {}, "licences": licences}
    publish(place, config_hash="c" * 64, parents=named, data=content, extra={})
    return place / "model"


def front_of(**folders: Path) -> dict[str, str]:
    return licences_behind(folders).front()


def test_one_licence_that_all_state_is_the_merges(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", front={"license": "mit"})
    b = folder(tmp_path / "b", front={"license": "MIT"})
    assert front_of(a=a, b=b) == {"license": "mit"}


def test_licences_that_differ_are_other(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", front={"license": "mit"})
    b = folder(tmp_path / "b", front={"license": "apache-2.0"})
    assert front_of(a=a, b=b) == {"license": "other"}
    assert licences_behind({"a": a, "b": b}).by_model == {"a": {"mit"}, "b": {"apache-2.0"}}


def test_a_licence_with_a_name_of_its_own_keeps_it(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", front={"license": "other", "license_name": "health-ai"})
    assert front_of(a=a) == {"license": "other", "license_name": "health-ai"}


@pytest.mark.parametrize(
    "front",
    [None, "no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: mit"]
    + [{"license": own} for own in (None, "", 3, [])],
    ids=str,
)
def test_one_that_says_nothing_leaves_no_licence(tmp_path: Path, front: Any) -> None:
    a = folder(tmp_path / "a", front={"license": "mit"})
    b = folder(tmp_path / "b", front=front)
    told = licences_behind({"a": a, "b": b})
    assert told.front() == {} and told.unknown == ["b"]


def test_a_run_has_the_licence_of_what_it_was_made_from_and_of_its_data(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", front={"license": "mit"})
    base = run(tmp_path / "base", model={"init": "auto", "path": str(root)})
    assert front_of(base=base) == {"license": "mit"}
    expert = run(tmp_path / "expert", tmp_path / "base", data="CC-BY-SA-4.0")
    assert licences_behind({"e": expert}).by_model == {"e": {"mit", "CC-BY-SA-4.0"}}
    assert front_of(base=base, expert=expert) == {"license": "other"}


def test_a_run_from_a_model_without_a_licence_has_none(tmp_path: Path) -> None:
    run(tmp_path / "base", model={"init": "auto", "path": str(folder(tmp_path / "root"))})
    expert = run(tmp_path / "expert", tmp_path / "base", data="MIT")
    assert front_of(expert=expert) == {}
    assert front_of(expert=run(tmp_path / "lost", data="MIT")) == {}  # no word of its beginning
    gone = run(tmp_path / "gone", tmp_path / "base", data="MIT")
    shutil.rmtree(tmp_path / "base")
    assert front_of(expert=gone) == {}


def test_drawn_weights_have_the_licence_of_the_data_unless_it_is_unknown(tmp_path: Path) -> None:
    drawn = {"init": "random", "path": PHI}
    assert front_of(a=run(tmp_path / "a", data="CC0-1.0", model=drawn)) == {"license": "cc0-1.0"}
    assert front_of(a=run(tmp_path / "b", data="unknown (scraped)", model=drawn)) == {}


def test_a_merge_is_believed_by_its_card_alone(tmp_path: Path) -> None:
    """Its manifest does not name the folders of others that were merged."""
    model, merge = {"init": "random"}, {"method": "slerp"}
    silent = run(tmp_path / "silent", data="MIT", model=model, merge=merge)
    assert front_of(a=silent) == {}
    told = run(tmp_path / "told", model=model, merge=merge, front={"license": "mit"})
    assert front_of(a=told) == {"license": "mit"}


@given(
    st.dictionaries(st.text(), st.frozensets(st.sampled_from(["mit", "MIT", "odd"])), min_size=1)
)
def test_no_licence_is_stated_that_not_all_have(by_model: dict[str, frozenset[str]]) -> None:
    front = Licences(by_model).front()
    lowered = {frozenset(one.lower() for one in own) for own in by_model.values()}
    if frozenset() in lowered:
        assert front == {}
    elif lowered == {frozenset(["mit"])}:
        assert front == {"license": "mit"}
    else:
        assert front["license"] == "other"


# --- names on the hub -----------------------------------------------------------------------------


def test_the_name_on_the_hub_goes_before_the_folders(tmp_path: Path) -> None:
    assert hub_names({"a": folder(tmp_path / "phi", _name_or_path=PHI)}) == [PHI]
    assert hub_names({"a": folder(tmp_path / "b", front={"base_model": PHI})}) == [PHI]
    assert hub_names({"a": folder(tmp_path / "c", front={"base_model": [PHI, "a/b"]})}) == [
        PHI,
        "a/b",
    ]
    place = tmp_path / "models--microsoft--Phi-3.5-mini-instruct" / "snapshots" / "0af9"
    assert hub_names({"a": folder(place, _name_or_path="x/y")}) == [PHI]


@pytest.mark.parametrize(
    "told",
    ["", "./a", "/data/phi", "a/b/c", "runs/pit", "../phi", "~/phi", "phi", "a/b c", None, 3],
)
def test_what_is_no_name_on_the_hub_gives_way_to_the_folders_name(
    tmp_path: Path, told: object
) -> None:
    own = folder(tmp_path / "phi", front={"base_model": told}, _name_or_path=told)
    assert hub_names({"base": own}) == ["phi"]


def test_a_local_folder_of_that_form_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("own/phi")
    folder(tmp_path / "own" / "phi")
    assert not is_hub_id("own/phi")


def test_a_run_leads_back_to_the_name_on_the_hub(tmp_path: Path) -> None:
    base = run(tmp_path / "base", model={"init": "auto", "path": PHI})
    experts = {name: run(tmp_path / name, tmp_path / "base") for name in ("a", "b")}
    assert hub_names({"base": base, **experts}) == [PHI]  # once
    drawn = run(tmp_path / "drawn", model={"init": "random", "path": PHI})
    assert hub_names({"base": drawn}) == ["drawn"]


def test_no_path_of_this_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "runs" / "codes", model={"init": "auto", "path": str(tmp_path / "gone")})
    folder(tmp_path / "plain", _name_or_path=str(tmp_path))
    monkeypatch.chdir(tmp_path / "plain")
    places = {"a": tmp_path / "runs" / "codes" / "model", "b": tmp_path / "plain", "c": Path()}
    assert hub_names(places) == ["codes", "plain"]

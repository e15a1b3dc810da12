"""Searches by the command: what they leave, what the winner is worth, kills at any candidate."""

import csv
import json
import os
import shlex
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from end_to_end.test_run import composed
from end_to_end.tiny_merge import (
    QUIET,
    Finished,
    Models,
    asking,
    looks_like_a_model,
    plain,
    run_of,
    slowly,
    write_models,
    write_questions,
)
from end_to_end.tiny_run import Place, curve, files_in, one_line, wait_for, weights
from small_checkpoints import change_tensors

from mediphi import engine
from mediphi.artifacts import verify
from mediphi.backbone import BackboneSpec, build_model, load_tokenizer
from mediphi.data.validation_sets import build_sets
from mediphi.fitness import encode_sets, score_sets

NAMES = ["weight/a", "weight/b", "density/a", "density/b", "gamma/a", "gamma/b", "lambda"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "mine.jsonl")


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, models: Models, questions: Path, shared: Place
) -> Finished:
    """An undisturbed search."""
    folder = tmp_path_factory.mktemp("searched")
    return run_of(Place(folder, folder / "cache", shared.assets), models.search(questions))


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Its lines without what the clock says."""
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in ("seconds", "crc32")} for one in lines]


def found_in(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())["search"]


def winner_of(run_dir: Path) -> dict[str, Any]:
    """The first of the best, as the ledger has it."""
    records = [one for one in ledger(run_dir)[1:] if one["status"] == "ok"]
    return max(records, key=lambda one: one["evaluation"]["fitness"])


# --- what comes out ------------------------------------------------------------------------------


def test_a_search_is_an_artifact_with_ledger_page_and_curve(
    searched: Finished, models: Models
) -> None:
    manifest = verify(searched.run_dir)
    files = {"README.md", "config.yaml", "data.json", "merge.yml", "metrics.json"}
    files |= {"ledger.jsonl", "metrics.csv", "search.html"}
    assert {name for name in manifest["files"] if "/" not in name} == files
    assert manifest["parents"].keys() == {"base", "a", "b"}
    assert len(ledger(searched.run_dir)) == 1 + 14
    page = (searched.run_dir / "search.html").read_text()
    assert page.count("<svg") == 2 and "src=" not in page
    lines = searched.ended.out.splitlines()
    assert lines[1:3] == [
        "search      cmaes, 7 coordinates, 14 candidates",
        f"validation  mine: {counted(searched)}",
    ]


def counted(searched: Finished) -> str:
    items = winner_of(searched.run_dir)["evaluation"]["items"]["mine"].partition(":")[0]
    return f"{items} questions, {60 - int(items)} held out"


def test_the_curve_has_a_row_for_every_candidate(searched: Finished) -> None:
    with (searched.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = ["fitness", "best", "holdout", "set/mine"]
    named = [f"search/{name}" for name in scores] + [f"genome/{name}" for name in NAMES]
    assert list(rows[0]) == ["step", "phase", *named, "search/seconds"]
    best = 0.0
    for row, record in zip(rows, ledger(searched.run_dir)[1:], strict=True):
        assert int(row["step"]) == record["number"]
        assert float(row["search/fitness"]) == record["evaluation"]["fitness"]
        assert {name: float(row[f"genome/{name}"]) for name in NAMES} == record["genome"]
        is_best = float(row["search/fitness"]) > best
        assert bool(row["search/holdout"]) == is_best == (record["holdout"] is not None)
        best = max(best, float(row["search/fitness"]))
        assert float(row["search/best"]) == best


def test_metrics_and_recipe_are_the_winners(searched: Finished) -> None:
    found, winner = found_in(searched.run_dir), winner_of(searched.run_dir)
    assert found["genome"] == winner["genome"]
    assert found["fitness"] == winner["evaluation"]["fitness"]
    assert found["holdout"]["mean"] == pytest.approx(winner["holdout"]["fitness"])
    assert found["gap"] == pytest.approx(found["fitness"] - found["holdout"]["mean"])
    corrected = found["corrected"]
    assert corrected["low"] <= corrected["mean"] <= corrected["high"]
    assert corrected["mean"] < found["fitness"]  # answers at random: the best is luck
    assert (found["evaluations"], found["failed"], found["stopped"]) == (14, 0, 0)
    recipe = yaml.safe_load((searched.run_dir / "merge.yml").read_text())
    told = {"lambda": recipe["parameters"]["lambda"]}
    for name, own in zip("ab", recipe["models"], strict=True):
        told |= {f"{key}/{name}": value for key, value in own["parameters"].items()}
    assert told == winner["genome"]


def test_the_published_model_scores_what_the_ledger_says(searched: Finished) -> None:
    """To the last answer: the candidate in memory was the model on the disk."""
    config = composed(shlex.join(["python", "train.py", *searched.command]))
    assert config.validation is not None
    folder = str(searched.run_dir / "model")
    device = engine.resolve(config.hardware, shares_prompts=True)
    spec = BackboneSpec(folder=folder, init="pretrained", revision="main", kernel=device.kernel)
    model, winner = build_model(spec).eval(), winner_of(searched.run_dir)
    sets = build_sets(config.validation, seed=config.seed)
    for part, key in (("search", "evaluation"), ("holdout", "holdout")):
        asked = {one.name: getattr(one, part) for one in sets}
        encoded = encode_sets(asked, tokenizer=load_tokenizer(folder), device=device)
        assert score_sets(model, encoded).fitness == winner[key]["fitness"]  # type: ignore[arg-type]


def test_the_card_tells_the_scores_and_the_recipe_is_merged_alike(
    searched: Finished, near: Place
) -> None:
    card = (searched.run_dir / "README.md").read_text()
    found = found_in(searched.run_dir)
    held, corrected = found["holdout"], found["corrected"]

    def interval(one: dict[str, float]) -> str:
        return f"{100 * one['mean']:.1f} % [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"

    assert f"| mean | {100 * found['fitness']:.1f} % | {100 * held['mean']:.1f} % |" in card
    assert f"| hold-out part, which chose nothing | {interval(held)} |" in card
    assert f"| search part, corrected for the choice | {interval(corrected)} |" in card
    assert f"| correction | {100 * (corrected['mean'] - found['fitness']):+.1f} points |" in card
    assert f"| gap: search part less hold-out part | {100 * found['gap']:+.1f} points |" in card
    assert held["low"] < held["mean"] < held["high"]
    recipe = f"merge.config={searched.run_dir / 'merge.yml'}"
    again = run_of(near, ["stage=merge", "merge=mergekit", recipe])
    assert weights(again.run_dir) == weights(searched.run_dir)


def test_the_same_command_again_only_announces(searched: Finished, near: Place) -> None:
    before = files_in(searched.run_dir)
    near.folder = searched.run_dir.parents[2]
    ended = near.run(*searched.command)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out and searched.ended.out.endswith(ended.out)
    assert files_in(searched.run_dir) == before


def test_check_only_prints_the_plan_and_leaves_nothing(
    near: Place, models: Models, questions: Path
) -> None:
    ended = near.run(*models.search(questions, "check_only=true"))
    assert ended.code == 0, ended
    words = [line.split()[0] for line in ended.out.splitlines()]
    assert words == ["method", "base", "a", "b", "tensors", "disk", "search", "validation"]
    assert not near.runs.exists()


def test_the_papers_shares_of_slerp_are_a_grid(
    near: Place, models: Models, questions: Path
) -> None:
    grid = ["stage.strategy=grid", "stage.grid.t=[0.1,0.25,0.5]"]
    command = ["stage=search", "merge=slerp", *models.of("b"), *asking(questions), *grid]
    run = run_of(near, command)
    records = ledger(run.run_dir)[1:]
    assert [one["genome"] for one in records] == [{"t": 0.1}, {"t": 0.25}, {"t": 0.5}]
    recipe = yaml.safe_load((run.run_dir / "merge.yml").read_text())
    assert recipe["parameters"]["t"] == winner_of(run.run_dir)["genome"]["t"]


def test_a_grid_goes_over_every_models_values(near: Place, models: Models, questions: Path) -> None:
    grid = ["stage.strategy=grid", "stage.grid.weight=[0.2,0.9]"]
    command = ["stage=search", "merge=ties", *models.of(), *asking(questions), *grid]
    run = run_of(near, command)
    genomes = [one["genome"] for one in ledger(run.run_dir)[1:]]
    assert sorted(tuple(one.values()) for one in genomes) == [
        (0.2, 0.2),
        (0.2, 0.9),
        (0.9, 0.2),
        (0.9, 0.9),
    ]


def test_a_greedy_soup_is_a_search(near: Place, models: Models, questions: Path) -> None:
    command = ["stage=search", "merge=linear", *models.of(), *asking(questions)]
    run = run_of(near, [*command, "stage.strategy=greedy"])
    records = ledger(run.run_dir)[1:]
    assert [tuple(one["genome"].values()) for one in records] == [(1, 0), (0, 1), (1, 1)]
    assert "search      greedy, 2 coordinates, 3 candidates\n" in run.ended.out
    *alone, soup = records
    best = max(alone, key=lambda one: one["evaluation"]["fitness"])
    is_taken = soup["evaluation"]["fitness"] >= best["evaluation"]["fitness"]
    assert found_in(run.run_dir)["genome"] == (soup if is_taken else best)["genome"]


def test_a_search_begins_at_the_merges_numbers(
    near: Place, models: Models, questions: Path
) -> None:
    own = ["merge.parameters.density=0.3", "merge.models.a.parameters.weight=0.77"]
    run = run_of(near, models.search(questions, *own, "stage.sigma=0.0001"))
    for record in ledger(run.run_dir)[1:5]:
        genome = record["genome"]
        assert genome["weight/a"] == pytest.approx(0.77, abs=0.01)
        assert genome["density/b"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(("risk", "number"), [(0.0, 60), (0.2, 240)])
def test_early_stop_finds_the_same_winner(
    risk: float, number: int, near: Place, models: Models, tmp_path: Path
) -> None:
    """Where draws do not depend on scores; and it is said that there is no corrected score."""
    asked = write_questions(tmp_path / "asked.jsonl", number=number)
    command = models.search(asked, "stage.strategy=random", "stage.searched=[weight]")
    whole = run_of(near, command)
    other = Place(near.folder / "early", near.cache, near.assets)
    stop = ["stage.early_stop=true", f"stage.early_stop_risk={risk}"]
    early = run_of(other, [*command, *stop])
    found = found_in(early.run_dir)
    assert found["stopped"] > 0 == found_in(whole.run_dir)["stopped"]
    assert found["corrected"] is None
    card = (early.run_dir / "README.md").read_text()
    assert f"| candidates scored to the end | {14 - found['stopped']} |" in card
    assert f"| candidates given up: no corrected score | {found['stopped']} |" in card
    assert "There is no corrected score" in (early.run_dir / "search.html").read_text()
    assert weights(early.run_dir) == weights(whole.run_dir)
    assert winner_of(early.run_dir) == winner_of(whole.run_dir)
    assert [one["genome"] for one in ledger(early.run_dir)[1:]] == [
        one["genome"] for one in ledger(whole.run_dir)[1:]
    ]


def test_a_risk_without_early_stop_is_refused(near: Place, models: Models, questions: Path) -> None:
    ended = near.run(*models.search(questions, "stage.early_stop_risk=0.1"))
    assert ended.code == 2
    told = "stage.early_stop_risk=0.1: takes effect only with stage.early_stop=true"
    assert ended.err.splitlines() == ["error: 1 problem in the config", f"  {told}"]


def test_a_search_that_is_over_builds_no_deltas_again(searched: Finished, near: Place) -> None:
    """Killed in the merge of its winner: the ledger is told anew, and the merge goes on."""
    run_dir = near.runs / "search" / searched.run_dir.name
    assert near.run(*searched.command, limit=die_in_the_merge).code == -signal.SIGKILL
    ended = near.run(*searched.command, limit=no_candidates)
    assert ended.code == 0, ended
    equal_runs(run_dir, searched.run_dir)


def no_candidates() -> None:
    import mediphi.candidate_bench

    del mediphi.candidate_bench.Candidates


def test_minutes_end_a_search_too(near: Place, models: Models, questions: Path) -> None:
    run = run_of(near, models.search(questions, "stage.minutes=0.00001"))
    assert len(ledger(run.run_dir)) == 2
    assert "14 candidates or 1e-05 minutes" in run.ended.out


def test_wandb_gets_the_rows(near: Place, models: Models, questions: Path) -> None:
    near.environment |= {"WANDB_MODE": "offline"}
    command = models.search(questions, "logger=wandb", "stage.evaluations=5")
    command.remove("logger=csv")
    run = run_of(near, command)
    verify(run.run_dir)
    (offline,) = run.run_dir.glob("wandb/offline-run-*/*.wandb")
    written = offline.read_bytes()
    for name in ("search/fitness", "search/best", "search/set/mine", "genome/weight/a"):
        assert name.encode() in written, name
    assert f"wandb sync {offline.parent}" in run.ended.out


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["split", "name"])
def test_a_test_split_is_refused(
    how: str, near: Place, models: Models, questions: Path, tmp_path: Path
) -> None:
    path = write_questions(tmp_path / "medqa_test.jsonl") if how == "name" else questions
    more = ["validation.sets.mine.split=test"] if how == "split" else []
    ended = near.run(*models.search(path, *more))
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 2
    assert "searching against a test split is refused" in ended.err
    assert not near.runs.exists()


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["merge.parameters.weight=[0.1,0.9]"], "merge.parameters.weight=[0.1, 0.9]: weight is se"),
        (["merge.parameters.weight=5"], "merge.parameters.weight=5: the search begins here: give"),
        (
            ["stage.strategy=grid", "stage.grid.weight=[0.1,0.2,0.3,0.4]"],
            "stage.evaluations=14: the grid has 16 combinations; allowed: 16 or more",
        ),
        (
            ["stage.strategy=grid", "stage.grid.weight=[0.33333,0.00001]"],
            "grid value weight/a=0.33333 must have at most 4 decimals, such as 0.3333",
        ),
    ],
)
def test_what_a_search_would_not_do_as_told_is_refused_before_anything_is_read(
    own: list[str], told: str, checks: bool, near: Place, questions: Path, tmp_path: Path
) -> None:
    """There are no models."""
    places = [f"merge.models.{name}.path={tmp_path / name}" for name in "ab"]
    command = ["stage=search", "merge=ties", *places, *asking(questions), *own]
    ended = near.run(*command, f"check_only={checks}".lower())
    assert ended.code == 2, ended
    [*_, line] = ended.err.splitlines()
    assert told in line and len(ended.err.splitlines()) <= 2
    assert not near.runs.exists() and not near.cache.exists()


def test_values_that_are_equal_do_not_make_a_grid_larger(
    near: Place, models: Models, questions: Path
) -> None:
    grid = ["stage.strategy=grid", "stage.grid.t=[0.1,0.10,0.25]", "stage.evaluations=2"]
    command = ["stage=search", "merge=slerp", *models.of("b"), *asking(questions)[:2], *QUIET]
    run = run_of(near, [*command, *grid])
    assert "search      grid, 1 coordinates, 2 candidates\n" in run.ended.out
    assert [one["genome"] for one in ledger(run.run_dir)[1:]] == [{"t": 0.1}, {"t": 0.25}]


def test_another_budget_under_the_same_name_is_refused(
    near: Place, models: Models, questions: Path
) -> None:
    """The budget decides the winner: without a name it is a run of its own."""
    short = ["name=mine", "stage.evaluations=4"]
    run = run_of(near, models.search(questions, *short))
    before = files_in(run.run_dir)
    ended = near.run(*models.search(questions, "name=mine", "stage.evaluations=8"))
    assert ended.code == 2
    assert "holds another experiment" in one_line(ended) and "name=" in one_line(ended)
    assert files_in(run.run_dir) == before


@pytest.mark.parametrize("ends", [True, False], ids=["finished", "killed"])
def test_questions_and_models_that_changed_are_refused(
    ends: bool, near: Place, models: Models, tmp_path: Path
) -> None:
    asked = write_questions(tmp_path / "mine.jsonl")
    theirs = plain(models, tmp_path / "plain")
    command = theirs.search(asked, f"merge.base={theirs.base}", "stage.evaluations=4")
    ended = near.run(*command, limit=None if ends else partial(die_at_record, 3, "after"))
    assert ended.code == (0 if ends else -signal.SIGKILL)
    text = asked.read_text()
    asked.write_text(text.replace('"answer": 1', '"answer": 2', 1))
    ended = near.run(*command)
    assert ended.code == 2 and "the data changed since this run began" in one_line(ended)
    asked.write_text(text)
    change_tensors(theirs.b, lambda own: own["model.norm.weight"].add_(1))
    ended = near.run(*command)
    assert ended.code == 2 and "the model b at" in one_line(ended)


def test_a_model_that_is_not_finite_is_named(
    near: Place, models: Models, questions: Path, tmp_path: Path
) -> None:
    theirs = plain(models, tmp_path)
    change_tensors(theirs.a, lambda own: own["model.norm.weight"].fill_(float("nan")))
    ended = near.run(*theirs.search(questions, f"merge.base={theirs.base}"))
    assert ended.code == 2
    assert one_line(ended).startswith(f"error: {theirs.a}: tensor model.norm.weight holds numbers")
    assert not near.runs.exists()


def test_candidates_that_all_fail_are_one_line(
    near: Place, models: Models, questions: Path, tmp_path: Path
) -> None:
    """Finite weights, and answers that are not."""
    theirs = plain(models, tmp_path)
    change_tensors(theirs.a, lambda own: own["model.norm.weight"].fill_(3e38))
    large = ["stage.bounds.weight=[0.5,1]", "merge.parameters.weight=0.5"]
    command = theirs.search(questions, f"merge.base={theirs.base}", *large)
    ended = near.run(*command)
    assert ended.code == 2
    assert "not finite" in one_line(ended)
    assert not looks_like_a_model(near.folder / "my runs")


# --- kills and signals ---------------------------------------------------------------------------


def die_at_record(number: int, moment: str) -> None:
    """SIGKILL when that candidate is scored: before, in the middle of, or after its line."""
    from mediphi.merge.search.ledger import Ledger

    append = Ledger.append

    def killing(self: Ledger, record: Any) -> None:
        if record.number < number:
            return append(self, record)
        if moment == "within":
            with self.path.open("a") as file:
                file.write('{"number": ')
        if moment == "after":
            append(self, record)
        return os.kill(os.getpid(), signal.SIGKILL)

    Ledger.append = killing


def die_in_the_merge() -> None:
    """Half of the winner's tensors are written."""
    from mediphi.merge import engine

    whole, seen = engine.merge_tensor, [0]

    def killing(*arguments: Any, **options: Any) -> None:
        seen[0] += 1
        if seen[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*arguments, **options)

    engine.merge_tensor = killing


def die_before_the_page() -> None:
    import mediphi.searching

    mediphi.searching.write_search_page = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def die_before_the_manifest() -> None:
    import mediphi.merging

    mediphi.merging.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


KILLS: list[Callable[[], None]] = [
    partial(die_at_record, 1, "within"),
    partial(die_at_record, 2, "after"),
    partial(die_at_record, 6, "before"),
    partial(die_at_record, 10, "within"),
    partial(die_at_record, 13, "after"),
    die_in_the_merge,
    die_before_the_page,
    die_before_the_manifest,
]


def equal_runs(run_dir: Path, whole: Path) -> None:
    assert ledger(run_dir) == ledger(whole)
    assert curve(run_dir) == curve(whole)
    assert files_in(run_dir / "model") == files_in(whole / "model")
    assert {**found_in(run_dir), "seconds": 0} == {**found_in(whole), "seconds": 0}
    assert (run_dir / "merge.yml").read_bytes() == (whole / "merge.yml").read_bytes()


def test_kills_in_every_generation_change_nothing(searched: Finished, near: Place) -> None:
    run_dir = near.runs / "search" / searched.run_dir.name
    for kill in KILLS:
        assert near.run(*searched.command, limit=kill).code == -signal.SIGKILL
        assert not (run_dir / "manifest.json").exists()
        if kill not in KILLS[-2:]:
            assert not looks_like_a_model(run_dir)
    ended = near.run(*searched.command)
    assert ended.code == 0, ended
    verify(run_dir)
    equal_runs(run_dir, searched.run_dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_kill_at_any_candidate_changes_nothing(
    moment: str, searched: Finished, shared: Place, tmp_path: Path
) -> None:
    for number in range(1, 15):
        place = Place(tmp_path / str(number), shared.cache, shared.assets)
        limit = partial(die_at_record, number, moment)
        assert place.run(*searched.command, limit=limit).code == -signal.SIGKILL
        assert place.run(*searched.command).code == 0
        equal_runs(place.run_dir("search"), searched.run_dir)


def slowly_scored() -> None:
    """A fifth of a second for every candidate."""
    import time

    import mediphi.candidate_bench

    score = mediphi.candidate_bench.score_sets

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return score(*arguments, **options)

    mediphi.candidate_bench.score_sets = slow


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_one_line_and_the_search_goes_on(
    number: int, code: int, searched: Finished, near: Place
) -> None:
    run_dir = near.runs / "search" / searched.run_dir.name
    path = run_dir / "ledger.jsonl"
    child = near.start(*searched.command, limit=slowly_scored)
    assert wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 4, child)
    child.send(number)
    ended = child.wait()
    assert ended.code == code, ended
    bar, said = ended.err.splitlines()[-2:] if "search " in ended.err else ("", ended.err.rstrip())
    name = signal.Signals(number).name
    assert f"stopped by {name}: the same command goes on from here" in (bar, said)
    assert "Traceback" not in ended.err
    assert 4 <= len(ledger(run_dir)) < 15
    assert ledger(run_dir) == ledger(searched.run_dir)[: len(ledger(run_dir))]
    assert near.run(*searched.command).code == 0
    equal_runs(run_dir, searched.run_dir)


def test_a_signal_while_the_winner_is_merged(searched: Finished, near: Place) -> None:
    run_dir = near.runs / "search" / searched.run_dir.name
    journal = run_dir / "checkpoints" / "model" / "journal.jsonl"
    child = near.start(*searched.command, limit=slowly)
    assert wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3, child)
    child.send(signal.SIGTERM)
    assert child.wait().code == 143
    assert not looks_like_a_model(run_dir)
    assert near.run(*searched.command).code == 0
    equal_runs(run_dir, searched.run_dir)

"""Candidates in memory: bitwise what a merge writes, one after another in the same tensors."""

import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import change_tensors, copied, merged_to, tensors_of, write_model

from mediphi.config.merging import Merge
from mediphi.errors import ArtifactError, MergeError
from mediphi.merge import candidates
from mediphi.merge.candidates import Candidates
from mediphi.merge.engine import Job, open_parents
from mediphi.merge.operators import Values
from mediphi.merge.search import Space, SpaceOptions
from mediphi.merge.search.genomes import merge_of
from mediphi.merge.settings import values_of

NORM = "model.norm.weight"
WHOLE: list[dict[str, Any]] = [{"density": (1.0, 1.0)}, {"density": (0.02, 0.3)}]
CRUMBS = [one | {"gamma": gamma} for one in WHOLE for gamma in ((0.0, 0.0), (0.15, 1.2))]
VALUES: dict[str, list[dict[str, Any]]] = {
    "breadcrumbs": CRUMBS,
    "breadcrumbs_ties": CRUMBS,
    "ties": [*WHOLE, {"density": (0.5, 0.5), "rescale": True}],
    "dare_ties": WHOLE,
    "task_arithmetic": [{"lambda": 0.7}, {"normalize": True}],
    "slerp": [{"t": 0.0}, {"t": 0.37}, {"t": 1.0}],
    "linear": [{}, {"normalize": False}],
}
CUT = ("breadcrumbs", "breadcrumbs_ties", "ties")
WEIGHTED = {"weight": (0.8, -0.3)}


def changing(values: Values) -> Callable[[str], Values]:
    """Other values for the second layer and all that follows."""
    later = {n: v if isinstance(v, bool) else _halved(v) for n, v in values.items()}
    return lambda name: later if "layers.1." in name or name == NORM else values


def _halved(value: float | tuple[float, ...]) -> Any:
    return tuple(own / 2 for own in value) if isinstance(value, tuple) else value / 2


def in_turn(method: str) -> Iterator[Callable[[str], Values]]:
    """Each of the method's values for the whole model and layer by layer; the first once more."""
    own = [one if method == "slerp" else WEIGHTED | one for one in VALUES[method]]
    for values in [*own, own[0]]:
        yield lambda name, values=values: values
        yield changing(values)


@pytest.fixture(autouse=True)
def _no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for power cuts and take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models whose norms differ, too; the embeddings are many blocks long."""
    place, made = tmp_path_factory.mktemp("models"), []
    for seed in range(3):
        folder = write_model(place / f"m{seed}", seed=seed, num_hidden_layers=2)
        torch.manual_seed(seed)
        change_tensors(folder, lambda t: t.update({n: _moved(v) for n, v in t.items()}))
        change_tensors(folder, lambda t: t.update({n: v.to(request.param) for n, v in t.items()}))
        made.append(folder)
    return made


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.05 * torch.randn_like(tensor)


def job_of(method: str, models: list[Path], **options: Any) -> Job:
    base, *experts = models
    named = {folder.name: folder for folder in experts[: 1 if method == "slerp" else 2]}
    return Job(method, named, base=None if method == "linear" else base, **options)


def targets_for(job: Job) -> dict[str, torch.Tensor]:
    stored = open_parents(job).checkpoints[0].tensors
    dtype = getattr(torch, job.dtype) if job.dtype else None
    return {n: torch.full(own.shape, 7.0, dtype=dtype or own.dtype) for n, own in stored.items()}


def written(job: Job, values: Callable[[str], Values], place: Path) -> dict[str, torch.Tensor]:
    shutil.rmtree(place, ignore_errors=True)
    return tensors_of(merged_to(job, values, place))


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def compare(job: Job, place: Path, *, deltas: bool, order: bool) -> int:
    """Every candidate beside the merge; returns how many different ones there were."""
    targets = targets_for(job)
    own = Candidates(job, open_parents(job), targets)
    assert (own.keeps_deltas, own.keeps_order) == (deltas, order)
    seen = set()
    for number, values in enumerate(in_turn(job.method)):
        own.build(values)
        assert same(targets, written(job, values, place)), (job.method, number)
        seen.add(b"".join(t.view(torch.uint8).numpy().tobytes() for t in targets.values()))
    own.close()
    return len(seen)


@pytest.mark.parametrize("method", VALUES)
def test_a_candidate_is_bitwise_the_merge(method: str, models: list[Path], tmp_path: Path) -> None:
    deltas = method not in ("slerp", "linear")
    job = job_of(method, models, threads=2)
    different = compare(job, tmp_path, deltas=deltas, order=method in CUT)
    assert different >= 2 * len(VALUES[method]) - 1  # slerp at 0 is the base in all layers


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties", "ties", "dare_ties"])
def test_also_by_the_papers_reading(method: str, models: list[Path], tmp_path: Path) -> None:
    job = job_of(method, models, semantics="paper")
    assert compare(job, tmp_path, deltas=True, order=method == "ties") > 1


@pytest.mark.parametrize("method", ["breadcrumbs_ties", "ties", "task_arithmetic"])
@pytest.mark.parametrize("bytes_per_number", [3.9, 2.0])
def test_also_where_memory_is_too_small_for_deltas(
    method: str,
    bytes_per_number: float,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of magnitudes may fit where the deltas do not."""
    job = job_of(method, models)
    numbers = len(job.models) * sum(t.numel() for t in targets_for(job).values())
    free = bytes_per_number * numbers / candidates.FREE_SHARE
    monkeypatch.setattr(candidates, "free_memory", lambda: free)
    order = method in CUT and bytes_per_number > 2.1
    assert compare(job, tmp_path, deltas=False, order=order) > 1


def test_also_in_a_stated_dtype(models: list[Path], tmp_path: Path) -> None:
    job = job_of("ties", models, dtype="float16")
    assert compare(job, tmp_path, deltas=True, order=True) > 1


@pytest.mark.parametrize("keeps", [True, False])
def test_no_candidate_touches_the_disk(
    keeps: bool, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once prepared, not even the folders must be there, and no file may be written."""
    if not keeps:
        monkeypatch.setattr(candidates, "FREE_SHARE", 0.0)
    job = job_of("breadcrumbs", [copied(one, tmp_path / one.name) for one in models])
    values = next(in_turn("breadcrumbs"))
    expected = written(job, values, tmp_path / "written")
    targets = targets_for(job)
    own = Candidates(job, open_parents(job), targets)
    for path in list(tmp_path.iterdir()):
        shutil.rmtree(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        own.build(values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        own.close()
    assert same(targets, expected)
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_tensor_and_the_next_candidate_is_right(
    models: list[Path], tmp_path: Path
) -> None:
    job = job_of("linear", models)
    targets = targets_for(job)
    own = Candidates(job, open_parents(job), targets)
    with pytest.raises(MergeError, match=rf"^tensor {NORM}: [^\n]+$") as caught:
        own.build(lambda name: {"weight": (1.0, -1.0 if name == NORM else 1.0)})
    assert caught.value.exit_code == 2
    values = next(in_turn("linear"))
    own.build(values)
    own.close()
    assert same(targets, written(job, values, tmp_path / "written"))


def test_a_candidate_that_failed_writes_nothing_into_the_next(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tensor fails at once, while the second is still being merged."""
    job = job_of("linear", models, threads=3)
    targets = targets_for(job)
    own = Candidates(job, open_parents(job), targets)
    first, second, *_ = sorted(targets, key=lambda name: -targets[name].numel())
    merge_tensor, ended = candidates.merge_tensor, threading.Event()

    def slow(*arguments: Any, out: torch.Tensor, **options: Any) -> None:
        if out is targets[second]:
            ended.wait(0.5)
        merge_tensor(*arguments, out=out, **options)
        if out is targets[second]:
            ended.set()

    monkeypatch.setattr(candidates, "merge_tensor", slow)
    with pytest.raises(MergeError, match=rf"^tensor {first}: "):
        own.build(lambda name: {"weight": (1.0, -1.0 if name == first else 1.0)})
    assert ended.is_set()
    own.close()


def test_vectors_in_opposite_directions_are_an_error_of_the_tensor(
    models: list[Path], tmp_path: Path
) -> None:
    opposite = copied(models[1], tmp_path / "opposite")
    start = tensors_of(models[0])[NORM]
    change_tensors(opposite, lambda t: t.update({NORM: -start}))
    job = Job("slerp", {"opposite": opposite}, base=models[0])
    own = Candidates(job, open_parents(job), targets_for(job))
    with pytest.raises(MergeError, match=rf"^tensor {NORM}: [^\n]+opposite directions"):
        own.build(lambda name: {"t": 0.5})
    own.close()


def test_a_model_that_is_not_finite_is_named_before_the_first_candidate(
    models: list[Path], tmp_path: Path
) -> None:
    broken = copied(models[2], tmp_path / "broken")
    change_tensors(broken, lambda t: t[NORM].__setitem__(-1, float("nan")))
    job = job_of("breadcrumbs", [*models[:2], broken])
    with pytest.raises(ArtifactError, match=rf"^{broken}: tensor {NORM} holds numbers that are no"):
        Candidates(job, open_parents(job), targets_for(job))


def test_a_candidate_too_large_for_float16_is_an_error_of_the_tensor(models: list[Path]) -> None:
    job = job_of("task_arithmetic", models, dtype="float16")
    own = Candidates(job, open_parents(job), targets_for(job))
    with pytest.raises(MergeError, match=r"^tensor \S+: merged, it is not finite in float16$"):
        own.build(lambda name: {"weight": (1e3, 1e3), "lambda": 1e3})
    own.close()


def test_a_value_out_of_bounds_is_an_error_of_the_tensor(models: list[Path]) -> None:
    job = job_of("ties", models)
    own = Candidates(job, open_parents(job), targets_for(job))
    with pytest.raises(MergeError, match=r"^tensor \S+: ties: density is 1\.5, allowed are 0 to 1"):
        own.build(lambda name: WEIGHTED | {"density": (1.5, 0.5)})
    own.close()


# --- from a genome to the values of every tensor ------------------------------------------------

MERGE = {
    "method": "breadcrumbs",
    "base": "base",
    "models": {"a": {"path": "a", "parameters": {"gamma": (0.0, 0.3)}}, "b": {"path": "b"}},
    "parameters": {"weight": 0.5, "density": 0.9, "gamma": 0.01},
}
TENSORS = ["model.embed_tokens.weight", NORM, "lm_head.weight"]
TENSORS += [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(5)]


def test_a_genome_of_layer_groups_reaches_every_tensor() -> None:
    told = Merge.model_validate(MERGE)
    options = SpaceOptions(searched=["weight", "lambda"], num_layer_groups=2)
    space = Space("breadcrumbs", ["a", "b"], options)
    genome = {"weight/a@0": 0.1, "weight/a@1": 0.2, "weight/b@0": 0.3, "weight/b@1": 0.4}
    genome |= {"lambda@0": 0.6, "lambda@1": 1.4}
    values = values_of(merge_of(told, space, genome, num_layers=5), num_layers=5)
    first = {TENSORS[0], *TENSORS[3:5]}  # five layers: two and three
    for name in TENSORS:
        found = values(name)
        assert found["weight"] == ((0.1, 0.3) if name in first else (0.2, 0.4)), name
        assert found["lambda"] == (0.6 if name in first else 1.4), name
        assert found["density"] == (0.9, 0.9)


def test_what_is_not_searched_stays_gradients_too() -> None:
    told = Merge.model_validate(MERGE)
    space = Space(
        "breadcrumbs",
        ["a", "b"],
        SpaceOptions(searched=["density"], fixed={"weight": 0.5}, shared=["density"]),
    )
    merged = merge_of(told, space, {"density": 0.4}, num_layers=5)
    values = values_of(merged, num_layers=5)
    before = values_of(told, num_layers=5)
    for name in TENSORS:
        assert values(name)["density"] == (0.4, 0.4)
        assert {**values(name), "density": 0} == {**before(name), "density": 0}
    assert [values(name)["gamma"] for name in TENSORS[3:]] == [
        (pytest.approx(0.075 * n), 0.01) for n in range(5)
    ]
    assert told == Merge.model_validate(MERGE)

"""A merged folder: what is in it, what it is refused for, what memory it took."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoints import (
    INDEX,
    change_json,
    change_tensors,
    copied,
    into_shards,
    tensors_of,
    write_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mediphi.errors import ArtifactError, MergeError, UserError
from mediphi.merge.engine import Job, MergeFacts, merge, tensor_seed
from mediphi.merge.operators import Operands, merge_tensor
from mediphi.merge.shards import ALIGNMENT, PartialShards, plan

EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
WEIGHTS = (0.7, 0.2, 0.4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    return [write_model(place / f"m{n}", seed=n) for n in range(3)]


def named(folders: list[Path]) -> dict[str, Path]:
    return {folder.name: folder for folder in folders}


def linear(place: Path, folders: list[Path], **options: Any) -> MergeFacts:
    weights = WEIGHTS[: len(folders)]
    return run(Job("linear", named(folders), **options), place, {"weight": weights})


def run(
    job: Job,
    place: Path,
    values: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeFacts:
    return merge(
        job,
        values=lambda name: values,
        scratch=place / "scratch",
        target=place / "model",
        progress=progress,
    )


def expected(folders: list[Path], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The same operator over whole tensors in memory."""
    loaded = [tensors_of(folder) for folder in folders]
    merged = {}
    for name, first in loaded[0].items():
        merged[name] = torch.empty_like(first, dtype=dtype)
        operands = Operands(None, tuple(model[name] for model in loaded))
        merge_tensor("linear", operands, {"weight": WEIGHTS}, out=merged[name])
    return merged


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


@pytest.mark.parametrize("bound", [10**9, 300_000, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_folder_holds_what_the_operator_gives(
    bound: int, threads: int, models: list[Path], tmp_path: Path
) -> None:
    facts = linear(tmp_path, models, max_shard_bytes=bound, threads=threads)
    assert same(tensors_of(tmp_path / "model"), expected(models))
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert (facts.num_tensors, facts.num_shards, facts.num_resumed) == (9, len(files), 0)
    assert facts.num_bytes == 4 * facts.num_parameters
    for file in files:
        stored = load_file(file)
        size = sum(tensor.nbytes for tensor in stored.values())
        assert size <= bound or len(stored) == 1


def test_a_method_without_a_base_takes_config_and_order_from_it_alone(
    models: list[Path], tmp_path: Path
) -> None:
    base = copied(models[0], tmp_path / "base")
    change_tensors(base, lambda tensors: tensors[NORM].fill_(float("nan")))
    linear(tmp_path, models, base=into_shards(base))
    assert same(tensors_of(tmp_path / "model"), expected(models))


def test_only_what_merging_needs_is_imported() -> None:
    program = "import sys, mediphi.merge.engine; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    loaded = set(done.stdout.decode().split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "lightning", "datasets", "tokenizers", "mergekit"}


@pytest.mark.parametrize("bound", [10**9, 300_000])
def test_transformers_loads_the_folder(bound: int, models: list[Path], tmp_path: Path) -> None:
    facts = linear(tmp_path, models, max_shard_bytes=bound, dtype="bfloat16")
    folder = tmp_path / "model"
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.bfloat16
    assert same(dict(model.named_parameters()), expected(models, torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(models[0])
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert tokenizer.chat_template == theirs.chat_template
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>", "<|endoftext|>"])
    ids = GenerationConfig.from_pretrained(folder).eos_token_id
    assert set(stops) <= set(ids) and tuple(ids) == facts.stop_ids


def test_files_are_as_others_expect_them(models: list[Path], tmp_path: Path) -> None:
    linear(tmp_path, models, max_shard_bytes=300_000)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 1 + len(files))
    ]
    for file in files:
        with safe_open(tmp_path / "model" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert set(shard.keys()) == {n for n, f in index["weight_map"].items() if f == file}
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors_of(tmp_path / "model").values()
    )
    assert not list((tmp_path / "scratch").glob("*.partial"))


def test_config_and_template_are_the_bases(models: list[Path], tmp_path: Path) -> None:
    base, other = copied(models[0], tmp_path / "base"), copied(models[1], tmp_path / "other")
    change_json(base / "config.json", auto_map={"AutoConfig": "code.C"}, torch_dtype="float32")
    change_json(base / "config.json", dtype=None)
    change_json(base / "generation_config.json", eos_token_id=7, temperature=0.5)
    change_json(other / "generation_config.json", eos_token_id=[8])
    (other / "chat_template.jinja").write_text("other")
    job = Job("slerp", {"other": other}, base=base, dtype="float16")
    facts = run(job, tmp_path, {"t": 0.5})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    theirs = json.loads((base / "config.json").read_text())
    del theirs["auto_map"]
    assert config == theirs | {"torch_dtype": "float16"}
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.5
    assert {7, 8} < set(generation["eos_token_id"])
    template = (tmp_path / "model" / "chat_template.jinja").read_bytes()
    assert template == (base / "chat_template.jinja").read_bytes()
    line = f"{other}: its chat template is another; the one of {base} is taken"
    assert facts.notes == (line,)


def test_mixed_dtypes_are_merged_into_the_stated_one(models: list[Path], tmp_path: Path) -> None:
    halved = copied(models[1], tmp_path / "halved")
    change_tensors(halved, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    folders = [models[0], into_shards(halved), models[2]]
    with pytest.raises(ArtifactError, match=r"merge\.dtype$"):
        linear(tmp_path, folders)
    linear(tmp_path, folders, dtype="float32")
    assert same(tensors_of(tmp_path / "model"), expected(folders))


def test_every_tensor_keeps_its_own_dtype_if_none_is_stated(
    models: list[Path], tmp_path: Path
) -> None:
    folders = [copied(model, tmp_path / model.name) for model in models]
    for folder in folders:
        change_tensors(folder, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].bfloat16()}))
    linear(tmp_path, folders)
    merged = tensors_of(tmp_path / "model")
    assert {name for name, t in merged.items() if t.dtype == torch.bfloat16} == {EMBEDDINGS}


def test_whole_numbers_are_kept_and_must_be_the_same(models: list[Path], tmp_path: Path) -> None:
    folders = [copied(model, tmp_path / model.name) for model in models]
    for folder in folders:
        change_tensors(
            folder,
            lambda t: t.update(mask=torch.arange(5), none=torch.zeros(0), flag=torch.tensor(True)),
        )
    linear(tmp_path, folders)
    merged = tensors_of(tmp_path / "model")
    assert torch.equal(merged["mask"], torch.arange(5))
    assert merged["flag"].dtype == torch.bool and merged["none"].numel() == 0
    change_tensors(folders[2], lambda t: t["mask"].add_(1))
    with pytest.raises(ArtifactError) as caught:
        linear(tmp_path / "again", folders)
    assert str(caught.value) == (
        f"{folders[2]}: tensor mask (int64) differs from that of {folders[0]}; whole numbers "
        "cannot be merged"
    )


THREE = (1.0, 1.0, 1.0)
METHOD_VALUES: dict[str, dict[str, Any]] = {
    "linear": {"weight": (1.0, 1.0, 0.0)},
    "linear of equal shares": {"weight": THREE},
    "uniform_soup": {},
    "slerp at 0": {"t": 0.0},
    "slerp at 0.5": {"t": 0.5},
    "slerp at 1": {"t": 1.0},
    "breadcrumbs": {"weight": THREE, "density": (0.5,) * 3, "gamma": (0.2,) * 3},
    "ties": {"weight": THREE, "density": (0.1,) * 3},
    "dare_linear": {"weight": THREE, "density": (0.01,) * 3},
    "model_stock": {},
    "karcher": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite(
    value: str, dtype: torch.dtype, models: list[Path], tmp_path: Path
) -> None:
    """Whether or not the method would drop them; the last number of the last tensor is seen too."""
    folders = [copied(model, tmp_path / model.name) for model in models]
    folders.append(copied(models[0], tmp_path / "base"))
    for folder in folders:
        change_tensors(folder, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    healthy = copied(folders[2], tmp_path / "healthy")
    change_tensors(folders[2], lambda t: t[NORM].__setitem__(-1, float(value)))
    for number, (name, values) in enumerate(METHOD_VALUES.items()):
        method = name.split()[0]
        base = None if method in ("linear", "uniform_soup", "karcher") else folders[3]
        merged = folders[2:3] if method == "slerp" else folders[:3]
        job = Job(method, named(merged), base=base)
        with pytest.raises(ArtifactError) as caught:
            run(job, tmp_path / str(number), values)
        assert str(caught.value) == (
            f"{folders[2]}: tensor {NORM} holds numbers that are not finite; leave this model "
            "out, or make it anew"
        ), name
        assert not (tmp_path / str(number) / "model").exists()
        if dtype == torch.float32 and value == "nan":
            control = [*merged[:-1], healthy]
            run(Job(method, named(control), base=base), tmp_path / f"{number} healthy", values)


def test_a_base_that_is_not_finite(models: list[Path], tmp_path: Path) -> None:
    base = copied(models[0], tmp_path / "base")
    change_tensors(base, lambda t: t[NORM].__setitem__(0, float("nan")))
    with pytest.raises(ArtifactError, match=rf"^{base}: tensor {NORM} holds numbers"):
        run(Job("slerp", named(models[1:2]), base=base), tmp_path, {"t": 1.0})


def test_a_merge_that_overflows_is_refused(models: list[Path], tmp_path: Path) -> None:
    large = copied(models[0], tmp_path / "large")
    change_tensors(large, lambda t: t[NORM].fill_(1e6))
    with pytest.raises(MergeError) as caught:
        linear(tmp_path, [large], dtype="float16")
    assert str(caught.value) == (
        f"tensor {NORM}: merged, it is not finite in float16; choose smaller weights or another "
        "dtype"
    )


def test_an_operators_error_names_the_tensor(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"^tensor .+\.weight: [^\n]+$") as caught:
        run(Job("linear", named(models[:2])), tmp_path, {"weight": (1.0, -1.0)})
    assert caught.value.exit_code == 2


def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    models: list[Path], tmp_path: Path
) -> None:
    other = copied(models[1], tmp_path / "other")
    change_json(other / "config.json", hidden_act="gelu")
    with pytest.raises(ArtifactError, match="hidden_act"):
        linear(tmp_path / "run", [models[0], other])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^device=cuda: no GPU is visible here; merge on the cpu$"):
        linear(tmp_path, models, device="cuda")


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same(models: list[Path], tmp_path: Path) -> None:
    linear(tmp_path, models, device="cuda")
    for name, tensor in tensors_of(tmp_path / "model").items():
        torch.testing.assert_close(tensor, expected(models)[name])


def test_progress_ends_with_all_bytes(models: list[Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    job = Job("linear", named(models), threads=2)
    facts = run(job, tmp_path, {"weight": WEIGHTS}, lambda *both: told.append(both))
    assert told == sorted(told) and len(told) == 10
    assert (told[0], told[-1]) == ((0, facts.num_bytes), (facts.num_bytes, facts.num_bytes))


def test_every_tensor_has_a_seed_of_its_own() -> None:
    seeds = {tensor_seed(seed, name) for seed in range(3) for name in ("a", "b", "c")}
    assert len(seeds) == 9 and all(0 <= seed < 2**63 for seed in seeds)
    assert tensor_seed(1, "a") == tensor_seed(1, "a")


def test_intra_op_threads_are_given_back(models: list[Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        linear(tmp_path, models, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_piece_out_of_order_is_not_written(tmp_path: Path) -> None:
    layout = plan({"a": (torch.float32, (4,))}, max_shard_bytes=1000)
    with closing(PartialShards(tmp_path / "scratch", layout, job_hash="h")) as shards:
        place = shards.place("a")
        place.write(slice(0, 2), torch.ones(2))
        with pytest.raises(ValueError, match="the piece at 3 does not follow 2 elements"):
            place.write(slice(3, 4), torch.ones(1))
        place.write(slice(2, 4), torch.ones(2))
        shards.seal("a", place.checksum)
    assert shards.paths[0].read_bytes()[-16:] == torch.ones(4).numpy().tobytes()


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(DTYPES, SHAPES), min_size=1),
    st.integers(1, 2000),
)
def test_any_layout_is_read_back_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], bound: int
) -> None:
    layout = plan(tensors, max_shard_bytes=bound)
    assert list(layout.slots) == list(tensors)
    shards = PartialShards(tmp_path_factory.mktemp("any") / "scratch", layout, job_hash="h")
    written = {}
    for name, (dtype, shape) in tensors.items():
        written[name] = torch.randint(0, 2, shape).to(dtype)
        shards.place(name).write(slice(0, written[name].numel()), written[name].view(-1))
        assert layout.slots[name].start % dtype.itemsize == 0
        assert len(layout.shards[layout.slots[name].shard].header) % ALIGNMENT == 0
    shards.close()
    found = {}
    for path, shard in zip(shards.paths, layout.shards, strict=True):
        assert path.stat().st_size == shard.size
        own = load_file(path)
        assert len(own) == 1 or sum(t.nbytes for t in own.values()) <= bound
        found |= own
    assert same(found, written)


def test_merging_takes_less_memory_than_one_tensor(tmp_path: Path) -> None:
    """Anonymous memory; and the measure sees a tensor that is copied."""
    size, config = 16 * 2**20, write_model(tmp_path / "tiny")
    folders = []
    for seed in range(2):
        folder = copied(config, tmp_path / f"m{seed}")
        torch.manual_seed(seed)
        tensors = {f"w{n}": torch.randn(size // 2).bfloat16() for n in range(5)}
        save_file(tensors, folder / "model.safetensors")
        folders.append(folder)
    program = """
        import re, sys, threading
        from pathlib import Path
        from mediphi.merge.checkpoints import open_checkpoint
        from mediphi.merge.engine import Job, merge

        def anonymous():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])

        def growth(body):
            peak, before, stop = 0, anonymous(), threading.Event()
            def sample():
                nonlocal peak
                while not stop.wait(0.001):
                    peak = max(peak, anonymous() - before)
            thread = threading.Thread(target=sample)
            thread.start()
            kept = body()
            stop.set(), thread.join()
            return max(peak, anonymous() - before)

        first, second, place = map(Path, sys.argv[1:])
        def merged():
            return merge(
                Job("linear", {"a": first, "b": second}, max_shard_bytes=40_000_000),
                values=lambda name: {"weight": (0.5, 0.5)}, scratch=place / "scratch",
                target=place / "model", progress=lambda done, total: None,
            )
        checkpoint = open_checkpoint(first)
        print(growth(merged), growth(lambda: [checkpoint.read(n).clone() for n in ("w0", "w1")]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *folders, tmp_path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    merging, copying = map(int, done.stdout.split())
    assert merging < size
    assert copying >= 2 * size

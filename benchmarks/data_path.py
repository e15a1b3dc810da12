"""Data path against `datasets` + TRL and against the bare `tokenizers` library.

    python benchmarks/data_path.py          # all figures, a few minutes on two cores
    python benchmarks/data_path.py --toy    # correctness only, seconds, writes nothing

Figures: text to packed shards, end to end, each run in a process of its own; the packing plan
alone, in one process. Parity is checked before anything is timed: same ids per document, same
tokens in the rows. Ours and the peer alternate A-B-B-A; ratios are medians of paired runs. Needs
the `benchmarks` extra.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
RESULTS = Path(__file__).parent / "results" / "data_path.jsonl"
CAPACITY = 4096
COLLECTIONS = ("1_CancerGov", "2_GARD", "3_GHR", "5_NIDDK", "6_NINDS", "9_CDC")
PEERS = {
    "datasets+trl": "datasets.map(batched, num_proc=2), encode_batch_fast; TRL bfd_split",
    "trl default": "datasets.map(one by one) as SFTTrainer does; TRL bfd_split",
    "tokenizers": "encode_batch_fast on all texts and nothing else",
}


class Cost(NamedTuple):
    """One run: wall and CPU seconds (process tree), peak resident MiB of the largest process."""

    wall: float
    cpu: float
    peak_mib: float
    disk_bytes: int


def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ASSETS / "models/phi35_mini/tokenizer.json"))


def read_texts(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_texts(file: Path, *, toy: bool) -> dict[str, int]:
    """MedQuAD pages and MTSamples notes of the project's assets, as JSONL."""
    from mediphi.config.corpus import FolderSource, Licence, MedquadSource
    from mediphi.data.bad_rows import BadRows
    from mediphi.data.sources import read

    licence = Licence(id="benchmark", origin="assets/corpora", commercial_ok=False)
    names = COLLECTIONS[-1:] if toy else COLLECTIONS
    folder = ASSETS / "corpora"
    medquad = MedquadSource(
        kind="medquad",
        path=str(folder / "medquad"),
        collections=tuple(f"{name}_QA" for name in names),
        licence=licence,
    )
    sources: list[Any] = [medquad]
    if not toy:
        path = str(folder / "mtsamples")
        sources.append(FolderSource(kind="mtsamples", path=path, licence=licence))
    size = {"documents": 0, "characters": 0}
    with file.open("w", encoding="utf-8") as out:
        for source in sources:
            for document in read(source, source.kind, BadRows()):
                out.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
                size["documents"] += 1
                size["characters"] += len(document.text)
    return size


def run_ours(texts: Path, folder: Path) -> Callable[[], Any]:
    from mediphi.data.encoding import tokenizer_sha256
    from mediphi.data.plan import PlanSettings, TrainingPlan
    from mediphi.data.render import Piece, Rendered
    from mediphi.data.tokenization import build_store
    from mediphi.data.tokens import StoreKey

    tok = tokenizer()
    eos_id = tok.token_to_id("<|endoftext|>")

    def work() -> TrainingPlan:
        documents = (
            Rendered(r["id"], "a", [Piece("document", r["text"])]) for r in read_texts(texts)
        )
        key = StoreKey(tokenizer_sha256(tok), "benchmark", "benchmark", "train", eos_id)
        store = build_store(documents, cache=folder, tokenizer=tok, key=key)
        settings = PlanSettings(kinds=("document",), capacity=CAPACITY, global_batch=1)
        return TrainingPlan(store, settings)

    return work


def run_datasets(texts: Path, folder: Path, *, style: str) -> Callable[[], Any]:
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tok = tokenizer()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<|endoftext|>")
    eos = wrapped.eos_token_id

    def batched(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tok.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*e.ids, eos] for e in encoded]}

    def single(row: dict[str, str]) -> dict[str, list[int]]:
        return {"input_ids": [*wrapped(row["text"], add_special_tokens=False)["input_ids"], eos]}

    options: dict[str, Any] = {
        "datasets+trl": {"function": batched, "batched": True, "num_proc": 2},
        "trl default": {"function": single},
    }[style]

    def work() -> Any:
        rows = datasets.load_dataset(
            "json", data_files=str(texts), split="train", cache_dir=str(folder)
        )
        tokens = rows.map(remove_columns=rows.column_names, **options)
        packed = pack_dataset(tokens, CAPACITY, "bfd_split")
        packed.save_to_disk(str(folder / "packed"))
        return packed

    return work


def run_tokenizers(texts: Path, folder: Path) -> Callable[[], Any]:
    tok = tokenizer()
    rows = [row["text"] for row in read_texts(texts)]
    return lambda: tok.encode_batch_fast(rows, add_special_tokens=False)


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def worker(side: str, texts: Path) -> None:
    """Time one side, imports and tokenizer loading left out; print its `Cost`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = {"ours": run_ours, "tokenizers": run_tokenizers}
        work = makers.get(side, partial(run_datasets, style=side))(texts, folder)
        wall, cpu = time.perf_counter(), cpu_seconds()
        result = work()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        kept = folder / ("tokens" if side == "ours" else "packed")
        disk = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
        print(json.dumps(Cost(wall, cpu, peak_mib(), disk)))
        del result


def peak_mib() -> float:
    """Of this process or of one of its children. `ru_maxrss` of this one counts its parent's."""
    status = Path("/proc/self/status").read_text().split()
    own = int(status[status.index("VmHWM:") + 1])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def measure(side: str, texts: Path) -> Cost:
    command = [sys.executable, __file__, "--worker", side, "--texts", str(texts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def check_parity(texts: Path) -> int:
    """Same ids per document as the library, same tokens in the rows as TRL; returns tokens."""
    with tempfile.TemporaryDirectory() as name:
        plan = run_ours(texts, Path(name) / "ours")()
        packed = run_datasets(texts, Path(name) / "peer", style="datasets+trl")()
        rows = [row["text"] for row in read_texts(texts)]
        starts = plan.store.piece_starts
        for i, e in enumerate(tokenizer().encode_batch_fast(rows, add_special_tokens=False)):
            ids = plan.store.gather(np.arange(starts[i], starts[i + 1]))
            assert ids.tolist() == [*e.ids, plan.store.eos_id], f"document {i} differs"
        chunks = plan.chunks(np.arange(plan.num_rows))
        theirs = packed.data.column("input_ids").combine_chunks().values.to_numpy()
        address = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(chunks.address, chunks.length, strict=True)]
        )
        ours = np.bincount(plan.store.gather(address))
        assert np.array_equal(ours, np.bincount(theirs)), "tokens of the rows differ"
        return len(address)


def packing_figure(lengths: np.ndarray, *, pairs: int) -> Iterator[dict[str, Any]]:
    """Our plan against TRL's packing of the same lengths, per document."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    from mediphi.data.packing import pack

    datasets.disable_progress_bars()
    datasets.disable_caching()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(np.zeros(offsets[-1], dtype=np.int32))
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), values)})
    dataset = datasets.Dataset(table)
    assert pack(lengths, capacity=CAPACITY).length.sum() == lengths.sum()
    for peer, map_options in {
        "trl bfd_split default": {},
        "trl bfd_split one batch": {"batch_size": len(lengths)},
    }.items():
        runs: dict[str, Callable[[], float]] = {
            "ours": lambda: pack(lengths, capacity=CAPACITY).fill,
            "peer": lambda o=map_options: (
                lengths.sum() / (len(pack_dataset(dataset, CAPACITY, "bfd_split", o)) * CAPACITY)
            ),
        }
        costs: dict[str, list[Cost]] = {"ours": [], "peer": []}
        fills: dict[str, float] = {}
        runs["ours"]()
        for side in order(pairs):
            wall, cpu = time.perf_counter(), cpu_seconds()
            fills[side] = runs[side]()
            costs[side].append(Cost(time.perf_counter() - wall, cpu_seconds() - cpu, 0.0, 0))
        yield {
            "figure": "packing plan",
            "peer": peer,
            "documents": len(lengths),
            "fill_ours": round(fills["ours"], 5),
            "fill_peer": round(fills["peer"], 5),
            "documents_per_s_ours": round(len(lengths) / median(c.wall for c in costs["ours"])),
            "documents_per_s_peer": round(len(lengths) / median(c.wall for c in costs["peer"])),
            **ratios(costs["ours"], costs["peer"]),
        }


def order(pairs: int) -> list[str]:
    """A-B-B-A."""
    return [
        side for i in range(pairs) for side in (("ours", "peer") if i % 2 else ("peer", "ours"))
    ]


def ratios(ours: list[Cost], peer: list[Cost]) -> dict[str, Any]:
    """Peer over ours, median of pairs with their spread."""
    figures: dict[str, Any] = {"pairs": len(ours)}
    for name in ("wall", "cpu"):
        paired = [
            getattr(b, name) / max(getattr(a, name), 1e-9) for a, b in zip(ours, peer, strict=True)
        ]
        figures[f"{name}_ratio"] = round(median(paired), 2)
        figures[f"{name}_ratio_spread"] = [round(min(paired), 2), round(max(paired), 2)]
        figures[f"{name}_s_ours"] = round(median(getattr(cost, name) for cost in ours), 4)
        figures[f"{name}_s_peer"] = round(median(getattr(cost, name) for cost in peer), 4)
    return figures


def end_to_end_figure(peer: str, texts: Path, *, pairs: int, tokens: int) -> dict[str, Any]:
    costs: dict[str, list[Cost]] = {"ours": [], "peer": []}
    for side in order(pairs):
        costs[side].append(measure("ours" if side == "ours" else peer, texts))
    figure = {
        "figure": "text to packed shards",
        "peer": peer,
        "peer_is": PEERS[peer],
        "tokens": tokens,
        **ratios(costs["ours"], costs["peer"]),
    }
    for side, runs in costs.items():
        figure[f"tokens_per_s_{side}"] = round(tokens / median(run.wall for run in runs))
        figure[f"disk_bytes_per_token_{side}"] = round(runs[0].disk_bytes / tokens, 3)
        figure[f"peak_mib_{side}"] = round(max(run.peak_mib for run in runs))
    return figure


def environment() -> dict[str, Any]:
    packages = ("mediphi", "numpy", "tokenizers", "datasets", "trl", "pyarrow")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="seconds, correctness only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.texts)
        return
    with tempfile.TemporaryDirectory() as name:
        texts = Path(name) / "texts.jsonl"
        size = write_texts(texts, toy=arguments.toy)
        tokens = check_parity(texts)
        print(f"parity holds: {size['documents']} documents, {tokens} tokens", flush=True)
        figures = list(all_figures(texts, toy=arguments.toy, tokens=tokens))
    if not arguments.toy:
        source = {"data": "assets/corpora: MedQuAD pages, MTSamples notes", **size}
        lines = [json.dumps({**source, **figure, **environment()}) for figure in figures]
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def all_figures(texts: Path, *, toy: bool, tokens: int) -> Iterator[dict[str, Any]]:
    encoded = tokenizer().encode_batch_fast(
        [row["text"] for row in read_texts(texts)], add_special_tokens=False
    )
    known = np.array([len(e.ids) + 1 for e in encoded], dtype=np.int64)
    drawn = np.random.default_rng(0).choice(known, size=500 if toy else 100_000)
    pairs = {"datasets+trl": 5, "tokenizers": 5, "trl default": 2}
    for figure in packing_figure(drawn, pairs=1 if toy else 5):
        print(json.dumps(figure), flush=True)
        yield figure
    for peer, count in pairs.items():
        figure = end_to_end_figure(peer, texts, pairs=1 if toy else count, tokens=tokens)
        print(json.dumps(figure), flush=True)
        yield figure


if __name__ == "__main__":
    main()

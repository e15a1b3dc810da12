"""Fill the README's tables of figures: from finished runs, and from benchmarks/results/.

    python scripts/results_table.py runs/pit/NAME    keeps the run's figures, then fills the README
    python scripts/results_table.py                  fills the README from what is kept

A run's figures come from its verified manifest.json and metrics.json and are kept as one line of
benchmarks/results/runs.jsonl, so that the README can be made again without the run.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from config_reference import header
from golden_configs import resolved

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "runs.jsonl"
CONTEXT = ("python", "machine", "device", "cpu", "cpu_count", "num_cpus", "data", "versions")
"""What the lines of a benchmark share; told once under the table."""
COLUMNS = {
    "data_path": (
        "figure peer fill_ours fill_peer tokens_per_s_ours tokens_per_s_peer peak_mib_ours "
        "peak_mib_peer wall_ratio wall_ratio_spread cpu_ratio cpu_ratio_spread"
    ),
    "dpo_step": (
        "precision peer wall_ratio wall_ratio_spread cpu_ratio flops_ratio memory_ratio "
        "with_reference_wall_ratio pairs_per_s_ours pairs_per_s_theirs "
        "peak_mib_above_start_ours peak_mib_above_start_theirs"
    ),
    "gpu_attention": ("data side ms share_of_peak peak_mib wall_ratio wall_ratio_spread failure"),
    "gpu_dpo_step": (
        "side pairs_per_s mfu peak_gib wall_ratio wall_ratio_spread reference_pass_s loss_off "
        "failure"
    ),
    "gpu_generation": (
        "side new_tokens_per_s share_of_floor peak_mib wall_ratio wall_ratio_spread same_answers "
        "failure"
    ),
    "gpu_loss": "side ms share_of_peak peak_mib wall_ratio wall_ratio_spread failure",
    "gpu_planner_memory": ("side predicted_gib used_gib ratio allocated_gib reserved_gib failure"),
    "gpu_train_step": (
        "data side tokens_per_s mfu peak_gib wall_ratio wall_ratio_spread loss_off grad_off failure"
    ),
    "merge": (
        "figure method models cpu_ratio cpu_ours cpu_mergekit wall_ratio wall_ours wall_mergekit "
        "floor_wall anonymous_mib_ours anonymous_mib_mergekit anonymous_mib_torch checkpoint_mib "
        "merge_cpu_ratio merge_cpu_ours merge_cpu_mergekit whole_cpu_ratio whole_cpu_ours "
        "whole_cpu_mergekit score_cpu_ratio"
    ),
    "merged_experts": ("model abstracts notes answers guidance codes all difference_from_the_base"),
    "near_duplicates": (
        "method documents recall precision documents_per_cpu_s cpu_ratio_to_mediphi "
        "cpu_ratio_spread peak_memory_bytes_per_document minutes_for_2_5_million"
    ),
    "planner_memory": (
        "configuration fitted predicted_mib measured_mib ratio "
        "predicted_tokens_per_s measured_tokens_per_s measured_over_predicted"
    ),
    "sft_step": (
        "precision peer wall_ratio wall_ratio_spread cpu_ratio flops_ratio memory_ratio "
        "tokens_per_s_ours tokens_per_s_theirs "
        "peak_mib_above_start_ours peak_mib_above_start_theirs"
    ),
    "train_step": (
        "figure precision peer pairs wall_ratio wall_ratio_spread cpu_ratio cpu_ratio_spread "
        "flops_ratio"
    ),
    "kill_resume": "path stage machine runs kills kills_with_half_written_files attempts equal",
    "rank_kill": (
        "path strategy runs kills_of_rank_1 kills_of_rank_0 kills_with_half_written_files starts "
        "equal machine"
    ),
    "startup": "figure cpu_seconds bare_hydra_cpu_seconds ratio ratio_range",
}
"""What the README shows of a benchmark; everything stands in the file."""
MAX_COLUMNS = 12

Line = Mapping[str, Any]


def kept_run(run_dir: Path) -> dict[str, Any]:
    """The figures of a finished run.

    Raises:
        ArtifactError: no finished run, or a damaged one.
    """
    from mediphi.artifacts import verify

    manifest = verify(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    extra = manifest["extra"]
    return {
        "command": command(extra, manifest["config_hash"], parents=manifest["parents"]),
        **{key: extra.get(key) for key in ("corpus", "device", "precision", "steps", "tokens")},
        "parameters": extra.get("parameters"),
        "eval_max_rows": _eval_max_rows(run_dir / "config.yaml"),
        "seconds": extra["seconds"],
        "counts": manifest["data"]["counts"],
        "metrics": metrics,
        "commit": manifest["commit"],
        "created": manifest["created"],
        "versions": manifest["versions"],
    }


def _eval_max_rows(config: Path) -> int | None:
    """How many rows a validation reads at most; None where no config is left."""
    if not config.is_file():
        return None
    return yaml.safe_load(config.read_text(encoding="utf-8"))["stage"]["eval_max_rows"]


def command(extra: Line, config_hash: str, *, parents: Line) -> str:
    """What makes this run; settings beyond the groups are owned to, they cannot be recovered."""
    from mediphi.config import Config
    from mediphi.config import config_hash as hash_of

    corpus = re.sub("^paper_", "paper/", extra["corpus"])
    groups = [f"stage={extra['stage']}", f"corpus={corpus}"]
    groups += [] if extra["model"] == "tiny" else [f"model={extra['model']}"]
    starts: list[list[str]] = [[]]
    if "model" in parents:  # a run directory, or the model folder inside
        folder = Path(parents["model"]["path"])
        starts = [[f"model.path={folder.parent}"], [f"model.path={folder}"]]
    for start in starts:
        forced = [f"++{override}" for override in start]
        plain = json.dumps(yaml.safe_load(resolved([*groups, *forced])))
        if hash_of(Config.model_validate_json(plain, strict=True)) == config_hash:
            return " ".join(["python train.py", *groups, *start])
    return " ".join(["python train.py", *groups, *starts[0], f"... (config {config_hash})"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def keep(run: Line, path: Path = RUNS) -> None:
    """Put a run's line in the place of an earlier one of the same command."""
    others = [line for line in read_lines(path) if line["command"] != run["command"]]
    lines = sorted([*others, run], key=lambda line: _place(line["command"]))
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


def _place(command: str) -> tuple[int, str]:
    """In the order of the recipe."""
    stages = [f"stage={name} " for name in ("pit", "dapt", "sft", "dpo")]
    return next((n for n, s in enumerate(stages) if s in command), len(stages)), command


def results(runs: Sequence[Line]) -> str:
    """Markdown of all kept runs."""
    if not runs:
        return "No run is recorded yet: `python scripts/results_table.py runs/pit/NAME`."
    return "\n\n".join("\n\n".join(_run(run)) for run in runs)


def _run(run: Line) -> Iterator[str]:
    from mediphi.announcement import read_exams

    yield f"`{run['command']}`"
    for exam in read_exams(run["metrics"]):
        yield exam.title
        yield markdown(exam.rows[0], exam.rows[1:])
    yield markdown(("measured", "value"), list(_measured(run)))
    conf = ROOT / "conf" / "corpus" / f"{run['corpus']}.yaml"
    yield f"The corpus: {header(conf)}" if conf.is_file() else f"The corpus: {run['corpus']}."


def _measured(run: Line) -> Iterator[tuple[str, str]]:
    from mediphi.model_card import TOO_LONG

    yield "training, exams and export", f"{run['seconds']:.0f} s"
    yield "machine", f"{run['device']}, {run['precision']}"
    for key in ("parameters", "steps", "tokens"):
        if run.get(key):
            yield key, str(run[key])
    sides = ("train", "heldout")
    too_long = {s: _documents(run, f"{s}_too_long") for s in sides}
    kept = (_documents(run, side) - too_long[side] for side in sides)
    yield "documents trained on, held out", ", ".join(f"{n:,}" for n in kept)
    if any(too_long.values()):
        yield TOO_LONG, ", ".join(f"{n:,}" for n in too_long.values())
    loss = run["metrics"].get("heldout/loss")
    if loss is not None and "loss" not in run["metrics"]["exams"]:  # the exam tells it per item
        unit = "a pair (preference loss)" if "stage=dpo" in run["command"] else "nats a token"
        rows = run.get("eval_max_rows")  # older records do not tell
        most = f", at most {rows:,} packed rows" if rows else ""
        yield f"held-out loss of the last validation{most}", f"{loss:.3f} {unit}"
    yield "versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    yield "commit, day", f"{run['commit'] or 'unknown'}, {run['created'][:10]}"


def _documents(run: Line, key: str) -> int:
    return sum(count.get(key, 0) for count in run["counts"].values())


def benchmarks(folder: Path = RESULTS) -> str:
    """Markdown of every benchmark file but the runs: a table and what it was measured on."""
    parts = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = read_lines(path)
        if path != RUNS and lines:
            script = re.sub("^gpu_", "gpu/", path.stem)
            parts.append(f"**`benchmarks/{script}.py`**\n\n{_benchmark(path.stem, lines)}")
    return "\n\n".join(parts) or "No benchmark is recorded yet."


def _benchmark(stem: str, lines: Sequence[Line]) -> str:
    groups: dict[tuple[str, ...], list[Line]] = {}
    first = COLUMNS.get(stem, "").split()[:1]
    lines = [_flat(line) for line in lines if all(n in line for n in first)]  # summaries only
    for line in lines:  # figures with other columns get a table of their own
        groups.setdefault(tuple(_columns(stem, line)), []).append(line)
    tables = [
        markdown([_words(n) for n in columns], [[_cell(x[n]) for n in columns] for x in rows])
        for columns, rows in groups.items()
    ]
    context = dict(lines[0])
    if "data" in COLUMNS.get(stem, "").split():  # another in each row
        context.pop("data", None)
    return "\n\n".join([*tables, _context(context)])


def _flat(line: Line) -> Line:
    """Figures of the two sides beside the ratios: `tokens_per_s_ours`, `tokens_per_s_theirs`."""
    sides = {side: line[side] for side in ("ours", "theirs") if isinstance(line.get(side), dict)}
    return {**line, **{f"{k}_{side}": v for side, own in sides.items() for k, v in own.items()}}


def _columns(stem: str, line: Line) -> list[str]:
    """The columns chosen for this benchmark, else the first short ones."""
    if stem in COLUMNS:
        return [name for name in COLUMNS[stem].split() if name in line]
    hidden = (*CONTEXT, "benchmark")
    names = [n for n, value in line.items() if n not in hidden and _is_short(value)]
    return [n for n in names if not _is_version(line[n])][:MAX_COLUMNS]


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\d+\.\d+(\.\d+)?(\+\w+)?", value))


def _is_short(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(x, int | float) for x in value) and 0 < len(value) <= 2
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 60)


def _words(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(x) for x in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _context(line: Line) -> str:
    """Machine, data and versions of a benchmark, as a line of it has them."""
    line = {**line, **line.get("environment", {})}
    told = [f"{_words(name)} {line[name]}" for name in CONTEXT[:-1] if name in line]
    versions = dict(line.get("versions", {}))
    versions |= {k: v for k, v in line.items() if k not in CONTEXT and _is_version(v)}
    told += [f"{name} {version}" for name, version in versions.items()]
    return f"Measured with {', '.join(told)}." if told else "Machine not recorded."


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in x)} |" for x in lines)


def filled(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of that name.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        raise ValueError(f"the text needs {start} and then {end}, once each")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def readme(text: str) -> str:
    """The README with both tables made anew."""
    text = filled(text, "results", results(read_lines(RUNS)))
    return filled(text, "benchmarks", benchmarks())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="finished run directories")
    for run_dir in parser.parse_args().runs:
        run = kept_run(run_dir)
        keep(run)
        print(results([run]))
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name} filled", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What the README and the docs say is so: commands compose, paths exist, tables are generated."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml
from composing import ROOT, composed, loader
from hydra.types import RunMode

from mediphi.artifacts import publish
from mediphi.config import Config, config_hash, dump, load
from mediphi.config.keys import keys_of
from mediphi.door.compose import compose
from mediphi.door.enter import forced
from mediphi.sweep import expand, plan

README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "assets" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAM = ["python", "train.py"]
TORCHRUN = ["python", "-m", "mediphi.torchrun"]
FLAGS = {"--help": 0, "--cfg": 1, "-sc": 1, "-m": 0, "--config-dir": 1, "--config-name": 1}
TOP = ("src/", "conf/", "sweeps/", "tests/", "assets/", "benchmarks/", "scripts/", "docs/")
MEASURED = re.compile(r"\d\s?(?:%|tokens/s|times (?:as fast|faster))|\d\s?[x×] (?:as|faster|less)")


class Command(NamedTuple):
    """A call of train.py, its flags apart from its overrides."""

    flags: dict[str, str]
    overrides: list[str]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module(name)


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """Every call of train.py in the bash blocks of a page."""
    lines = [
        line
        for block in blocks(text, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if "train.py" in line
    ]
    return [re.sub(r'^eval "\$\((.*)\)"', r"\1", line.rpartition("&& ")[2]) for line in lines]


def parsed(line: str) -> Command:
    words = shlex.split(line, comments=True)
    if words[:3] == TORCHRUN:
        words = [PROGRAM[0], *words[words.index(PROGRAM[1]) :]]
    assert words[:2] == PROGRAM, line
    flags, overrides, rest = {}, [], iter(words[2:])
    for word in rest:
        if word in FLAGS:
            flags[word] = next(rest) if FLAGS[word] else ""
        else:
            assert not word.startswith("-"), f"{line}: unknown flag {word}"
            overrides.append(word)
    return Command(flags, overrides)


def judged(line: str, folder: Path) -> list[Config]:
    """The configs that a command would run, composed and validated in this process."""
    command = parsed(line)
    extra = command.flags.get("--config-dir")
    where = loader(
        (folder / extra if (folder / extra).is_dir() else ROOT / extra) if extra else None
    )
    name = command.flags.get("--config-name", "config")
    params = _swept(where, name, command.overrides)
    if "-m" in command.flags or params:
        points = expand([*params, *command.overrides])
        return [point.config for point in plan(where, config_name=name, points=points).points]
    return [load(compose(where, name, [forced(o) for o in command.overrides]))]


def _swept(where, name: str, overrides: list[str]) -> list[str]:
    """The grid that a sweep file holds."""
    if name == "config":
        return []
    cfg = where.load_configuration(name, [], RunMode.MULTIRUN)
    return [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the YAML files that the pages show."""
    for block in [b for page in PAGES for b in blocks(page.read_text(encoding="utf-8"), "yaml")]:
        name = block.partition("\n")[0].removeprefix("# ")
        assert name.endswith(".yaml"), "a YAML block begins with the name of its file"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(block, encoding="utf-8")
    return tmp_path


ALL_COMMANDS = [
    pytest.param(line, id=f"{page.stem}: {line.split('#')[0].strip()[:80]}")
    for page in PAGES
    for line in commands(page.read_text(encoding="utf-8"))
]


def test_the_pages_hold_commands() -> None:
    assert len(ALL_COMMANDS) >= 20


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_a_command_of_the_docs_is_valid(line: str, folder: Path) -> None:
    assert judged(line, folder)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py stage=pitt corpus=medcode",
        "python train.py stage=pit stage.phase2.lrr=1",
        "python train.py stage=dapt '~corpus.sources.nothing'",
        "python train.py -m stage=pit seed=0,-1",
    ],
)
def test_a_wrong_command_would_be_seen(line: str, folder: Path) -> None:
    with pytest.raises(Exception) as raised:  # Hydra's own errors have no common type
        judged(line, folder)
    assert not isinstance(raised.value, AssertionError)


def test_the_readme_corpus_says_what_its_comments_say(folder: Path) -> None:
    corpus = judged("python train.py --config-dir my_conf stage=pit corpus=letters", folder)[
        0
    ].corpus
    assert corpus.sources["discharge"].kind == "jsonl"
    assert corpus.sources["discharge"].licence.contains_phi
    assert corpus.sources["wikipedia"].weight == 0.5
    assert corpus.task_outputs.generator == "files"


def test_the_two_commands_stand_as_they_are_run_elsewhere() -> None:
    block = blocks(README.read_text(encoding="utf-8"), "bash")[0].splitlines()
    assert block == [
        "pip install -e . && python train.py stage=pit corpus=medcode",
        "pip install -e '.[test]' && pytest -n 2 --dist loadfile",
    ]
    assert (
        "pip install -q -e '.[test]' && pytest -n 2 --dist loadfile"
        in (ROOT / ".ci/run").read_text()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def named_paths(text: str) -> set[str]:
    """Code spans that are a path of the repository, without places that a run makes."""
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return {span for span in spans if span.startswith(TOP) and not re.search(r"[\s<>]", span)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_paths_in_the_pages_exist(page: Path) -> None:
    for path in named_paths(page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}"


def test_the_readme_names_paths() -> None:
    assert len(named_paths(README.read_text(encoding="utf-8"))) >= 20
    assert named_paths("see `src/mediphi/nowhere.py` and `src/<x>`") == {"src/mediphi/nowhere.py"}


def tree() -> list[str]:
    """Names in the README's tree, in its order."""
    (block,) = [b for b in blocks(README.read_text(encoding="utf-8"), "") if "src/mediphi/\n" in b]
    return [line.split()[0] for line in block.splitlines()]


def test_the_tree_names_every_room_and_file_of_the_package() -> None:
    package = ROOT / "src" / "mediphi"
    rooms = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()}
    files = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    inside = set(tree()[tree().index("src/mediphi/") + 1 : tree().index("tests/")])
    assert inside == rooms | files


def test_the_tree_names_every_folder_of_the_project() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    folders = {f"{x.partition('/')[0]}/" for x in listed.stdout.splitlines() if "/" in x}
    assert folders - {".ci/", "src/"} <= set(tree())
    for name in tree():
        if not (ROOT / "src" / "mediphi" / name).exists():
            assert (ROOT / name).exists(), name


def test_the_config_reference_is_the_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("config_reference", monkeypatch)
    assert module.TARGET.read_text(encoding="utf-8") == module.reference(), (
        "run: python scripts/config_reference.py"
    )


def test_the_config_reference_has_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = script("config_reference", monkeypatch).reference()
    for stage, source in [("pit", "jsonl"), ("dapt", "hub"), ("pit", "icd10cm")]:
        data = {"stage": {"kind": stage}, "corpus": {"sources": {"<name>": {"kind": source}}}}
        keys = list(keys_of(Config, data).known)
        assert len(keys) > 80
        assert not [key for key in keys if f"| `{key}` |" not in text]


def test_the_figures_are_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("results_table", monkeypatch)
    text = README.read_text(encoding="utf-8")
    assert text == module.readme(text), "run: python scripts/results_table.py"


def test_no_figure_is_typed_by_hand() -> None:
    text = README.read_text(encoding="utf-8")
    for name in ("results", "benchmarks"):
        before, _, rest = text.partition(f"<!-- {name}:start -->")
        assert rest, name
        text = before + rest.partition(f"<!-- {name}:end -->")[2]
    assert not MEASURED.findall(text)
    assert MEASURED.search("72.3 % after") and MEASURED.search("3.1x faster")


def test_markers_are_refused_when_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("results_table", monkeypatch)
    good = "a\n<!-- x:start -->\nold\n<!-- x:end -->\nb\n"
    once = module.filled(good, "x", "new")
    assert once == "a\n<!-- x:start -->\nnew\n<!-- x:end -->\nb\n"
    assert module.filled(once, "x", "new") == once
    for torn in ("nothing", good + good, "<!-- x:end --><!-- x:start -->"):
        with pytest.raises(ValueError, match="once each"):
            module.filled(torn, "x", "new")


def finished_run(folder: Path, overrides: list[str], accuracy: float) -> Path:
    """A run directory as a stage leaves it, without the training."""
    row = {"group": "easy", "num_items": 300, "score": accuracy, "low": 0.4, "high": 0.6}
    row |= {"chance": 0.25}
    results = {"before": {"easy": row}, "after phase2": {"easy": row}}
    gain = {"easy": {"mean": 0.0, "low": -0.1, "high": 0.1}}
    exam = {"title": "Quiz", "noun": "questions", "unit": "%", "results": results, "gain": gain}
    metrics = {"objective": {"name": "quiz/easy", "value": accuracy}, "heldout/loss": 2.5}
    (folder / "metrics.json").write_text(json.dumps({**metrics, "exams": {"quiz": exam}}))
    extra = {"stage": "pit", "corpus": "medcode", "model": "tiny", "device": "2-core CPU"}
    publish(
        folder,
        config_hash=config_hash(load(composed(*overrides))),
        parents={},
        data={"counts": {"icd10cm": {"train": 1800, "heldout": 40}}},
        extra={**extra, "precision": "bf16-mixed", "seconds": 123.4, "steps": "7"},
    )
    return folder


def test_a_run_becomes_a_row_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    run = module.kept_run(finished_run(tmp_path, ["stage=pit", "corpus=medcode"], 0.543))
    text = module.results([run])
    assert run["command"] == "python train.py stage=pit corpus=medcode"
    assert "| easy | 54.3 % [40.0, 60.0] | 54.3 % [40.0, 60.0] | +0.0 [-10.0, +10.0] |" in text
    assert "| 123 s |" in text and "| 1,800, 40 |" in text


def test_a_run_with_other_settings_does_not_pose_as_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    run = module.kept_run(finished_run(tmp_path, ["stage=pit", "stage.phase1.lr=1e-2"], 0.5))
    assert run["command"].startswith("python train.py stage=pit corpus=medcode ... (config ")


def test_what_was_left_out_is_not_told_as_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    run = module.kept_run(finished_run(tmp_path, ["stage=pit", "corpus=medcode"], 0.543))
    told = dict(module._measured(run))
    assert "left out, longer than max_length" not in told
    assert told["held-out loss of the last validation"] == "2.500 nats a token"
    run["counts"]["icd10cm"] |= {"train_too_long": 300, "heldout_too_long": 7}
    run["metrics"]["exams"]["loss"] = run["metrics"]["exams"]["quiz"]
    told = dict(module._measured(run))
    assert told["documents trained on, held out"] == "1,500, 33"
    assert told["left out, longer than max_length"] == "300, 7"
    assert not any("held-out loss" in name for name in told)  # the exam's is another mean


def test_the_held_out_loss_of_a_run_says_of_how_many_rows_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    config = load(composed("stage=pit", "corpus=medcode", "stage.eval_max_rows=7"))
    (tmp_path / "config.yaml").write_text(dump(config))
    run = module.kept_run(finished_run(tmp_path, ["stage=pit", "corpus=medcode"], 0.5))
    told = dict(module._measured(run))
    assert told["held-out loss of the last validation, at most 7 packed rows"]


def test_a_later_run_of_a_command_takes_the_earlier_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    kept = tmp_path / "runs.jsonl"
    for command, seconds in (("b", 1), ("a", 2), ("b", 3)):
        module.keep({"command": command, "seconds": seconds}, kept)
    assert [(x["command"], x["seconds"]) for x in module.read_lines(kept)] == [("a", 2), ("b", 3)]


def test_an_unknown_benchmark_is_shown_whatever_its_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    (tmp_path / "new.jsonl").write_text(
        '{"figure": "step", "ratio": 1.5, "spread": [1, 2], "torch": "2.13.0", "notes": {"a": 1}}\n'
        '{"figure": "a|b", "ratio": 1234567, "python": "3.11.7"}\n\n'
    )
    text = module.benchmarks(tmp_path)
    assert "| step | 1.5 | 1 to 2 |" in text and "| a&#124;b | 1,234,567 |" in text
    assert "torch 2.13.0" in text and "notes" not in text
    assert module.benchmarks(tmp_path / "none") == "No benchmark is recorded yet."


def test_a_gpu_benchmark_is_shown_under_its_scripts_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("results_table", monkeypatch)
    (tmp_path / "gpu_train_step.jsonl").write_text(
        '{"data": "short", "side": "ours", "mfu": 0.5, "device": "H200", "torch": "2.11.0"}\n'
        '{"data": "short", "side": "trl", "failure": "no room", "device": "H200"}\n'
    )
    text = module.benchmarks(tmp_path)
    assert text.startswith("**`benchmarks/gpu/train_step.py`**")
    assert "| short | ours | 0.5 |" in text and "| short | trl | no room |" in text
    assert text.endswith("Measured with device H200, torch 2.11.0.")
    assert all(
        (ROOT / "benchmarks" / "gpu" / f"{own.removeprefix('gpu_')}.py").is_file()
        for own in module.COLUMNS
        if own.startswith("gpu_")
    )


def test_citation_and_hooks_are_readable_and_name_what_exists() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2505.10717"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    scripts = [word for entry in entries for word in entry.split() if word.endswith(".py")]
    assert len(scripts) == 3
    assert all((ROOT / name).is_file() for name in scripts)


def test_the_table_of_bundled_data_has_every_folder_with_its_size() -> None:
    text = (ROOT / "assets/README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w[\w-]*)` \|.*\| ([\d.]+) MB \|", text, re.MULTILINE))
    corpora = ROOT / "assets" / "corpora"
    sizes = {
        folder.name: sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        for folder in corpora.iterdir()
    }
    assert {name: float(size) for name, size in told.items()} == {
        name: pytest.approx(size, abs=0.05) for name, size in sizes.items()
    }
    assert all((corpora / name / "LICENCE.txt").is_file() for name in told)

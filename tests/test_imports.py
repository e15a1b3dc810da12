"""Imports run one way, seen in the source of every module and not in what happened to be loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "mediphi"
MODULES = sorted(SOURCE.rglob("*.py"))

CONTRACTS = {"config", "records", "batches", "errors", "hub"}
LEAVES = {"modules", "data", "merge", "evaluate", "synthesize"}
ALLOWED = {
    "errors": set(),
    "records": set(),
    "hub": set(),
    "resources": set(),
    "batches": {"records"},
    "config": {"records", "errors"},
    "artifacts": {"errors"},
    "blocks": {"batches"},
    "attention": CONTRACTS | {"blocks"},
    "html_page": set(),
    **dict.fromkeys(LEAVES, CONTRACTS),
    "merge": CONTRACTS | {"artifacts", "resources", "html_page"},
    "modules": CONTRACTS | {"attention", "backbone", "strategies"},
    "strategies": CONTRACTS | {"attention", "backbone", "checkpointing", "process_group"},
    "door": {"config", "errors"},
    "cluster": {"artifacts", "config", "errors"},
    "sweep": {"artifacts", "cluster", "config", "data", "door", "errors"},
    "process_group": {"config"},
    "engine": CONTRACTS | {"attention", "process_group", "strategies"},
    "backbone": CONTRACTS | {"attention", "lora"},
    "export": CONTRACTS | {"backbone", "lora"},
    "lora": CONTRACTS,
    "tracking": CONTRACTS | {"artifacts"},
    "checkpointing": CONTRACTS | {"artifacts", "interruption", "process_group"},
}
"""What a room may import besides itself; a room not named here is wiring and may import all."""

LIGHT = {"errors", "records", "resources", "config", "artifacts", "door", "cluster", "sweep"}
HEAVY = {"torch", "transformers", "lightning", "datasets", "numpy", "pyarrow", "wandb", "jaxtyping"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: Path) -> set[str]:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("mediphi.")}
    return ours - {room(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    if (allowed := ALLOWED.get(room(path))) is not None:
        assert rooms_of(path) <= allowed
    if room(path) in LIGHT:
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY


@pytest.mark.parametrize("path", [m for m in MODULES if room(m) in LEAVES], ids=lambda p: p.stem)
def test_a_leaf_takes_its_own_section_and_never_the_whole_config(path: Path) -> None:
    assert not imports(path) & {"mediphi.config.Config", "mediphi.config.schema.Config"}


def test_leaves_never_import_one_another() -> None:
    assert all(ALLOWED[leaf].isdisjoint(LEAVES) for leaf in LEAVES)


def test_the_check_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("def f():\n    from mediphi.data import corpora\n    import torch.nn\n")
    assert imports(path) == {"mediphi.data.corpora", "torch.nn"}


def test_rooms_are_what_the_table_says() -> None:
    there = {room(path) for path in MODULES}
    assert there >= {"config", "records", "batches", "errors", "artifacts", "door", "sweep", "run"}


def test_no_room_imports_in_a_circle() -> None:
    edges = {name: set() for name in map(room, MODULES)}
    for path in MODULES:
        edges[room(path)] |= rooms_of(path) & edges.keys()
    done: set[str] = set()
    while free := [name for name in edges.keys() - done if edges[name] <= done]:
        done |= set(free)
    assert done == edges.keys(), f"circle among {sorted(edges.keys() - done)}"


@pytest.mark.parametrize("name", ["config", "artifacts", "door", "cluster", "sweep"])
def test_the_way_to_an_error_loads_nothing_heavy(name: str) -> None:
    code = f"import sys, mediphi.{name}; print(*{{m.split('.')[0] for m in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not set(loaded.stdout.split()) & HEAVY

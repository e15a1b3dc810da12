"""What sets the stages apart: here, the names that their metrics are told apart by."""

from pathlib import Path

import pytest
from composing import composed
from toy_store import Piece, toy_store

from mediphi.config import load
from mediphi.data.datamodule import PackedDataModule
from mediphi.data.plan import PlanSettings
from mediphi.data.tokens import TokenStore
from mediphi.records import PieceKind
from mediphi.stages import metric_groups


def store(folder: Path, sources: dict[str, str], *kinds: PieceKind) -> TokenStore:
    """A document with a piece of every kind for each source, with the task type of its row."""
    documents = [
        (f"{name}/1", name, [Piece(kind, "cough") for kind in kinds], {"task_type": task})
        for name, task in sources.items()
    ]
    return toy_store(folder, documents, data=f"{sources}{kinds}")  # type: ignore[arg-type]


def groups(stage: str, corpus: str, train: TokenStore, heldout: TokenStore) -> dict[str, list[str]]:
    settings = PlanSettings(("document",), 64, 1)
    data = PackedDataModule(train, heldout=heldout, settings=settings)
    return metric_groups(load(composed(f"stage={stage}", f"corpus={corpus}")).stage, data)


def test_each_split_has_the_names_of_its_own_text(tmp_path: Path) -> None:
    train = store(tmp_path, {"codes": "", "notes": ""}, "summary", "document")
    heldout = store(tmp_path, {"letters": ""}, "document")
    found = groups("pit", "medcode", train, heldout)
    assert found["train/source"] == ["codes", "notes"]
    assert found["heldout/source"] == ["letters"]
    assert (found["train/kind"], found["heldout/kind"]) == (["document", "summary"], ["document"])
    assert not any(found[f"{split}/task"] for split in ("train", "heldout"))


@pytest.mark.parametrize(
    ("stage", "corpus", "kinds"),
    [
        ("dapt", "medcode", ["document"]),
        ("sft", "mediflow", ["answer"]),
        ("pit", "medcode", ["document", "summary"]),
    ],
)
def test_a_stage_names_the_kinds_that_it_learns(
    tmp_path: Path, stage: str, corpus: str, kinds: list[str]
) -> None:
    both = store(tmp_path, {"a": ""}, "user", "answer", "summary", "document")
    assert groups(stage, corpus, both, both)["train/kind"] == kinds


def test_rows_without_a_task_are_named_where_any_row_has_one(tmp_path: Path) -> None:
    """The meters of both splits share their names."""
    train = store(tmp_path, {"a": "summarization", "b": ""}, "answer")
    heldout = store(tmp_path, {"b": ""}, "answer")
    found = groups("sft", "mediflow", train, heldout)
    assert found["train/task"] == ["other", "summarization"]
    assert found["heldout/task"] == ["other"]

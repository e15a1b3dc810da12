"""The table of metric names is what runs log: no column stays empty, none is missing."""

import csv
from pathlib import Path

import pytest
from end_to_end.tiny_chat import ChatRun, dpo, sft, write_chats
from end_to_end.tiny_run import Ended, Place

from mediphi.tracking.names import PLACE


@pytest.fixture(scope="module")
def chats(shared: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished SFT run and the DPO run that started from it."""
    place = Place(tmp_path_factory.mktemp("names"), shared.cache, shared.assets)
    rows = write_chats(place.folder / "rows")
    for stage in ("sft", "dpo"):
        arguments = sft(rows) if stage == "sft" else dpo(rows, place.run_dir("sft"))
        ended = place.run(*arguments, "stage.eval_max_rows=64")
        assert ended.code == 0, ended
    return place


def columns(run_dir: Path) -> tuple[set[str], set[str]]:
    """All metric columns of a run, and those that have a number."""
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) - set(PLACE)
    return names, {name for name in names if any(row[name] for row in rows)}


def check(run_dir: Path) -> set[str]:
    names, filled = columns(run_dir)
    assert names == filled
    return filled


# A metric outside the header stops a run (test_unknown_metric_is_refused), so these runs, which
# end well, have logged nothing else.


def test_pit_fills_its_columns(finished: tuple[Path, Ended]) -> None:
    filled = check(finished[0])
    assert {"quiz/easy", "heldout/loss/kind/document", "train/accuracy/kind/summary"} < filled


def test_sft_fills_its_columns(chats: Place) -> None:
    filled = check(chats.run_dir("sft"))
    wanted = {"exam/all", "exam/summarization", "train/accuracy/task/question-answering"}
    assert wanted | {"heldout/loss/kind/answer", "heldout/perplexity"} < filled


def test_dpo_fills_its_columns(chats: Place) -> None:
    filled = check(chats.run_dir("dpo"))
    wanted = {"exam/all", "exam/omission", "heldout/margin/error/omission", "train/kl"}
    assert wanted | {"train/accuracy/task/summarization", "heldout/logps/rejected"} < filled


def test_the_last_progress_line_of_a_phase_shows_its_last_evaluation(
    finished: tuple[Path, Ended], sft_run: ChatRun
) -> None:
    """Whether that falls on an evaluated step (PIT) or comes behind training (SFT)."""
    for run_dir, err in ((finished[0], finished[1].err), (sft_run.run_dir, sft_run.ended.err)):
        with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["heldout/loss"]]
        for phase in {row["phase"] for row in rows}:
            steps = [line for line in err.splitlines() if line.startswith(f"{phase} step ")]
            own = [float(row["heldout/loss"]) for row in rows if row["phase"] == phase]
            done, _, total = steps[-1].split()[2].partition("/")
            assert done == total
            assert sum(line.split()[2] == f"{done}/{total}" for line in steps) == 1
            assert f"held-out {own[-1]:.3f}" in steps[-1]
            assert f"{own[-2]:.3f}" != f"{own[-1]:.3f}"

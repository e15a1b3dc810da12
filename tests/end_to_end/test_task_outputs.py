"""A run on texts under two licences with somebody's task outputs: what it counts and declares."""

import json
from pathlib import Path

import pytest
from end_to_end.tiny_run import PIT, SMALL, Ended, Place, one_line

from mediphi.artifacts import verify

NUM_NOTES = 30
LICENCES = {
    "bound": "{id: CC BY-NC-SA 4.0, origin: a ward, commercial_ok: false, dua: true, "
    "contains_phi: true, share_alike: true}",
    "open": "{id: CC0-1.0, origin: a book, commercial_ok: true}",
}
TERMS = {
    "bound": "no commercial use, share alike, data-use agreement, health information of persons",
    "open": "commercial use",
}
COMMAND = [
    "stage=pit",
    "corpus=local",
    "~corpus.sources.mine",
    *(
        f"+corpus.sources.{name}={{kind: jsonl, path: {name}.jsonl, id_field: id, "
        f"licence: {licence}}}"
        for name, licence in LICENCES.items()
    ),
    "corpus.task_outputs.generator=files",
    "corpus.task_outputs.path=outputs.jsonl",
    *SMALL,
    *(
        f"stage.phase{i}.{key}={value}"
        for i in (1, 2)
        for key, value in (("max_steps", 2), ("epochs", 9), ("warmup_steps", 1))
    ),
]
SKIP = ["corpus.on_bad=skip", "corpus.max_bad_share=0.2"]


def write_inputs(folder: Path) -> None:
    """Two sources, and a summary of every document; lines 4 and 5 of those are bad."""
    folder.mkdir(parents=True)
    outputs: list[str] = []
    for name in LICENCES:
        rows = [
            {"id": f"{i}", "text": f"{name.title()} note {i}, seen {i * 7} times."}
            for i in range(NUM_NOTES)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        outputs += [
            json.dumps(
                {
                    "document_id": f"{name}/{row['id']}",
                    "kind": "summary",
                    "text": f"Summary {name} {row['id']}.",
                    "generator": "somebody/1",
                }
            )
            for row in rows
        ]
    outputs[3:3] = ['{"text": "kanari', outputs[0]]
    (folder / "outputs.jsonl").write_text("\n".join(outputs) + "\n")


@pytest.fixture(scope="module")
def trained(shared: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Path, Ended]:
    folder = tmp_path_factory.mktemp("task outputs")
    place = Place(folder, folder / "cache", shared.assets)
    write_inputs(place.cwd)
    ended = place.run(*COMMAND, *SKIP)
    assert ended.code == 0, ended
    return place, place.run_dir(), ended


def test_bad_task_outputs_are_quarantined_and_counted_in_the_manifest(
    trained: tuple[Place, Path, Ended],
) -> None:
    place, run_dir, ended = trained
    counts = verify(run_dir)["data"]["counts"]
    assert counts["task_outputs.path"] == {"read": 2 * NUM_NOTES, "rejected": 2}
    assert [counts[name]["rejected"] for name in LICENCES] == [0, 0]
    (quarantine,) = place.cache.rglob("*.quarantine.txt")
    told = quarantine.read_text().splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in told] == [
        f"outputs.jsonl:{number}" for number in (4, 5)
    ]
    assert "repeats" in told[1]
    assert "kanari" not in "".join(told) + ended.out + ended.err


def test_the_card_tells_the_terms_of_every_source(trained: tuple[Place, Path, Ended]) -> None:
    _, run_dir, _ = trained
    card = (run_dir / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    for name, terms in TERMS.items():
        (row,) = [cells for cells in rows if cells[:1] == [name]]
        licence = verify(run_dir)["data"]["licences"][name]
        assert row[1:3] == [licence["id"], terms]
        assert f"id: {row[1]}," in LICENCES[name]
    assert "Not a medical device" in card


def test_strict_refuses_a_bad_task_output_and_begins_no_run(alone: Place) -> None:
    write_inputs(alone.cwd)
    ended = alone.run(*COMMAND)
    assert ended.code == 2, ended
    said = one_line(ended)
    assert "outputs.jsonl:4: " in said and "kanari" not in ended.err + ended.out
    assert not alone.runs.exists()


def test_a_warm_up_that_would_never_end_is_refused_and_begins_no_run(
    place: Place,
) -> None:
    """The steps of an epoch are known only after the data were read."""
    command = [a for a in PIT if "max_steps" not in a and "warmup" not in a]
    ended = place.run(*command, "stage.phase2.warmup_steps=100000")
    assert ended.code == 2, ended
    assert "error: stage.phase2.warmup_steps=100000: the phase has only " in one_line(ended)
    assert not place.runs.exists()

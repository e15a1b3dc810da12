"""Neither secrets nor texts leave through logs, reports, dashboards or error messages."""

import json
from pathlib import Path

import pytest
from end_to_end.tiny_chat import SHORT, ChatRun, Row, instruction, pair, write_rows
from end_to_end.tiny_run import DAPT, Place

KEY = "kanari0key0" * 4 + "beef"
SECRETS = {
    "WANDB_API_KEY": KEY[:40],
    "HF_TOKEN": "hf_kanarihubtoken",
    "OPENAI_API_KEY": "sk-kanariopenai",
    "MY_PASSWORD": "kanaripassword",
}
TEXTS = [f"kanaritext{i:03d}" for i in range(200)]
IDS = [f"kanariid{i:03d}" for i in range(200)]


def write_notes(path: Path) -> None:
    path.parent.mkdir(parents=True)
    rows = (
        {
            "patient": f"kanarigroup{i:03d}",
            "id": IDS[i],
            "text": f"{TEXTS[i]} was seen on ward {i % 7} for the {i}th time.",
        }
        for i in range(200)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def holders(folder: Path, words: list[str]) -> set[str]:
    """Files below `folder` that hold one of the words."""
    wanted = [word.encode() for word in words]
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)) for p in files if any(w in p.read_bytes() for w in wanted)}


def test_nothing_private_leaves_through_a_run_with_wandb_offline(alone: Place) -> None:
    write_notes(alone.cwd / "mine.jsonl")
    child = alone.program(
        "corpus=local",
        "corpus.sources.mine.path=mine.jsonl",
        "corpus.sources.mine.id_field=id",
        "corpus.sources.mine.group_field=patient",
        *(argument for argument in DAPT if argument != "logger=csv"),
        WANDB_MODE="offline",
        **SECRETS,
    )
    ended = child.wait()
    assert ended.code == 0, ended
    run_dir = alone.run_dir("dapt")
    assert list(run_dir.glob("wandb/**/*.wandb"))
    ids = [*IDS, "kanarigroup"]
    for said in (ended.out, ended.err):
        assert "kanari" not in said
    assert holders(run_dir, [*SECRETS.values(), *TEXTS, *ids]) == set()
    assert holders(run_dir, ["kanari"]) == set()
    assert holders(alone.cache, [*SECRETS.values(), *TEXTS]) == set()
    # Negative control: the store keeps the ids, so the search does find what is there.
    found = holders(alone.cache, ids)
    assert {Path(name).name for name in found} == {"documents.bin"}


def hidden(row: Row, number: int) -> Row:
    """A canary in every text of a row."""
    names = ("instruction", "input", "output", "rejected_output")
    return {n: f"{v} {TEXTS[number]}" if n in names else v for n, v in row.items()} | {
        "id": IDS[number]
    }


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_no_conversation_leaves_through_a_run_but_open_samples(
    stage: str, alone: Place, sft_run: ChatRun
) -> None:
    """With W&B offline. Samples are kept of the one source that holds no health information."""
    make, layout = (instruction, "mediflow") if stage == "sft" else (pair, "mediflow_dpo")
    command = [f"stage={stage}", *(a for a in SHORT if a != "logger=csv"), "corpus=local"]
    command += ["corpus.sources.mine.path=closed.jsonl", "corpus.sources.mine.id_field=id"]
    licence = "{id: CC0-1.0, origin: a book, commercial_ok: true}"
    command += [
        f"corpus.sources.mine.format={layout}",
        f"+corpus.sources.open={{kind: jsonl, path: open.jsonl, id_field: id, format: {layout}, "
        f"licence: {licence}}}",
        "corpus.heldout_fraction=0.4",
        "corpus.deduplicate.near=false",
        f"model.path={sft_run.run_dir}",
    ]
    if stage == "sft":
        command += ["stage.num_samples=3", "stage.exam.max_new_tokens=4"]
    closed = (hidden(make(i), i) for i in range(20))
    write_rows(alone.cwd / "closed.jsonl", closed)
    write_rows(alone.cwd / "open.jsonl", (hidden(make(i), i) for i in range(100, 120)))
    alone.environment |= {"WANDB_MODE": "offline", **SECRETS}
    ended = alone.run(*command)
    assert ended.code == 0, ended
    assert "kanari" not in ended.out + ended.err
    run_dir = alone.run_dir(stage)
    (offline,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    column = b"heldout/margin" if stage == "dpo" else b"heldout/loss/kind/answer"
    assert column in offline.read_bytes()
    assert f"wandb sync {offline.parent}" in ended.out
    samples = {"samples.jsonl"} if stage == "sft" else set()
    assert holders(run_dir, [*SECRETS.values(), *TEXTS]) == samples
    assert holders(run_dir, TEXTS[:20]) == set()
    assert holders(run_dir, IDS[:20]) == set()  # of the source with health information
    # Ids pair an exam's items before and after; they lie in its files and nowhere else.
    found = holders(run_dir, IDS)
    assert {Path(name).parts[0] for name in found} == {"exam"} | samples
    assert holders(alone.cache, [*SECRETS.values(), *TEXTS]) == set()
    assert {Path(name).name for name in holders(alone.cache, IDS)} == {"documents.bin"}

"""The token store keeps every token, and refuses what was changed behind its back."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from toy_store import Piece, phi_like_tokenizer, toy_store

from mediphi.data import store_writer
from mediphi.data.encoding import (
    TextEncoder,
    WordEncoder,
    _bytes_per_id,
    make_encoder,
    plain_text_json,
    splits_at_words,
    tokenizer_sha256,
)
from mediphi.data.render import Rendered
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import MANIFEST, StoreKey, TokenStore, open_store, store_path
from mediphi.errors import ArtifactError, DataError, MachineError
from mediphi.records import PIECE_KINDS

TOY = phi_like_tokenizer()
MODELS = Path(__file__).parents[2] / "assets/models"
PHI = Tokenizer.from_file(str(MODELS / "phi35_mini/tokenizer.json"))
TINY = Tokenizer.from_file(str(MODELS / "tiny/tokenizer.json"))

DOCUMENTS = [
    ("a/1", "a", [Piece("document", "acute fever"), Piece("summary", "fever  of\n origin ")]),
    ("a/2", "a", [Piece("document", "  heart\n\n\tfailure é 漢")]),
    ("b/ü", "b", [Piece("summary", ""), Piece("document", "cough")]),
    ("b/empty", "b", [Piece("document", "")]),
]


def words(draw_from: str) -> st.SearchStrategy[str]:
    return st.text(st.sampled_from(draw_from), max_size=60)


TEXTS = st.lists(words("  \n\t▁aefhrtuv.,é漢\x00<|end>A017٣") | st.text(max_size=30), max_size=6)


def piece_texts(store: TokenStore, tokenizer: Tokenizer) -> list[tuple[str, str, str]]:
    """Document id, kind and decoded text of every piece, EOS checked and taken off."""
    pieces = []
    for row, start, stop in zip(
        store.pieces, store.piece_starts, store.piece_starts[1:], strict=False
    ):
        ids = store.gather(np.arange(start, stop)).tolist()
        assert ids[-1] == store.eos_id and store.eos_id not in ids[:-1]
        text = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        pieces.append((store.document_id(row["document"]), PIECE_KINDS[row["kind"]], text))
    return pieces


TOKENIZERS = {"toy": TOY, "tiny": TINY, "phi35": PHI}
PLAIN = {name: plain_text_json(tokenizer) for name, tokenizer in TOKENIZERS.items()}
LIBRARY = {name: Tokenizer.from_str(plain) for name, plain in PLAIN.items()}
ENCODERS = {name: make_encoder(plain) for name, plain in PLAIN.items()}


@settings(deadline=None)
@given(TEXTS)
@example(["", "a  b   c", " ", "\n\n a", "▁▁ ▁a", "a<|end|>\nb", "x\u00a0y"])
@pytest.mark.parametrize("name", PLAIN)
def test_encoding_word_by_word_gives_the_library_ids(name: str, texts: list[str]):
    encoder, library = ENCODERS[name], LIBRARY[name]
    assert isinstance(encoder, WordEncoder)
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):  # the second time every word is known
        ids, lengths = encoder.encode(texts)
        assert lengths.tolist() == [len(x) for x in expected]
        assert ids.tolist() == [i for x in expected for i in x]


def test_text_without_control_tokens_has_the_ids_of_the_original_tokenizer():
    texts = ["Cholera due to Vibrio cholerae 01, biovar eltor\nA00.1", "  two  spaces  "]
    ids, _ = ENCODERS["phi35"].encode(texts)
    batch = PHI.encode_batch_fast(texts, add_special_tokens=False)
    assert ids.tolist() == [i for encoding in batch for i in encoding.ids]


def test_a_control_token_spelled_in_text_stays_text():
    ids, _ = ENCODERS["phi35"].encode(["a <|end|> b"])
    assert PHI.token_to_id("<|end|>") not in ids
    assert PHI.decode(ids.tolist()) == "a <|end|> b"


def test_merges_that_cross_words_switch_word_encoding_off():
    crossing = phi_like_tokenizer(crossing=True)
    plain = plain_text_json(crossing)
    assert not splits_at_words(json.loads(plain))
    encoder = make_encoder(plain)
    assert isinstance(encoder, TextEncoder)
    text = "acute heart failure"
    assert encoder.encode([text]).ids.tolist() == crossing.encode(text).ids
    # and for a reason: word by word would give other ids
    num_bytes = _bytes_per_id(json.loads(plain)["model"]["vocab"])
    words_only = WordEncoder(Tokenizer.from_str(plain), num_bytes=num_bytes)
    assert words_only.encode([text]).ids.tolist() != crossing.encode(text).ids


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"byte_fallback": False},
        {"ignore_merges": True},
        {"end_of_word_suffix": "</w>"},
        {"merges": [["a", "\n"]]},
        {"vocab": {"a": 0}},
    ],
)
def test_word_encoding_needs_every_condition(change: dict[str, object]):
    spec = json.loads(plain_text_json(TOY))
    assert splits_at_words(spec)
    assert not splits_at_words({**spec, "model": spec["model"] | change})
    assert not splits_at_words({**spec, "normalizer": {"type": "NFC"}})
    assert not splits_at_words({**spec, "pre_tokenizer": {"type": "Whitespace"}})


def test_forgetting_words_changes_no_id(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mediphi.data.encoding._MAX_WORDS", 2)
    encoder = make_encoder(PLAIN["toy"])
    texts = ["acute fever in the elderly", "heart failure", "acute cough"]
    once = encoder.encode(texts).ids.tolist()
    assert encoder.encode(texts).ids.tolist() == once


@pytest.mark.parametrize("options", [{}, {"shard_tokens": 5}])
def test_decoding_the_store_gives_back_every_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
):
    monkeypatch.setattr("mediphi.data.tokenization._BATCH_CHARACTERS", 1)
    store = toy_store(tmp_path, DOCUMENTS, **options)
    assert len(store.manifest.shards) == (3 if options else 1)
    assert piece_texts(store, TOY) == [
        ("a/1", "summary", "fever  of\n origin "),
        ("a/1", "document", "acute fever"),
        ("a/2", "document", "  heart\n\n\tfailure é 漢"),
        ("b/ü", "document", "cough"),
    ]


def test_the_manifest_counts_what_is_stored(tmp_path: Path):
    manifest = toy_store(tmp_path, DOCUMENTS).manifest
    lengths = {text: len(TOY.encode(text).ids) + 1 for _, _, ps in DOCUMENTS for _, text, *_ in ps}
    assert manifest.num_documents == 3
    assert manifest.num_pieces == 4
    assert manifest.dtype == "<u2"
    assert manifest.num_characters == 11 + 18 + 21 + 5
    counts = {(c.source, c.kind): (c.pieces, c.tokens, c.characters) for c in manifest.counts}
    two, one = lengths["  heart\n\n\tfailure é 漢"], lengths["acute fever"]
    assert counts == {
        ("a", "document"): (2, one + two, 11 + 21),
        ("a", "summary"): (1, lengths["fever  of\n origin "], 18),
        ("b", "document"): (1, lengths["cough"], 5),
    }
    assert manifest.num_tokens == sum(tokens for _, tokens, _ in counts.values())


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path):
    key = StoreKey(tokenizer_sha256(TOY), "r", "wide", "train", eos_id=70_000)
    documents = (Rendered(*document) for document in DOCUMENTS)
    store = build_store(documents, cache=tmp_path, tokenizer=TOY, key=key)
    assert store.manifest.dtype == "<u4"
    assert store.gather(store.piece_starts[1:] - 1).tolist() == [70_000] * 4


def test_workers_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mediphi.data.tokenization._BATCH_CHARACTERS", 1)
    alone = toy_store(tmp_path / "alone", DOCUMENTS)
    pooled = toy_store(tmp_path / "pooled", DOCUMENTS, num_workers=1)
    assert alone.manifest == pooled.manifest


def test_an_existing_store_is_used_without_reading_documents(tmp_path: Path):
    toy_store(tmp_path, DOCUMENTS)

    def unread() -> Iterator[tuple[str, str, list[Piece]]]:
        raise AssertionError("documents were read")
        yield

    store = toy_store(tmp_path, unread())  # type: ignore[arg-type]
    assert store.manifest.num_documents == 3


def test_every_part_of_the_key_changes_the_place():
    key = StoreKey("tokenizer", "render", "data", "train", 7)
    changed = [key._replace(**{name: "other"}) for name in key._fields if name != "eos_id"]
    digests = {k.digest for k in [key, *changed, key._replace(eos_id=8)]}
    assert len(digests) == 6


def test_the_identity_of_a_tokenizer_is_its_content_not_its_control_tokens():
    changed = json.loads(TOY.to_str())
    changed["model"]["merges"].pop()
    assert tokenizer_sha256(Tokenizer.from_str(json.dumps(changed))) != tokenizer_sha256(TOY)
    same = Tokenizer.from_str(TOY.to_str())
    same.enable_truncation(4)
    assert tokenizer_sha256(same) == tokenizer_sha256(TOY)


def test_an_empty_corpus_makes_an_empty_store(tmp_path: Path):
    store = toy_store(tmp_path, [])
    assert (store.num_tokens, store.manifest.num_documents, len(store.pieces)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "pieces.bin", "documents.bin", MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str):
    path = toy_store(tmp_path, DOCUMENTS).path
    content = bytearray((path / name).read_bytes())
    if damage == "truncate":
        (path / name).write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 4
        (path / name).write_bytes(content)
    else:
        (path / name).unlink()
    with pytest.raises(ArtifactError) as refused:
        open_store(path, check_hashes=True)
    message = str(refused.value)
    assert str(path / name) in message and "delete" in message and "\n" not in message
    with pytest.raises(ArtifactError):  # the next run checks on its own
        toy_store(tmp_path, DOCUMENTS)


def test_any_flipped_bit_is_found(tmp_path: Path):
    path = toy_store(tmp_path, DOCUMENTS).path
    rng = np.random.default_rng(0)
    files = sorted(path.iterdir())
    for _ in range(100):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        with pytest.raises(ArtifactError):
            open_store(path, check_hashes=True)
        file.write_bytes(content)
    open_store(path, check_hashes=True)


def test_a_failing_reader_leaves_nothing_behind(tmp_path: Path):
    def failing() -> Iterator[tuple[str, str, list[Piece]]]:
        yield DOCUMENTS[0]
        raise DataError("notes.jsonl:7: not JSON")

    with pytest.raises(DataError, match=r"notes\.jsonl:7"):
        toy_store(tmp_path, failing())  # type: ignore[arg-type]
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_writer._HashedFile, "append", full)
    with pytest.raises(MachineError, match="disk full") as refused:
        toy_store(tmp_path, DOCUMENTS)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_killed_build_is_swept_away_and_built_again(tmp_path: Path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from toy_store import Piece, toy_store\n"
        "def documents():\n"
        "    yield 'a/1', 'a', [Piece('document', 'acute fever')]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "toy_store(Path(sys.argv[1]), documents())\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    assert killed.returncode == -9
    (left,) = (tmp_path / "tokens").iterdir()
    assert left.name.startswith(".")
    store = toy_store(tmp_path, DOCUMENTS)
    assert list((tmp_path / "tokens").iterdir()) == [store.path]


def test_the_loser_of_a_race_uses_the_winners_store(tmp_path: Path):
    def slow() -> Iterator[tuple[str, str, list[Piece]]]:
        yield from DOCUMENTS
        toy_store(tmp_path, DOCUMENTS)  # another builder finishes first

    store = toy_store(tmp_path, slow())  # type: ignore[arg-type]
    assert list((tmp_path / "tokens").iterdir()) == [store.path]
    assert store.path == store_path(tmp_path, store.manifest.key)


def test_more_sources_than_a_byte_holds_are_refused(tmp_path: Path):
    documents = [(f"{i}/1", str(i), [Piece("document", "cough")]) for i in range(256)]
    with pytest.raises(DataError, match="255 sources"):
        toy_store(tmp_path, documents)

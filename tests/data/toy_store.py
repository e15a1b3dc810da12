"""A small Phi-3-like tokenizer and small token stores, for the tests of the data path."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer

from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.render import Piece, Rendered
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore

TEXT = "fever of unknown origin and acute heart failure in the elderly patient with cough"


def phi_like_tokenizer(*, crossing: bool = False) -> Tokenizer:
    """BPE with byte fallback as Phi-3's; `crossing` lets merges run over spaces."""
    trained = Tokenizer(BPE())
    if not crossing:
        trained.pre_tokenizer = Metaspace(split=True)
    text = TEXT if not crossing else TEXT.replace(" ", "▁")
    trained.train_from_iterator([text] * 3, BpeTrainer(vocab_size=150, show_progress=False))
    spec = json.loads(trained.to_str())
    spec["pre_tokenizer"] = None
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    vocab = spec["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    spec["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", rstrip=True)])
    return tokenizer


def toy_store(
    cache: Path,
    documents: Iterable[tuple[str, str, list[Piece]]],
    *,
    data: str = "toy",
    **options: int,
) -> TokenStore:
    tokenizer = phi_like_tokenizer()
    eos_id = tokenizer.token_to_id("<|endoftext|>")
    key = StoreKey(tokenizer_sha256(tokenizer), "test/1", data, "train", eos_id)
    rendered = (Rendered(*document) for document in documents)
    return build_store(rendered, cache=cache, tokenizer=tokenizer, key=key, **options)


def sized_store(cache: Path, lengths: list[tuple[int, ...]], *, source: str = "a") -> TokenStore:
    """One document per entry; the last number is the document's tokens, the others summaries'.

    `~` is not in the vocabulary, so every `~` is one byte token; each piece begins with `▁` and
    ends with EOS, so a piece of `n` tokens needs `n - 2` of them.
    """
    kinds = ["summary"] * 9
    documents = [
        (
            f"{source}/{i}",
            source,
            [Piece("document", "~" * (sizes[-1] - 2))]
            + [Piece(k, "~" * (n - 2)) for k, n in zip(kinds, sizes[:-1], strict=False)],
        )
        for i, sizes in enumerate(lengths)
    ]
    return toy_store(cache, documents, data=f"{source}{lengths}")

"""Train the tiny model's tokenizer on the project's own corpora.

The result stands in assets/models/tiny and is committed. Same build as Phi-3's tokenizer (BPE with
byte fallback, a metaspace for blanks, single digits, Phi-3.5's special tokens and chat template),
only smaller. Documents of medcode come once, the prose corpora as a share, so that codes and
clinical words both get tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mediphi.config import load
from mediphi.data.corpora import read_documents

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "assets" / "models" / "tiny"
PHI = ROOT / "assets" / "models" / "phi35_mini"
VOCAB = 4096
SPECIAL = [  # in the order of their ids in Phi-3.5; only the first stands without rstrip
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]


def texts(corpus: str, share: int) -> Iterator[str]:
    """Every `share`-th document of a bundled corpus, heldout ones left out."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = load(compose("config", [f"corpus={corpus}", f"paths.assets={ROOT}/assets"]))
    with read_documents(config.corpus) as reading:
        yield from (d.text for n, d in enumerate(reading.records("train")) if n % share == 0)


def train() -> Tokenizer:
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"▁*[^▁\d\n]*"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), special_tokens=reserved, show_progress=False
    )
    shares = {"medcode": 1, "clinical": 8, "guidelines": 8, "medwiki": 8, "pubmed": 4}
    tokenizer.train_from_iterator(
        (text for corpus, share in shares.items() for text in texts(corpus, share)), trainer
    )
    return tokenizer


def main() -> None:
    trained = json.loads(train().to_str())
    trained["added_tokens"] = []  # the trainer marks bytes as special; they are plain tokens
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, rstrip=t != SPECIAL[0], normalized=False) for t in SPECIAL]
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "left",
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    template = (PHI / "chat_template.jinja").read_text(encoding="utf-8")
    (FOLDER / "chat_template.jinja").write_text(template, encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens in {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

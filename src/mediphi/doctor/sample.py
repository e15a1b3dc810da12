"""The corpus's first records, through the same reading, rendering and tokenising as training's."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from mediphi.backbone import eos_id
from mediphi.config.corpus import Corpus
from mediphi.data.corpora import SourceCounts, read_documents
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.render import Rendered
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore
from mediphi.preparation import Renderer
from mediphi.records import Record


class Sample(NamedTuple):
    """Some records of every source, on whichever side of the split.

    Attributes:
        records, rendered: by id.
        counts: per source, what became of the rows read.
    """

    store: TokenStore
    records: Mapping[str, Record]
    rendered: Mapping[str, Rendered]
    counts: Mapping[str, SourceCounts]


def take(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, folder: Path, first: int) -> Sample:
    """Read the `first` records of each source, and tokenise them into `folder`.

    Raises:
        UserError: whatever training would refuse about them.
    """
    quarantine, counts = folder / "quarantine.txt", {}
    renderer = Renderer(corpus, tokenizer)
    with read_documents(corpus, quarantine=quarantine, spool_folder=folder, first=first) as reading:
        renderer.begin(reading, quarantine=quarantine, counts=counts)
        records = {record.id: record for record in reading.records()}
        rendered = {one.id: one for one in renderer.rendered(None)}
        key = StoreKey(
            tokenizer=tokenizer_sha256(tokenizer),
            render=renderer.version,
            data="sample",
            split="train",
            eos_id=eos_id(tokenizer),
        )
        store = build_store(rendered.values(), cache=folder, tokenizer=tokenizer, key=key)
        return Sample(store, records, rendered, reading.counts)

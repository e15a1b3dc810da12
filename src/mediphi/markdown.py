"""Pieces of the model cards."""

from collections.abc import Sequence

from mediphi.config.corpus import Licence

USE = (
    "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("model")\n'
    'tokenizer = AutoTokenizer.from_pretrained("model")\n```\n'
)
"""How to load what a card is about."""


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def terms(licence: Licence) -> str:
    """What a user of the model has to know of the text it was trained on."""
    found = ["commercial use" if licence.commercial_ok else "no commercial use"]
    found += ["share alike"] * licence.share_alike + ["data-use agreement"] * licence.dua
    return ", ".join(found + ["health information of persons"] * licence.contains_phi)

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
    """A Markdown table; a `|` in a cell is escaped, as it would end the cell."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def terms(licence: Licence) -> str:
    """What a user of the model has to know of the text it was trained on."""
    found = ["commercial use" if licence.commercial_ok else "no commercial use"]
    found += ["share alike"] * licence.share_alike + ["data-use agreement"] * licence.dua
    return ", ".join(found + ["health information of persons"] * licence.contains_phi)

"""NCBI disease corpus: abstracts with their disease mentions."""

import json
import re
from collections.abc import Iterator

from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Split, Task

DISEASES = Task(
    name="diseases",
    task_type="named entity recognition",
    source="ncbi_disease",
    input_data="Scientific Article",
    level=1,
    output_format="json",
    max_rows=(600, 60),
    phrasings=(
        'Find all disease mentions in the abstract. Output JSON: {{"diseases": [...]}} with each '
        "mention once, as written, in the order of the text.",
        'Extract the diseases that the text names as JSON with the key "diseases" and a list of '
        "strings copied from the text.",
        'Named entity recognition: list every distinct disease mention under "diseases" in a JSON '
        "object.",
        'Mark the diseases in this abstract. Answer with a JSON object {{"diseases": [mentions]}}; '
        "copy the mentions word for word.",
    ),
)
LINES = Task(
    name="disease_lines",
    task_type="named entity recognition",
    source="ncbi_disease",
    input_data="Scientific Article",
    level=0,
    max_rows=(250, 30),
    phrasings=(
        "List the diseases named in this passage, one per line, as they are written.",
        "Which diseases does the text mention? Copy each one on a line of its own.",
        "Extract every disease name from the passage. Output one mention per line.",
        "Write down the disease mentions of the text, each once, one per line.",
    ),
)
PASSAGE_SENTENCES = 3
SENTENCE_END = re.compile(r"(?<=[a-z)\d]\.) (?=[A-Z])")


def candidates(material: Material) -> Iterator[Candidate]:
    """Development abstracts are held out. An abstract is asked whole and by its opening."""
    for document in material.ncbi_disease:
        split: Split = "heldout" if "/devel-" in document.id else "train"
        mentions = [mention for mention, _ in document.facts.get("entities", ())]
        if mentions and all(mention in document.text for mention in mentions):
            wanted = json.dumps({"diseases": mentions}, ensure_ascii=False)
            yield DISEASES.candidate(document.group_id, split, given=document.text, wanted=wanted)
        passage = " ".join(SENTENCE_END.split(document.text)[:PASSAGE_SENTENCES])
        inside = [mention for mention in mentions if stands_in(mention, passage)]
        if inside and all(mention in document.text for mention in mentions):
            wanted = "\n".join(inside)
            yield LINES.candidate(document.group_id, split, given=passage, wanted=wanted)


def stands_in(mention: str, passage: str) -> bool:
    """Whether the passage holds the mention as whole words."""
    return re.search(rf"(?<!\w){re.escape(mention)}(?!\w)", passage) is not None

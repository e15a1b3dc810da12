"""Nigeria Standard Treatment Guidelines 2022: what a page lists, as its published JSON has it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mediphi.data.sources.bundled import normalise
from mediphi.records import Document
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Task, split_by_hash

ASPECTS = Task(
    name="guideline_aspects",
    task_type="aspect-oriented keyword extraction",
    source="nstg",
    input_data="Scientific Article",
    level=3,
    output_format="json",
    phrasings=(
        "Extract from this treatment guideline what it lists for the aspects {aspects}. Output a "
        "JSON object with these keys and lists of strings copied from the text.",
        "For each of the aspects {aspects}, collect the items that the guideline names. Answer as "
        "JSON with one list per aspect.",
        "Aspect-oriented extraction: {aspects}. Return a JSON object from aspect to the terms in "
        "the text.",
        "Read the guideline and fill a JSON object with the keys {aspects}; the values are lists "
        "of the text's own words.",
    ),
)
RELATIONS = Task(
    name="guideline_relations",
    task_type="relation extraction",
    source="nstg",
    input_data="Scientific Article",
    level=3,
    output_format="json",
    phrasings=(
        "List what the guideline relates to the condition, as JSON objects with 'head', "
        "'relation' and 'tail'. Relations: has_complication, has_differential_diagnosis, "
        "investigated_by, treated_with.",
        "Extract relation triples about the condition from this guideline: has_complication, "
        "has_differential_diagnosis, investigated_by, treated_with. Output a JSON list of "
        "objects with head, relation, tail.",
        "Turn the page into a JSON array of relations between the condition and its "
        "complications, differential diagnoses, investigations and drugs (has_complication, "
        "has_differential_diagnosis, investigated_by, treated_with), each with the keys head, "
        "relation and tail.",
        "Which complications, alternative diagnoses, investigations and drugs does the text give "
        "for the condition? Answer with JSON triples: head, relation (has_complication, "
        "has_differential_diagnosis, investigated_by, treated_with), tail.",
    ),
)
RELATION_OF = {
    "complications": "has_complication",
    "differential_diagnoses": "has_differential_diagnosis",
    "investigations": "investigated_by",
    "drugs": "treated_with",
}
MAX_PAGE_CHARACTERS = 3500
MIN_ITEMS = 3


def candidates(material: Material) -> Iterator[Candidate]:
    """Pages whose published lists stand in their text."""
    for page in material.nstg:
        found = listed(page)
        if len(page.text) > MAX_PAGE_CHARACTERS or sum(map(len, found.values())) < MIN_ITEMS:
            continue
        split = split_by_hash(page.group_id, heldout=0.17)
        wanted = json.dumps(found, ensure_ascii=False)
        names = ", ".join(found)
        yield ASPECTS.candidate(page.group_id, split, given=page.text, wanted=wanted, aspects=names)
        triples = [
            {"head": page.title, "relation": RELATION_OF[aspect], "tail": item}
            for aspect, items in found.items()
            for item in items
        ]
        wanted = json.dumps(triples, ensure_ascii=False)
        yield RELATIONS.candidate(page.group_id, split, given=page.text, wanted=wanted)


def listed(page: Document) -> dict[str, list[str]]:
    """Aspects of the published structure, with the items that the text holds word for word."""
    fields: Mapping[str, Any] = page.facts.get("fields", {})
    lists = {name: fields.get(name) for name in RELATION_OF if name != "drugs"}
    lists["drugs"] = (fields.get("treatment") or {}).get("drug")
    text = page.text.replace("\n", " ")
    kept = {}
    for name, items in lists.items():
        strings = [item for item in items or () if isinstance(item, str)]
        inside = [item for item in dict.fromkeys(strings) if item in text and normalise(item)]
        # A list that the structure reworded in part would be an incomplete answer.
        if inside and len(inside) == len(strings):
            kept[name] = inside
    return kept

"""Which MTSamples note a dialogue of MTS-Dialog was written from.

Annotators of MTS-Dialog invented dialogues for sections of published notes. A note and its
dialogues are one document, and belong in one file.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mediphi.data.sources.bundled import normalise
from mediphi.records import Document
from scripts.build_mediflow.leakage import MIN_WHOLE
from scripts.build_mediflow.rows import Split, split_by_hash

HELDOUT_NOTES = 0.12
"""Share of the notes that no dialogue was written from."""


@dataclass
class Origins:
    """Notes by dialogue, and the split of every note.

    Attributes:
        note_of: group of a dialogue -> group of its note, for sections found in one.
        forced: group of a note -> split of its dialogues. A note of both splits is held out;
            its training dialogues are dropped.
    """

    note_of: dict[str, str] = field(default_factory=dict)
    forced: dict[str, Split] = field(default_factory=dict)

    def split_of_note(self, group: str) -> Split:
        return self.forced.get(group) or split_by_hash(group, heldout=HELDOUT_NOTES)


def find_origins(notes: Iterable[Document], dialogues: Iterable[Document]) -> Origins:
    """Look every section of at least `MIN_WHOLE` characters up in the notes."""
    by_opening: dict[str, list[tuple[str, Document]]] = defaultdict(list)
    for dialogue in dialogues:
        section = normalise(dialogue.facts["summary"])
        if len(section) >= MIN_WHOLE:
            by_opening[section[:MIN_WHOLE]].append((section, dialogue))
    origins = Origins()
    for note in notes:
        for dialogue in told_in(normalise(note.text), by_opening):
            origins.note_of.setdefault(dialogue.group_id, note.group_id)
            split = official_split(dialogue)
            if split == "heldout" or note.group_id not in origins.forced:
                origins.forced[note.group_id] = split
    return origins


def told_in(text: str, by_opening: dict[str, list[tuple[str, Document]]]) -> Iterator[Document]:
    """Dialogues whose section stands in `text`."""
    for start in range(len(text) - MIN_WHOLE + 1):
        for section, dialogue in by_opening.get(text[start : start + MIN_WHOLE], ()):
            if text.startswith(section, start):
                yield dialogue


def official_split(dialogue: Document) -> Split:
    """The published validation rows are held out."""
    return "heldout" if "/validation-" in dialogue.id else "train"

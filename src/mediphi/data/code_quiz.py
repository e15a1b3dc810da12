"""Multiple-choice questions "what does code X mean" over the codes of a corpus.

Difficulty follows MedConceptsQA: how near the wrong options stand to the right one in the graph
chapter - section - category - subcategory - code. Hard: distance 2 (siblings; for a category, its
section). Medium: 3 to 5. Easy: anywhere in the same classification.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mediphi.config.stages import Quiz
from mediphi.records import Difficulty, Document, MultipleChoice

PROMPT = "{system} code {code} means"
"""A statement to complete, closed-book: what a small model that never met a question can be asked
(the cloze form of OLMES, arXiv 2406.08446). Rule-based summaries open with the same words, so this
measures recall of the fact, not transfer to another wording."""
DISTANCES: dict[Difficulty, range] = {"medium": range(3, 6), "hard": range(2, 3)}
"""Graph distances of wrong options; a difficulty that is not here draws from everywhere."""

Path = tuple[str, ...]
"""A node of the graph: the classification, then keys from the chapter down."""


class Code(NamedTuple):
    """A code that can be asked or serve as a wrong option."""

    system: str
    code: str
    description: str
    path: Path
    group_id: str


class Asked(NamedTuple):
    """A code with its wrong options at one difficulty."""

    code: Code
    distractors: tuple[Code, ...]


def build_quiz(documents: Sequence[Document], *, quiz: Quiz, seed: int) -> list[MultipleChoice]:
    """Up to `quiz.num_questions` questions for each difficulty, about codes of `documents`.

    Codes that can be asked at every difficulty come first, so that difficulties are compared on
    the same codes; a code with too few wrong options at a distance is not asked there. Options of
    a question are distinct (letter case aside) and none names the code; neither its ancestors nor
    its descendants are wrong options, since their description may hold for it too. The right
    answer stands equally often at each place (to within one). The result depends on the codes and
    the seed, not on the order of the documents.

    Returns:
        Questions by difficulty, then code; `[]` when no document is a code.
    """
    chosen = choose_codes(documents, quiz=quiz, seed=seed)
    return [
        question
        for difficulty in quiz.difficulties
        for question in _questions(chosen[difficulty], difficulty, quiz=quiz, seed=seed)
    ]


class Hierarchy:
    """The graph of chapters, sections and codes, with what is needed to walk it."""

    def __init__(self, codes: Iterable[Code]) -> None:
        self.codes = {code.path: code for code in sorted(codes, key=lambda code: code.path)}
        self.by_system: dict[str, list[Code]] = defaultdict(list)
        below: dict[Path, set[Path]] = defaultdict(set)
        for path, code in self.codes.items():
            self.by_system[code.system].append(code)
            for depth in range(3, len(path) + 1):
                below[path[: depth - 1]].add(path[:depth])
        self.below = {path: sorted(children) for path, children in below.items()}

    def at_distance(self, path: Path, distances: range) -> Iterator[Code]:
        """Codes whose way to `path` has a length in `distances`, up at least once and then down.

        Chapters are not joined to one another, so nothing is reached across them.
        """
        for up in range(1, len(path) - 1):
            top, own = path[: len(path) - up], path[: len(path) - up + 1]
            layer = [child for child in self.below.get(top, ()) if child != own]
            for down in range(1, distances.stop - up):
                if up + down in distances:
                    yield from (self.codes[node] for node in layer if node in self.codes)
                layer = [child for node in layer for child in self.below.get(node, ())]

    def distractors(
        self, code: Code, difficulty: Difficulty, *, count: int, seed: int
    ) -> tuple[Code, ...] | None:
        """`count` wrong options drawn without replacement, or None when there are too few."""
        rng = random.Random(f"{seed}/distractors/{difficulty}/{'/'.join(code.path)}")
        if difficulty in DISTANCES:
            pool = list(self.at_distance(code.path, DISTANCES[difficulty]))
        else:
            pool = self.by_system[code.system]
        taken: dict[str, Code] = {}
        for other in _shuffled(pool, rng):
            text = other.description.casefold()
            if text != code.description.casefold() and _may_stand_beside(code, other):
                taken.setdefault(text, other)
            if len(taken) == count:
                return tuple(taken.values())
        return None


def choose_codes(
    documents: Sequence[Document], *, quiz: Quiz, seed: int
) -> dict[Difficulty, list[Asked]]:
    """Codes to ask, those that serve every difficulty first, as `build_quiz` says."""
    hierarchy = Hierarchy(_codes(documents))
    order = [code for code in hierarchy.codes.values() if not _gives_away(code, code.description)]
    random.Random(f"{seed}/codes").shuffle(order)
    paired: dict[Difficulty, list[Asked]] = {difficulty: [] for difficulty in quiz.difficulties}
    partial: dict[Difficulty, list[Asked]] = {difficulty: [] for difficulty in quiz.difficulties}
    num_paired = 0
    for code in order:
        if num_paired == quiz.num_questions:
            break
        found: dict[Difficulty, Asked] = {}
        for difficulty in paired:
            drawn = hierarchy.distractors(code, difficulty, count=quiz.num_options - 1, seed=seed)
            if drawn is not None:
                found[difficulty] = Asked(code, drawn)
        complete = len(found) == len(paired)
        num_paired += complete
        for difficulty, asked in found.items():
            (paired if complete else partial)[difficulty].append(asked)
    return {
        difficulty: (paired[difficulty] + partial[difficulty])[: quiz.num_questions]
        for difficulty in paired
    }


def _questions(
    asked: list[Asked], difficulty: Difficulty, *, quiz: Quiz, seed: int
) -> Iterator[MultipleChoice]:
    places = [number % quiz.num_options for number in range(len(asked))]
    random.Random(f"{seed}/places/{difficulty}").shuffle(places)
    for (code, distractors), place in zip(
        sorted(asked, key=lambda one: one.code.path), places, strict=True
    ):
        options = [other.description for other in distractors]
        options.insert(place, code.description)
        yield MultipleChoice(
            id=f"{code.system}/{code.code}/{difficulty}",
            prompt=PROMPT.format(system=code.system, code=code.code),
            options=tuple(options),
            answer=place,
            group=difficulty,
        )


def _codes(documents: Iterable[Document]) -> Iterator[Code]:
    for document in documents:
        facts = document.facts
        if "code" not in facts:
            continue
        system = re.sub(r"\s+\d{4}$", "", facts["system"])
        above = [key for key, _ in facts["ancestors"]]
        description = " ".join(facts["description"].split())
        category = facts["code"].partition(".")[0]
        if category not in (*above, facts["code"]):  # lists of billable codes leave categories out
            above.append(category)
        path = (system, *above, facts["code"])
        if description:
            yield Code(system, facts["code"], description, path, document.group_id)


def _shuffled(pool: list[Code], rng: random.Random) -> Iterator[Code]:
    """A random order, drawn lazily: a whole classification is never copied for one question."""
    swapped: dict[int, int] = {}
    for start in range(len(pool)):
        drawn = rng.randrange(start, len(pool))
        yield pool[swapped.get(drawn, drawn)]
        swapped[drawn] = swapped.get(start, start)


def _may_stand_beside(code: Code, other: Code) -> bool:
    shorter = min(len(code.path), len(other.path))
    same_line = code.path[:shorter] == other.path[:shorter]
    return not same_line and not _gives_away(code, other.description)


def _gives_away(code: Code, text: str) -> bool:
    return code.code.casefold() in text.casefold()

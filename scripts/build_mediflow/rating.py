"""Five marks from 1 to 4 by rule, where MediFlow has the mean of a judge's five samples.

Marks are rounded to fifths, as a mean of five whole numbers is. They order rows for a top-K
filter and say nothing about clinical worth.
"""

import json
import math
import re
from collections.abc import Callable

from mediphi.data.sources.bundled import normalise
from scripts.build_mediflow.licences import SOURCES
from scripts.build_mediflow.rows import LEVELS, Candidate

SHORT_INPUT = 12
"""Words below which an input has little of a document."""
BEST_INPUT = 100
"""Words of an input that has room for the task and is still read in one go."""
MASKS = re.compile(r"\[[A-Z]{4,}\]|\b(?:ABC|XYZ|XXXX?)\b|_{3,}")
"""What stands for a removed name."""
SMALL_WORDS_TEXT = """
the a an of and or to in on for with is are was were be by as at from that this it
"""
SMALL_WORDS = frozenset(SMALL_WORDS_TEXT.split())


def rate(row: Candidate) -> dict[str, float]:
    """Quality, alignment, coherence, realism and difficulty."""
    marks = {name: fifths(rule(row)) for name, rule in RULES.items()}
    band = length_band(row)
    mean = (marks["alignment"] + marks["coherence"] + marks["realism"] + band) / 4
    return {"quality": fifths(mean), **marks}


def alignment(row: Candidate) -> float:
    """How much of the output's words the instruction and input hold, or the other way round.

    Four of five words are enough for the highest mark: good summaries and answers are reworded.
    """
    given = content_words(f"{row.instruction} {row.input}")
    asked, answered = content_words(row.input), content_words(row.output)
    forward = len(answered & given) / max(1, len(answered))
    backward = len(asked & answered) / max(1, len(asked))
    return 1 + 3 * min(1.0, 1.25 * max(forward, backward))


def coherence(row: Candidate) -> float:
    """Output in good form: JSON that parses, a label, or sentences with a start and an end."""
    if row.task.output_format == "json":
        return 4.0 if json.loads(row.output) else 3.0
    if len(row.output.split()) <= 3:
        return 3.6
    lines = [line for line in row.output.split("\n") if line.strip()]
    words = row.output.split()
    mark = 4.0
    mark -= 0.6 * (row.output[-1] not in ".!?\"')")
    mark -= 0.4 * (not (row.output[0].isupper() or row.output[0].isdigit()))
    mark -= 0.8 * (len(set(lines)) < len(lines))
    mark -= 0.6 * (len({w.lower() for w in words}) < 0.45 * len(words))
    return max(1.0, mark)


def realism(row: Candidate) -> float:
    """The source's mark, less for masked names and for an input of a few words."""
    mark = SOURCES[row.task.source].realism
    mark -= 0.4 * bool(MASKS.search(row.input))
    mark -= 0.4 * (len(row.input.split()) < SHORT_INPUT)
    return max(1.0, mark)


def difficulty(row: Candidate) -> float:
    """The level's place among the six, raised by words of the output that the input lacks."""
    level = LEVELS.index(row.difficulty_level) / (len(LEVELS) - 1)
    answered = content_words(row.output)
    new = len(answered - content_words(row.input)) / max(1, len(answered))
    return 1 + 3 * (0.75 * level + 0.25 * new)


def length_band(row: Candidate) -> float:
    """4 for an input of `BEST_INPUT` words, 0.75 less for each doubling or halving from there;
    1 less for an output that is longer than the input and than 60 words."""
    num_input, num_output = len(row.input.split()), len(row.output.split())
    mark = 4 - 0.75 * abs(math.log2(num_input / BEST_INPUT))
    return max(1.0, mark - (num_output > max(60, num_input)))


def content_words(text: str) -> set[str]:
    """Distinct words without the small ones."""
    return {word for word in normalise(text).split() if word not in SMALL_WORDS}


def fifths(mark: float) -> float:
    return round(5 * min(4.0, max(1.0, mark))) / 5


RULES: dict[str, Callable[[Candidate], float]] = {
    "alignment": alignment,
    "coherence": coherence,
    "realism": realism,
    "difficulty": difficulty,
}
"""Every mark but quality, which is the mean of the first three and the length band."""

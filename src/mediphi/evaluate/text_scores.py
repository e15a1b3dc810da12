"""How near an answer is to its reference: pure functions on two texts, in [0, 1], 1 is best."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

WORD = re.compile(r"[a-z0-9]+")
CHOICE = re.compile(
    r"\s*(?:(?:the )?(?:correct )?(?:answer|option)(?: is)?[:\s]+)?\(?([a-z])(?:[).:,\n]|\s*$)",
    re.I,
)
"""A lone letter at the start; the article of `A patient` is none."""

Score = Callable[[str, str], float]


def rouge_1(answer: str, reference: str) -> float:
    """ROUGE-1 F1 (Lin 2004): shared words, each as often as both texts have it."""
    return _overlap(Counter(words(answer)), Counter(words(reference)))


def rouge_2(answer: str, reference: str) -> float:
    """ROUGE-2 F1 (Lin 2004): shared pairs of neighbouring words; 0 where a text has no pair."""
    return _overlap(Counter(pairwise(words(answer))), Counter(pairwise(words(reference))))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004, sentence level): longest common subsequence of words."""
    ours, theirs = words(answer), words(reference)
    return _f1(_longest_common_subsequence(ours, theirs), len(ours), len(theirs))


def words(text: str) -> list[str]:
    """Runs of ASCII letters and digits in lower case: rouge-score's words, without its stemmer."""
    return WORD.findall(text.lower())


def exact_match(answer: str, reference: str) -> float:
    """Equal but for case, white space and a final full stop; so a label is judged too."""
    return float(normalised(answer) == normalised(reference))


def normalised(text: str) -> str:
    """In lower case, with single blanks, without blanks around it and a final full stop."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def choice_match(answer: str, reference: str) -> float:
    """Multiple choice: the letter that the answer begins with is the reference's.

    `B`, `b.`, `(B)`, `B) heart failure` and `Answer: B` all choose B. A reference that begins with
    no letter of its own must be matched exactly.
    """
    chosen, right = CHOICE.match(answer), CHOICE.match(reference)
    if right is None:
        return exact_match(answer, reference)
    return float(chosen is not None and chosen[1].casefold() == right[1].casefold())


def line_f1(answer: str, reference: str) -> float:
    """F1 over lines, as `normalised`; two empty texts score 1."""
    ours, theirs = (
        Counter(filter(None, map(normalised, x.splitlines()))) for x in (answer, reference)
    )
    return _item_f1(ours, theirs)


def entity_f1(answer: str, reference: str) -> float:
    """F1 over the items of two JSON texts; an item counts when it is equal as a whole.

    An element of a list is an item (of an entity: text and type together), and so is a value of an
    object under its keys. Strings are compared as `normalised`. Two texts without items score 1 (as
    in eval4ner); an answer that is not JSON, also one inside a code fence, scores 0.

    Raises:
        ValueError: the reference is not JSON.
    """
    theirs = Counter(_items(json.loads(reference)))
    try:
        ours = Counter(_items(json.loads(answer)))
    except (ValueError, RecursionError):
        return 0.0
    return _item_f1(ours, theirs)


BY_TASK: dict[str, Score] = {
    "classification": exact_match,
    "textual entailment": exact_match,
    "multiple-choice question-answering": choice_match,
    "error detection & correction": exact_match,
    "abbreviation expansion": rouge_l,
    "named entity recognition": line_f1,
}
"""Task types that are not judged as prose."""


def score_answer(task_type: str, output_format: str, answer: str, reference: str) -> float:
    """Judge an answer by the metric of its task type, in [0, 1].

    | task type | metric |
    |---|---|
    | any whose `output_format` is json | `entity_f1` |
    | named entity recognition | `entity_f1`, in plain text `line_f1`: an entity a line |
    | classification, textual entailment | `exact_match` of the label |
    | multiple-choice question-answering | `choice_match` |
    | error detection & correction | `exact_match`: a copy that corrects nothing shares most words |
    | abbreviation expansion | `rouge_l`: may be right in part, and order matters |
    | summarization, question-answering, relation extraction, reasoning & diagnosis, | `rouge_1` |
    | text simplification, text expansion, aspect-oriented keyword extraction, note scoring | |

    `entity_f1` needs a reference that is a JSON list or object; another one is judged as plain
    text. Task types that are not listed are prose.
    """
    if (output_format == "json" or task_type == "named entity recognition") and _is_json(reference):
        return entity_f1(answer, reference)
    return BY_TASK.get(task_type, rouge_1)(answer, reference)


def _item_f1(ours: Counter[Any], theirs: Counter[Any]) -> float:
    return _overlap(ours, theirs) if ours or theirs else 1.0


def _overlap(ours: Counter[Any], theirs: Counter[Any]) -> float:
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _f1(shared: int, num_ours: int, num_theirs: int) -> float:
    return 2 * shared / (num_ours + num_theirs) if shared else 0.0


def _longest_common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length, by the two-row table."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        above, row = row, [0]
        for place, other in enumerate(theirs):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[-1]))
    return row[-1]


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _items(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _items(own, (*keys, normalised(key)))
    elif isinstance(value, list):
        yield from ((*keys, _canonical(one)) for one in value)
    else:
        yield (*keys, _canonical(value))


def _canonical(value: Any) -> str:
    """One text for all spellings of a JSON value."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {normalised(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return normalised(value) if isinstance(value, str) else value

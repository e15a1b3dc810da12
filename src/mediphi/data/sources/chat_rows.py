"""A row of MediFlow, or of one of TRL's dataset types -> turns and answers.

Rows mean here what they mean to TRL 1.16 (`trl.data_utils`). What its trainers would drop or learn
in another way than we do is refused, not guessed:

- `tools`, `chat_template_kwargs` and images must be empty;
- a chosen and a rejected answer are one message of the assistant each;
- a conversational prompt ends with the user, and its completion goes on with the assistant;
- `label: false` marks a worse answer (TRL's unpaired preference), not one to learn.

One thing differs: of a completion of several messages TRL learns the user's too, here only the
assistant's are learnt. An answer inside the prompt is context, as in TRL.

Chat texts have no blanks around them; plain texts stay exactly as they are. No reason ever holds
the text.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mediphi.config.corpus import RowFormat
from mediphi.data.sources import messages
from mediphi.data.sources.bundled import content_key
from mediphi.data.sources.checked import checked_text
from mediphi.records import Turn

Row = Mapping[str, Any]

NOT_RENDERED = ("tools", "chat_template_kwargs", "image", "images")
"""Columns that make TRL render more than the messages."""

_MEDIFLOW = ("instruction", "input", "output")
_LABELS = ("task_type", "input_data", "output_format", "difficulty_level")


class Columns(NamedTuple):
    """Columns that a row must have, and may have."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]


COLUMNS: dict[RowFormat, Columns] = {
    "mediflow": Columns(_MEDIFLOW, (*_LABELS, "quality")),
    "mediflow_dpo": Columns((*_MEDIFLOW, "rejected_output"), (*_LABELS, "error_type", "quality")),
    "messages": Columns(("messages",), NOT_RENDERED),
    "prompt_completion": Columns(("prompt", "completion"), ("label", *NOT_RENDERED)),
    "preference": Columns(("chosen", "rejected"), ("prompt", *NOT_RENDERED)),
}


class Dialogue(NamedTuple):
    """What a `Conversation` is made of."""

    turns: tuple[Turn, ...]
    is_chat: bool = True
    num_prompt_turns: int = 0


class Pair(NamedTuple):
    """What a `Preference` is made of."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    is_chat: bool = True


def parts(row: Row, layout: RowFormat) -> Dialogue | Pair:
    """Turns and answers of a row of any format but `text`.

    Raises:
        ValueError: the reason why the row cannot be used.
    """
    needed = COLUMNS[layout].needed
    if missing := next((name for name in needed if name not in row), None):
        raise ValueError(f"field {missing!r} is missing, format={layout} needs {', '.join(needed)}")
    if layout == "mediflow":
        return Dialogue((*_mediflow_prompt(row), Turn("assistant", _chat_text(row, "output"))))
    if layout == "mediflow_dpo":
        prompt = _mediflow_prompt(row)
        chosen, rejected = _chat_text(row, "output"), _chat_text(row, "rejected_output")
        return _different(Pair(prompt, chosen, rejected))
    for name in NOT_RENDERED:
        if not messages.is_void(row.get(name)):
            raise ValueError(f"field {name!r} is not empty, and cannot be rendered")
    if layout == "messages":
        return Dialogue(messages.turns(row["messages"], "messages", last="assistant"))
    if layout == "prompt_completion":
        return _prompt_completion(row)
    return _different(_preference(row))


def labels(row: Row, layout: RowFormat) -> dict[str, str]:
    """MediFlow's description of a row; what is null or empty is left out.

    Raises:
        ValueError: a label is no string.
    """
    if not layout.startswith("mediflow"):
        return {}
    names = (name for name in COLUMNS[layout].optional if name != "quality")
    found = {name: row.get(name) for name in names}
    return {n: checked_text(v, f"field {n!r}") for n, v in found.items() if v not in (None, "")}


def quality(row: Row, layout: RowFormat) -> float | None:
    """The judge's score of a MediFlow row; None: not judged.

    Raises:
        ValueError: no finite number.
    """
    score = row.get("quality") if layout.startswith("mediflow") else None
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"field 'quality' is {type(score).__name__}, expected a number")
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("field 'quality' is not finite")
    return number


def group(made: Dialogue | Pair) -> str:
    """The group of a row: all that answers one prompt belongs together, in all sources and formats.

    The prompt counts by the words of its user turns: its system turn is often the same in all rows,
    and case, spacing and punctuation differ between copies.
    """
    is_pair = isinstance(made, Pair)
    prompt = made.prompt if is_pair else made.turns[: made.num_prompt_turns or None]
    return f"input={content_key(' '.join(turn.text for turn in prompt if turn.role == 'user'))}"


def split_at_common_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and both answers of two texts with the same beginning.

    As in TRL's `extract_prompt` the prompt is the longest common beginning, and one space at its
    end goes to the answers. Unlike there no word is cut ("bl|ue", "bl|ack"), and an answer is never
    blank: where one text is the beginning of the other, both answers get its last word. What the
    answers have in common does not change the difference of their log-probabilities.

    Raises:
        ValueError: no common beginning.
    """
    end = max(0, min(len(text.rstrip()) - 1 for text in (chosen, rejected)))
    at = next((i for i in range(end) if chosen[i] != rejected[i]), end)
    while at > 0 and any(_is_inside_word(text, at) for text in (chosen, rejected)):
        at -= 1
    if at > 0 and chosen[at - 1] == " ":
        at -= 1
    if _is_blank(chosen[:at]):
        raise ValueError("fields 'chosen' and 'rejected' have no common beginning, and no 'prompt'")
    return chosen[:at], chosen[at:], rejected[at:]


def _is_inside_word(text: str, at: int) -> bool:
    return text[at - 1].isalnum() and text[at].isalnum()


def _mediflow_prompt(row: Row) -> tuple[Turn, ...]:
    """Instruction and document; Phi's format needs a user turn, so an instruction alone is one."""
    instruction = _chat_text(row, "instruction")
    if _is_blank(row["input"]):
        return (Turn("user", instruction),)
    return Turn("system", instruction), Turn("user", _chat_text(row, "input"))


def _prompt_completion(row: Row) -> Dialogue:
    prompt, completion = row["prompt"], row["completion"]
    if row.get("label") is False:
        raise ValueError("field 'label' is false: a worse answer, not one to learn")
    if isinstance(prompt, str) and isinstance(completion, str):
        user = Turn("user", checked_text(prompt, "field 'prompt'"))
        answer = Turn("assistant", checked_text(completion, "field 'completion'"))
        return Dialogue((user, answer), is_chat=False)
    turns = messages.turns(prompt, "prompt", last="user")
    learnt = messages.turns(completion, "completion", last="assistant", continues=True)
    return Dialogue((*turns, *learnt), num_prompt_turns=len(turns))


def _preference(row: Row) -> Pair:
    """TRL's explicit and implicit prompts.

    Beside whole conversations a `prompt` in plain text is ignored by TRL; here it must be one of
    their user turns.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _plain_preference(prompt, chosen, rejected)
    if isinstance(prompt, list | tuple):
        turns = messages.turns(prompt, "prompt", last="user")
        worse = messages.answer(rejected, "rejected")
        return Pair(turns, messages.answer(chosen, "chosen"), worse)
    better = messages.turns(chosen, "chosen", last="assistant")
    worse = messages.turns(rejected, "rejected", last="assistant")
    if better[:-1] != worse[:-1]:
        raise ValueError("fields 'chosen' and 'rejected' differ before their last message")
    if prompt is not None and Turn("user", _chat_text(row, "prompt")) not in better:
        raise ValueError("field 'prompt' is no message of the user in field 'chosen'")
    return Pair(better[:-1], better[-1].text, worse[-1].text)


def _plain_preference(prompt: object, chosen: str, rejected: str) -> Pair:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        checked_text(text, f"field {name!r}")
    if prompt is None:
        prompt, chosen, rejected = split_at_common_prompt(chosen, rejected)
    user = Turn("user", checked_text(prompt, "field 'prompt'"))
    return Pair((user,), chosen, rejected, is_chat=False)


def _different(pair: Pair) -> Pair:
    if pair.chosen == pair.rejected:
        raise ValueError("the chosen and the rejected answer are the same")
    return pair


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _chat_text(row: Row, name: str) -> str:
    return checked_text(row[name], f"field {name!r}").strip()

"""Lists of `{"role", "content"}`, as TRL and chat templates have them, -> turns.

Texts lose the blanks around them, because the chat format's tokens swallow them. What a message
holds besides role and text (tool calls, reasoning, images) is refused: it cannot be rendered.
"""

from collections.abc import Mapping
from typing import cast

from mediphi.data.sources.checked import checked_text
from mediphi.records import ROLES, Role, Turn


def turns(value: object, name: str, *, last: Role, continues: bool = False) -> tuple[Turn, ...]:
    """A system turn first or none, then user and assistant in turn.

    An empty system message is left out, as Phi's template does.

    Args:
        value: the messages.
        name: their column, for reasons.
        last: role of the last message.
        continues: they go on behind a user's turn: no system turn, the assistant first.

    Raises:
        ValueError: the reason; it never holds the text.
    """
    found = [_turn(m, f"message {n} of field {name!r}") for n, m in _numbered(value, name)]
    first = 0
    if not continues:
        found = found[1:] if found[0] == ("system", "") else found
        first = 1 if found and found[0].role == "system" else 0
    for number, turn in enumerate(found[first:], start=int(continues)):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise ValueError(f"field {name!r} has {turn.role} where {expected} is due")
    if len(found) == first or found[-1].role != last:
        raise ValueError(f"field {name!r} must end with a message of the {last}")
    return tuple(found)


def answer(value: object, name: str) -> str:
    """The text of the one message of the assistant.

    Raises:
        ValueError: the reason; it never holds the text.
    """
    messages = _numbered(value, name)
    if len(messages) != 1:
        raise ValueError(f"field {name!r} has {len(messages)} messages, expected one")
    role, text = _turn(messages[0][1], f"message 1 of field {name!r}")
    if role != "assistant":
        raise ValueError(f"message 1 of field {name!r} is of the {role}, expected the assistant")
    return text


def is_void(value: object) -> bool:
    """Null, empty, or a record of nothing but nulls, as Arrow fills it in."""
    if isinstance(value, Mapping):
        return all(map(is_void, value.values()))
    return value is None or value in ("", "[]", "{}", [], ())


def _numbered(value: object, name: str) -> list[tuple[int, object]]:
    if not isinstance(value, list | tuple):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"field {name!r} is {kind}, expected a list of messages")
    if not value:
        raise ValueError(f"field {name!r} is empty")
    return list(enumerate(value, start=1))


def _turn(message: object, what: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{what} is {type(message).__name__}, expected role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{what} has none of the roles {', '.join(ROLES)}")
    _refuse_more(message, ("role", "content"), what)
    content = message.get("content")
    text = _joined(content, what) if isinstance(content, list | tuple) else content
    if role == "system" and (text is None or text == "" or str(text).isspace()):
        return Turn("system", "")
    return Turn(cast(Role, role), checked_text(text, what).strip())


def _joined(content: list[object] | tuple[object, ...], what: str) -> str:
    """Text given in parts, put together as chat templates do."""
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ValueError(f"{what} has a part that is no text")
        _refuse_more(part, ("type", "text"), what)
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{what} has a part without a text")
        texts.append(part["text"])
    return "".join(texts)


def _refuse_more(item: Mapping[str, object], known: tuple[str, ...], what: str) -> None:
    if not all(key in known or is_void(value) for key, value in item.items()):
        raise ValueError(f"{what} has more than {' and '.join(known)}, which cannot be rendered")

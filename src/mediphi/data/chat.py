"""Conversations in Phi-3.5's chat format, as pieces whose kind says what is learnt.

    <|system|> instruction <|end|> <|user|> document <|end|> <|assistant|> answer <|end|>

The tokens between angle brackets are ids, so no text can forge them. They swallow the blanks
behind them, newlines of the template included; texts come without blanks around them. An `answer`
piece is the answer's text and its `<|end|>`: exactly what SFT learns. Its `<|assistant|>` belongs
to the turn before.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from mediphi.data.encoding import make_encoder, plain_text_json
from mediphi.data.render import Piece, Rendered, neutralise
from mediphi.errors import UserError
from mediphi.records import Conversation, PieceKind, Preference, Turn

CHAT_VERSION = "chat/2"
"""Part of every cache key; raise it when the ids of any conversation change."""

TALK = (
    Turn("system", "Be brief."),
    Turn("user", "Is it a cough?"),
    Turn("assistant", "Yes."),
    Turn("user", "Since when?"),
    Turn("assistant", "For two days."),
)
"""What every template of the format renders alike."""


class ControlIds(NamedTuple):
    """Ids of the chat format's tokens, and of the end of text."""

    system: int
    user: int
    assistant: int
    end: int
    end_of_text: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "ControlIds":
        names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
        vocabulary = tokenizer.get_vocab()
        if missing := [name for name in names if name not in vocabulary]:
            raise UserError(f"the tokenizer lacks {', '.join(missing)} of Phi-3.5's chat format")
        return cls(*(vocabulary[name] for name in names))


class ChatRenderer:
    """Renders conversations and preferences for one tokenizer.

    Raises:
        UserError: the tokenizer lacks a token of the format, or its chat template is another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids = ControlIds.of(tokenizer)
        self._encoder = make_encoder(plain_text_json(tokenizer))
        self._refuse_other_template()

    @property
    def version(self) -> str:
        """Changes with everything but the text that decides the ids, and which rows are proven."""
        template = sha256(str(self._tokenizer.chat_template).encode()).hexdigest()[:8]
        return f"{CHAT_VERSION} {','.join(map(str, self._ids))} {template}"

    def conversation(self, conversation: Conversation) -> Rendered:
        """System and user turns are context, every answer behind the prompt is learnt."""
        record = conversation
        if record.is_chat:
            prompt = self._turns(record.turns[: record.num_prompt_turns], answers="context")
            rest = self._turns(record.turns[record.num_prompt_turns :], answers="answer")
            pieces = [*prompt, *rest]
        else:
            asked, completion = (neutralise(turn.text) for turn in record.turns)
            context, (answer,) = self._plain(asked, [completion])
            pieces = [context, Piece("answer", "", answer, (self._ids.end_of_text,))]
        return Rendered(record.id, record.source, pieces, record.labels)

    def preference(self, preference: Preference) -> Rendered:
        """The prompt once, then both answers."""
        record = preference
        end = (self._ids.end,) if record.is_chat else (self._ids.end_of_text,)
        if record.is_chat:
            prompt = self._turns(record.prompt, answers="context")
            sides = [Piece("chosen", neutralise(record.chosen), (), end)]
            sides.append(Piece("rejected", neutralise(record.rejected), (), end))
        else:
            texts = [neutralise(record.chosen), neutralise(record.rejected)]
            context, (chosen, rejected) = self._plain(neutralise(record.prompt[0].text), texts)
            prompt = [context]
            sides = [Piece("chosen", "", chosen, end), Piece("rejected", "", rejected, end)]
        return Rendered(record.id, record.source, [*prompt, *sides], record.labels)

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a chat prompt up to `<|assistant|>`, to be answered."""
        return self.ids(self._turns(turns, answers="context"))

    def ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of pieces, end to end."""
        encoded = self._encoder.encode([piece.text for piece in pieces])
        ids, start = [], 0
        for piece, length in zip(pieces, encoded.lengths.tolist(), strict=True):
            text = encoded.ids[start : start + length].tolist()
            start += length
            ids += [*piece.prefix, *text, *(piece.suffix or ())]
        return ids

    def prove(self, record: Conversation | Preference, rendered: Rendered) -> None:
        """Compare with the tokenizer's own chat template, token by token.

        For each answer the ids of prompt and answer must be the template's, and those that are
        learnt must decode to the answer's text and its `<|end|>`. Of plain text the ids that are
        not learnt must decode to a beginning of the prompt, and all to prompt and answer.

        Raises:
            ValueError: the reason why the row cannot be used; it never holds the text.
        """
        turns, pieces = _whole(record), list(rendered.pieces)
        if not record.is_chat:
            is_pair = isinstance(record, Preference)
            answers = [record.chosen, record.rejected] if is_pair else [turns[1].text]
            context, *learnt = pieces
            for answer, piece in zip(answers, learnt, strict=True):
                self._prove_plain(turns[0].text, answer, context, piece)
        elif isinstance(record, Preference):
            *prompt, chosen, rejected = pieces
            self._prove([*turns, Turn("assistant", record.chosen)], [*prompt, chosen])
            self._prove([*turns, Turn("assistant", record.rejected)], [*prompt, rejected])
        else:
            self._prove(turns, pieces)

    def _refuse_other_template(self) -> None:
        """A fault of the model is told as one, not as one of every row."""
        try:
            self._prove(TALK, self._turns(TALK, answers="answer"))
        except ValueError:
            raise UserError(
                f"{self._tokenizer.name_or_path}: the tokenizer's chat template gives other tokens "
                "than Phi-3.5's chat format; take a model whose template is Phi-3.5's"
            ) from None

    def _prove(self, turns: Sequence[Turn], pieces: Sequence[Piece]) -> None:
        messages = [{"role": turn.role, "content": neutralise(turn.text)} for turn in turns]
        try:
            text: Any = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError:
            raise ValueError("the tokenizer's chat template refuses this row") from None
        theirs = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        ours = self.ids(pieces)
        if theirs not in (ours, [*ours, self._ids.end_of_text]):
            raise ValueError("the tokenizer's chat template gives other tokens for this row")
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        learnt = [piece for piece in pieces if piece.kind in ("answer", "chosen", "rejected")]
        for answer, piece in zip(answers[-len(learnt) :], learnt, strict=True):
            decoded = str(self._tokenizer.decode(self.ids([piece])[:-1]))
            if decoded.strip() != neutralise(answer).replace("▁", " ").strip():
                raise ValueError("the tokens of an answer do not decode to the answer")

    def _prove_plain(self, prompt: str, answer: str, context: Piece, learnt: Piece) -> None:
        asked, said = (neutralise(text).replace("▁", " ") for text in (prompt, answer))
        begun = self._decoded(context.prefix)
        together = self._decoded((*context.prefix, *learnt.prefix)) == (asked + said).strip()
        apart = (begun, self._decoded(learnt.prefix)) == (asked.strip(), said.strip())
        if not (asked.lstrip().startswith(begun) and (together or apart)):
            raise ValueError("the tokens of prompt and answer do not decode to them")

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids))).strip()

    def _turns(self, turns: Sequence[Turn], *, answers: PieceKind) -> list[Piece]:
        ids, pieces = self._ids, []
        for turn in turns:
            text = neutralise(turn.text)
            if turn.role == "system":
                pieces.append(Piece("system", text, (ids.system,), (ids.end,)))
            elif turn.role == "user":
                pieces.append(Piece("user", text, (ids.user,), (ids.end, ids.assistant)))
            else:
                pieces.append(Piece(answers, text, (), (ids.end,)))
        return pieces

    def _plain(self, prompt: str, answers: list[str]) -> tuple[Piece, list[tuple[int, ...]]]:
        """A prompt in plain text and its continuations, tokenised together.

        Where a token spans the boundary it belongs to the answers, as it does in TRL. Where that
        would leave nothing of the prompt, prompt and answers are tokenised apart.
        """
        texts = [prompt, *(prompt + answer for answer in answers)]
        rows = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        shared = 0
        while all(len(row) > shared and row[shared] == rows[0][shared] for row in rows):
            shared += 1
        if not shared:
            apart = self._tokenizer(answers, add_special_tokens=False)["input_ids"]
            return Piece("user", "", tuple(rows[0]), ()), [tuple(row) for row in apart]
        context = Piece("user", "", tuple(rows[0][:shared]), ())
        return context, [tuple(row[shared:]) for row in rows[1:]]


def _whole(record: Conversation | Preference) -> list[Turn]:
    return list(record.prompt if isinstance(record, Preference) else record.turns)

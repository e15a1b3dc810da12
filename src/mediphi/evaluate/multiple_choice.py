"""Multiple choice by length-normalised log-likelihood.

An option's score is the mean log-probability of its tokens given the prompt (Brown et al. 2020,
section 2.4, without their unconditional term); the highest score is the prediction. Knows no
model: a function that turns token ids into log-probabilities is an argument.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mediphi.errors import UserError
from mediphi.evaluate.scores import Scored
from mediphi.records import MultipleChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TokenLogps = Callable[[Sequence[Sequence[int]]], Sequence[np.ndarray]]
"""Token ids of whole sequences -> for each the log-probabilities of its tokens 1..len-1 given all
before them, `[len - 1]`, floating point, in nats. Sequences must not see one another."""


class EncodedQuestion(NamedTuple):
    """`sequences` hold prompt and option; their first `num_shared` ids are equal and not scored."""

    sequences: list[list[int]]
    num_shared: int

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)


class ScoredQuestion(NamedTuple):
    """What a model answered.

    Attributes:
        id, group, answer, cluster: as in the question.
        prediction: index of the option with the highest score; the first one of equals.
        option_logps: mean log-probability per token of each option, in nats.
    """

    id: str
    group: str
    answer: int
    prediction: int
    option_logps: tuple[float, ...]
    cluster: str | None = None

    @property
    def correct(self) -> bool:
        return self.prediction == self.answer

    def scored(self) -> Scored:
        chance = 1 / len(self.option_logps)
        return Scored(self.id, self.group, float(self.correct), chance, self.cluster)


def score(
    questions: Sequence[MultipleChoice],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    token_logps: TokenLogps,
    max_tokens_per_pass: int = 8192,
) -> list[ScoredQuestion]:
    """Answers all questions, in their order.

    `token_logps` is called with whole questions of similar length, as many as fit into
    `max_tokens_per_pass` tokens (one alone may be longer). Scores do not depend on that number.

    Raises:
        UserError: a log-probability is not finite, or a prompt is too short to be context.
        ValueError: `token_logps` returned another number or length of arrays than asked for.
    """
    encoded = [encode(question, tokenizer=tokenizer) for question in questions]
    scored: dict[int, ScoredQuestion] = {}
    for group in _passes(encoded, max_tokens_per_pass):
        sequences = [ids for place in group for ids in encoded[place].sequences]
        logps = token_logps(sequences)
        if [len(row) for row in logps] != [len(ids) - 1 for ids in sequences]:
            raise ValueError("token_logps must return len - 1 numbers for each sequence")
        rows = iter(logps)
        for place in group:
            first = encoded[place].num_shared - 1
            own = [next(rows)[first:] for _ in encoded[place].sequences]
            scored[place] = judge(questions[place], own)
    return [scored[place] for place in range(len(questions))]


def encode(question: MultipleChoice, *, tokenizer: "PreTrainedTokenizerBase") -> EncodedQuestion:
    """Tokenises prompt and option together, as a model meets them in running text.

    The option follows after one blank, unless the prompt ends in white space. Tokenised apart, a
    metaspace tokenizer would start the option with a blank of its own, and a token that spans the
    border would never occur. Scored is everything after the longest run of tokens that lies
    wholly inside the prompt and is equal for all options: so all options are conditioned on the
    same context, and a token across the border counts as the option's. No special tokens are added.

    Raises:
        UserError: nothing of the prompt is left as context.
    """
    prompt = question.prompt
    blank = "" if prompt[-1:].isspace() else " "
    texts = [f"{prompt}{blank}{option}" for option in question.options]
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    inside = [sum(end <= len(prompt) for _, end in spans) for spans in coded["offset_mapping"]]
    sequences = [list(ids) for ids in coded["input_ids"]]
    num_shared = 0
    for place in range(min(inside)):
        if len({ids[place] for ids in sequences}) > 1:
            break
        num_shared += 1
    if num_shared == 0 or any(len(ids) == num_shared for ids in sequences):
        raise UserError(f"question {question.id}: prompt or an option has no token to score with")
    return EncodedQuestion(sequences, num_shared)


def padded_logps(model: "PreTrainedModel") -> TokenLogps:
    """The plain reference for any Hugging Face causal LM: one right-padded batch with its mask.

    No cache and float32 log-softmax; the model is put into eval mode for the call and back after
    it. Never mixes sequences, but holds the logits of the whole batch.
    """
    import torch
    from torch.nn.functional import cross_entropy

    @torch.inference_mode()
    def token_logps(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        rows = [torch.tensor(ids, device=model.device) for ids in sequences]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
        training = model.training
        model.eval()
        try:
            logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits
        finally:
            model.train(training)
        losses = (
            cross_entropy(logits[place, : len(row) - 1].float(), row[1:], reduction="none")
            for place, row in enumerate(rows)
        )
        return [-loss.cpu().numpy() for loss in losses]

    return token_logps


def _passes(encoded: Sequence[EncodedQuestion], max_tokens: int) -> Iterator[list[int]]:
    """Groups of whole questions, longest first, so that too large a group fails at once."""
    group: list[int] = []
    used = 0
    longest_first = sorted(range(len(encoded)), key=lambda i: -encoded[i].num_tokens)
    for place in longest_first:
        if group and used + encoded[place].num_tokens > max_tokens:
            yield group
            group, used = [], 0
        group.append(place)
        used += encoded[place].num_tokens
    if group:
        yield group


def judge(question: MultipleChoice, logps: Sequence[np.ndarray]) -> ScoredQuestion:
    """The answer by the log-probabilities of each option's own tokens, `[tokens]`, in nats.

    Raises:
        UserError: one is not finite.
    """
    means = tuple(float(row.mean(dtype=np.float64)) for row in logps)
    if not np.isfinite(means).all():
        raise UserError(
            f"question {question.id}: log-probabilities are not finite; "
            "the model's weights are damaged or its training diverged"
        )
    return ScoredQuestion(
        id=question.id,
        group=question.group,
        answer=question.answer,
        prediction=int(np.argmax(means)),
        option_logps=means,
        cluster=question.cluster,
    )


def baselines(questions: Sequence[MultipleChoice]) -> dict[str, float]:
    """Accuracy of rules that know nothing; ties count as guessing among the best.

    `first`: the first option. `longest`, `shortest`: by characters. `overlap`: the option that
    shares the largest part of its words with the prompt. `chance`: guessing.

    Raises:
        ValueError: no questions.
    """
    if not questions:
        raise ValueError("no questions have no accuracy")
    rules: dict[str, Callable[[MultipleChoice, int], float]] = {
        "first": lambda _, place: -place,
        "longest": lambda asked, place: len(asked.options[place]),
        "shortest": lambda asked, place: -len(asked.options[place]),
        "overlap": lambda asked, place: _overlap(asked.prompt, asked.options[place]),
        "chance": lambda *_: 0,
    }
    return {
        name: float(np.mean([_hit(q, rule) for q in questions])) for name, rule in rules.items()
    }


def _hit(question: MultipleChoice, rule: Callable[[MultipleChoice, int], float]) -> float:
    marks = [rule(question, place) for place in range(len(question.options))]
    best = [place for place, mark in enumerate(marks) if mark == max(marks)]
    return (question.answer in best) / len(best)


def _overlap(prompt: str, option: str) -> float:
    there, own = set(prompt.casefold().split()), set(option.casefold().split())
    return len(own & there) / len(own)

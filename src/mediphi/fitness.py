"""A model's fitness: mean accuracy over sets of multiple-choice questions, by log-likelihood.

Hundreds of candidates of a search answer the same questions, so these are tokenised, packed and
sent to the device once. A prompt is forwarded once for all its options, and only the options'
tokens meet the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mediphi import attention
from mediphi.batches import send
from mediphi.blocks import Blocks
from mediphi.engine import Device
from mediphi.evaluate.multiple_choice import EncodedQuestion, encode, judge
from mediphi.evaluate.scores import Scored
from mediphi.modules.row_logps import row_logps
from mediphi.records import MultipleChoice

TOKENS_PER_PASS = {"cuda": 32_768, "cpu": 2_048}
NUM_ROUNDS = 10
"""Of a scoring that may be stopped after each: more stop earlier, and fill their passes less."""


class Progress(NamedTuple):
    """How far a set is: questions answered rightly, answered at all, and asked."""

    correct: int
    done: int
    total: int


Hopeless = Callable[[Mapping[str, Progress]], bool]
"""Looks at every set between passes or rounds; True stops the scoring."""


class Pass(NamedTuple):
    """Questions of one forward pass, end to end in one row, each prompt before its options.

    Attributes:
        places: of the questions in `EncodedSets.questions`.
        input_ids, position_ids: int64 `[1, tokens]`; all options go on from the prompt's position.
        logit_index: int64 `[option_tokens]`, the position that predicts each of `label_ids`.
        label_ids: int64 `[option_tokens]`, question by question, option by option.
        lengths: tokens of each option in that order.
        boundaries: keyword arguments of the model call that keep everything apart.
    """

    places: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    logit_index: Tensor
    label_ids: Tensor
    lengths: tuple[int, ...]
    boundaries: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EncodedSets:
    """Questions of all sets, ready for any model with this tokenizer on this device.

    Attributes:
        encoded, set_names: of each question.
        looks: numbers of passes done after which the scoring may be stopped.
        limit, long_above: as in `encode_sets`.
    """

    questions: tuple[MultipleChoice, ...]
    encoded: tuple[EncodedQuestion, ...]
    set_names: tuple[str, ...]
    passes: tuple[Pass, ...]
    looks: frozenset[int]
    device: Device
    limit: int
    long_above: int | None

    @property
    def num_tokens(self) -> int:
        return sum(one.input_ids.shape[1] for one in self.passes)


class SetScores(NamedTuple):
    """What a model was given.

    Attributes:
        scored: set -> its questions in their order; those answered where `is_complete` is False.
        is_complete: False after an early stop.
    """

    scored: dict[str, list[Scored]]
    is_complete: bool

    @property
    def fitness(self) -> float:
        """Mean over the sets of their accuracies, every set alike whatever its size; of those that
        have an answer, where the scoring was stopped."""
        return fmean(fmean(one.score for one in own) for own in self.scored.values() if own)


def encode_sets(
    sets: Mapping[str, Sequence[MultipleChoice]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
    long_above: int | None = None,
    tokens_per_pass: int | None = None,
) -> EncodedSets:
    """Tokenises and packs all questions, longest first.

    Args:
        sets: questions by the set's name.
        tokenizer: of all models to come.
        device: with a kernel that shares prompts, varlen or sdpa.
        long_above: where LongRoPE changes its factors (`backbone.original_positions`): it goes by
            the longest of a pass, so a pass never holds questions of both sides.
        tokens_per_pass: at most so many, unless one question is longer; None: by the device.

    Raises:
        UserError: a question without a token to score, or the flash kernel.
    """
    questions = tuple(question for own in sets.values() for question in own)
    whole = EncodedSets(
        questions=questions,
        encoded=tuple(encode(question, tokenizer=tokenizer) for question in questions),
        set_names=tuple(name for name, own in sets.items() for _ in own),
        passes=(),
        looks=frozenset(),
        device=device,
        limit=tokens_per_pass or TOKENS_PER_PASS[device.type],
        long_above=long_above,
    )
    passes = tuple(_packed(whole, range(len(questions))))
    return replace(whole, passes=passes, looks=frozenset(range(1, len(passes))))


def in_rounds(sets: EncodedSets, *, seed: Sequence[int]) -> EncodedSets:
    """The same questions, packed anew in rounds that each have as many of every set as the others.

    Which ones is drawn at random, and so is what has been answered at every look: a sample without
    replacement of each set, whose size follows from that of the set alone. Length, place and number
    of options of a question tell nothing about its round.

    Args:
        seed: another one for every model that is scored, see `merge.search.evaluation`.
    """
    random = np.random.default_rng(seed)
    rounds: list[list[int]] = [[] for _ in range(NUM_ROUNDS)]
    names = np.array(sets.set_names)
    for name in dict.fromkeys(sets.set_names):
        drawn = random.permutation(np.flatnonzero(names == name))
        for own, part in zip(rounds, np.array_split(drawn, NUM_ROUNDS), strict=True):
            own += part.tolist()
    packed = [tuple(_packed(sets, own)) for own in rounds if own]
    ends = accumulate(map(len, packed))
    return replace(sets, passes=tuple(one for own in packed for one in own), looks=frozenset(ends))


def score_sets(
    model: PreTrainedModel, sets: EncodedSets, *, hopeless: Hopeless | None = None
) -> SetScores:
    """Answers every question, or stops where `hopeless` says so at one of the sets' looks.

    The model is on the device, with the attention implementation of the device's kernel, and is put
    into eval mode for the call and back after it. Precision: as stated by the device.

    Raises:
        UserError: log-probabilities that are not finite.
    """
    scored: dict[int, Scored] = {}
    training = model.training
    model.eval()
    try:
        for number, (one, logps) in enumerate(
            zip(sets.passes, _logps(model, sets), strict=False), start=1
        ):
            ends = np.cumsum(one.lengths)[:-1]
            rows = iter(np.split(logps, ends))
            for place in one.places:
                question = sets.questions[place]
                answer = judge(question, [next(rows) for _ in question.options])
                scored[place] = answer.scored()
            is_complete = len(scored) == len(sets.questions)
            if is_complete or hopeless is None or number not in sets.looks:
                continue
            if hopeless(_progress(sets, scored)):
                break
    finally:
        model.train(training)
    by_set: dict[str, list[Scored]] = {name: [] for name in sets.set_names}
    for place in sorted(scored):
        by_set[sets.set_names[place]].append(scored[place])
    return SetScores(by_set, is_complete=len(scored) == len(sets.questions))


def _progress(sets: EncodedSets, scored: Mapping[int, Scored]) -> dict[str, Progress]:
    counts = {name: [0, 0, 0] for name in sets.set_names}
    for place, name in enumerate(sets.set_names):
        counts[name][2] += 1
        if place in scored:
            counts[name][0] += int(scored[place].score)
            counts[name][1] += 1
    return {name: Progress(*own) for name, own in counts.items()}


def _logps(model: PreTrainedModel, sets: EncodedSets) -> Iterator[np.ndarray]:
    """Log-probabilities of each pass's `label_ids`, float32 `[option_tokens]`."""
    for one in sets.passes:
        logps = row_logps(
            model,
            {"input_ids": one.input_ids, "position_ids": one.position_ids} | one.boundaries,
            index=one.logit_index,
            label_ids=one.label_ids,
            autocast=sets.device.precision == "bf16-mixed",
        )
        yield logps.float().cpu().numpy()


def _packed(sets: EncodedSets, places: Iterable[int]) -> Iterator[Pass]:
    for own in _groups(sets, places):
        yield _pass(own, [sets.encoded[place] for place in own], sets.device)


def _groups(sets: EncodedSets, places: Iterable[int]) -> Iterator[list[int]]:
    """Questions of a pass: equally many options, one side of `long_above`, longest first."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    above = sets.long_above
    for place in places:
        sequences = sets.encoded[place].sequences
        is_long = above is not None and max(map(len, sequences)) > above
        kinds.setdefault((len(sequences), is_long), []).append(place)
    for own in kinds.values():
        group: list[int] = []
        used = 0
        for place in sorted(own, key=lambda place: -_row_tokens(sets.encoded[place])):
            tokens = _row_tokens(sets.encoded[place])
            if group and used + tokens > sets.limit:
                yield group
                group, used = [], 0
            group.append(place)
            used += tokens
        yield group


def _row_tokens(one: EncodedQuestion) -> int:
    return one.num_tokens - (len(one.sequences) - 1) * one.num_shared


def _pass(places: Sequence[int], encoded: Sequence[EncodedQuestion], device: Device) -> Pass:
    ids: list[int] = []
    positions: list[int] = []
    index: list[int] = []
    labels: list[int] = []
    parts, lengths = [0], []
    for one in encoded:
        shared, last = one.num_shared, len(ids) + one.num_shared - 1
        ids += one.sequences[0][:shared]
        positions += range(shared)
        parts.append(shared)
        for option in (sequence[shared:] for sequence in one.sequences):
            index += [last, *range(len(ids), len(ids) + len(option) - 1)]
            ids += option
            positions += range(shared, shared + len(option))
            labels += option
            parts.append(len(option))
            lengths.append(len(option))
    bounds = torch.tensor(list(accumulate(parts)), dtype=torch.int32)
    made = attention.shared_prompt_boundaries(
        bounds, device.kernel, num_answers=len(encoded[0].sequences)
    )
    return Pass(
        tuple(places),
        send(torch.tensor([ids]), device.type),
        send(torch.tensor([positions]), device.type),
        send(torch.tensor(index), device.type),
        send(torch.tensor(labels), device.type),
        tuple(lengths),
        {name: _sent(value, device.type) for name, value in made.items()},
    )


def _sent(value: Any, device: str) -> Any:
    if isinstance(value, Blocks):
        return value.to(torch.device(device))
    return send(value, device) if isinstance(value, Tensor) else value

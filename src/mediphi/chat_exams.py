"""Exams of SFT and DPO, on held-out conversations of the token store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerFast

from mediphi.backbone import BackboneSpec
from mediphi.data.heldout_prompts import HeldoutPrompt
from mediphi.data.tokens import TokenStore
from mediphi.engine import Device
from mediphi.evaluate.scores import Scored, Unit
from mediphi.evaluate.text_scores import score_answer
from mediphi.generation import answer
from mediphi.modules.meters import UNNAMED, preferred
from mediphi.records import LABELS, PIECE_KINDS

HeldoutLogps = Callable[[BackboneSpec], NDArray[np.float32]]
"""A model -> log-probabilities of the held-out pairs' answers, `[documents, 2]`, NaN for what does
not fit into a row."""


@dataclass(frozen=True, slots=True)
class TaskScores:
    """Held-out prompts answered greedily, scored by the metric of their task."""

    tokenizer: PreTrainedTokenizerFast
    prompts: Sequence[HeldoutPrompt]
    max_new_tokens: int
    device: Device
    title: str = "How well are held-out instructions followed?"
    noun: str = "prompts"
    metric: str = "exam"
    unit: Unit = "%"
    overall: bool = True
    baseline: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(prompt.task_type or UNNAMED for prompt in self.prompts))

    def sit(self, backbone: BackboneSpec) -> list[Scored]:
        user = self.tokenizer.get_vocab()["<|user|>"]
        answers = answer(
            backbone,
            self.tokenizer,
            [prompt.prompt_ids for prompt in self.prompts],
            max_new_tokens=self.max_new_tokens,
            device=self.device,
        )
        return [
            Scored(
                prompt.id,
                prompt.task_type or UNNAMED,
                _score(prompt, text),
                cluster=_digest(_behind_system(prompt.prompt_ids, user)),
            )
            for prompt, text in zip(self.prompts, answers, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class PreferenceAccuracy:
    """Share of held-out pairs whose chosen answer gained more log-probability over the reference.

    Attributes:
        reference: gives them for the reference; None: all 0.
        length_normalised: per token instead of summed.
        tokens: tokens of both answers, int64 `[documents, 2]`.
    """

    store: TokenStore
    logps: HeldoutLogps
    reference: Callable[[], NDArray[np.float32] | None]
    tokens: NDArray[np.int64]
    length_normalised: bool
    title: str = "Is the better of two held-out answers preferred?"
    noun: str = "pairs"
    metric: str = "exam"
    unit: Unit = "%"
    overall: bool = True
    baseline: str = "the shorter"

    @property
    def groups(self) -> tuple[str, ...]:
        names = self.store.manifest.labels["error_type"]
        used = np.unique(self.store.labels[:, LABELS.index("error_type")])
        return tuple(sorted(names[index] or UNNAMED for index in used))

    def sit(self, backbone: BackboneSpec) -> list[Scored]:
        ratios = self.logps(backbone).astype(np.float64)
        if (reference := self.reference()) is not None:
            ratios = ratios - reference
        if self.length_normalised:
            ratios = ratios / np.maximum(self.tokens, 1)
        margin = ratios[:, 0] - ratios[:, 1]
        scores = preferred(torch.from_numpy(margin)).tolist()
        is_shorter = preferred(torch.from_numpy(self.tokens[:, 1] - self.tokens[:, 0]).double())
        names = self.store.manifest.labels["error_type"]
        errors = self.store.labels[:, LABELS.index("error_type")].tolist()
        clusters = prompt_clusters(self.store)
        scored = [
            Scored(
                self.store.document_id(row),
                names[errors[row]] or UNNAMED,
                scores[row],
                chance=0.5,
                cluster=clusters[row],
                baseline=float(is_shorter[row]),
            )
            for row in np.flatnonzero(np.isfinite(margin)).tolist()
        ]
        return sorted(scored, key=lambda one: one.group)


def prompt_clusters(store: TokenStore) -> dict[int, str]:
    """Row of the store -> digest of its prompt, the same for rows whose answers are alike.

    The system turn is left out: it holds the instruction, and rows that ask for several things
    about one document are alike, too. In MediFlow's format such rows have one `group_id`.
    """
    first = np.flatnonzero(np.diff(store.pieces["document"].astype(np.int64), prepend=-1))
    behind = np.append(first[1:], len(store.pieces))
    is_pair = store.piece_kinds[behind - 1] == PIECE_KINDS.index("rejected")
    has_system = store.piece_kinds[first] == PIECE_KINDS.index("system")
    starts = store.piece_starts[first + has_system].tolist()
    ends = store.piece_starts[behind - 1 - is_pair].tolist()
    rows = store.pieces["document"][first].tolist()
    return {
        row: _digest(store.gather(np.arange(start, end)))
        for row, start, end in zip(rows, starts, ends, strict=True)
    }


def _behind_system(prompt_ids: Sequence[int], user: int) -> Sequence[int]:
    """The prompt from its first user turn on; a plain text has no turns."""
    return prompt_ids[prompt_ids.index(user) :] if user in prompt_ids else prompt_ids


def _digest(ids: ArrayLike) -> str:
    """Names no text: what a digest stands for may be a patient's."""
    return sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:16]


def _score(prompt: HeldoutPrompt, text: str) -> float:
    is_json = prompt.reference[:1] in ("{", "[")
    output_format = "json" if is_json else "plain_text"
    return score_answer(prompt.task_type, output_format, text, prompt.reference)

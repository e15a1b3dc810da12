"""Held-out prompts answered by the model in training, to be read by people."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerFast

from mediphi.artifacts import write_atomic
from mediphi.data.heldout_prompts import HeldoutPrompt
from mediphi.engine import Device
from mediphi.generation import answer
from mediphi.modules.causal_lm import CausalLMModule
from mediphi.strategies.sharding import Sharded

SAMPLES = "samples.jsonl"


class GreedySamples(Callback):
    """Adds one row per prompt to a file at every evaluation: step, prompt, reference, answer.

    The file stays in the run directory: it is text, so no logger gets it. A resumed run writes the
    rows of a step that it repeats once.

    Args:
        path: JSONL file.
        prompts: of sources whose licence lets their text be shown.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        path: Path,
        *,
        prompts: Sequence[HeldoutPrompt],
        tokenizer: PreTrainedTokenizerFast,
        max_new_tokens: int,
        device: Device,
    ) -> None:
        self.path, self.prompts, self.tokenizer = path, prompts, tokenizer
        self.max_new_tokens, self.device = max_new_tokens, device

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        ask = partial(
            answer,
            pl_module.backbone,
            self.tokenizer,
            [prompt.prompt_ids for prompt in self.prompts],
            max_new_tokens=self.max_new_tokens,
            device=self.device,
        )
        strategy: Any = trainer.strategy
        if isinstance(strategy, Sharded):  # which no rank can ask alone
            self._write(strategy.compute(ask), trainer)
        elif trainer.is_global_zero:
            self._write(ask(), trainer)

    def _write(self, answers: list[str], trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        rows = [row for row in self._rows() if row["step"] < step]
        for prompt, text in zip(self.prompts, answers, strict=True):
            rows.append(
                {
                    "step": step,
                    "id": prompt.id,
                    "task_type": prompt.task_type,
                    "prompt": self.tokenizer.decode(prompt.prompt_ids),
                    "reference": prompt.reference,
                    "answer": text,
                }
            )
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.path, "".join(lines))

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8") as lines:  # splitlines would cut at U+2028
            return [json.loads(line) for line in lines]

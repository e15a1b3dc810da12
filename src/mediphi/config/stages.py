"""Schema of a stage: what changes the *result*. One class per kind, told apart by `kind`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mediphi.config.corpus import RecordKind
from mediphi.config.strict import BrokenRule, Strict
from mediphi.records import Difficulty


class Phase(Strict):
    """One optimizer schedule: linear warm-up to `lr`, then the schedule down to its floor."""

    lr: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Floor of the schedule as a share of `lr`."""
    epochs: PositiveInt = 1
    """Passes over the phase's tokens."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps; null: all epochs."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            yield BrokenRule("warmup_steps", f"must be below max_steps={self.max_steps}")


class Optimizer(Strict):
    """AdamW (Loshchilov & Hutter 2019). `max_grad_norm: null` switches clipping off."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """On matrices; norms are not decayed."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm here."""


class Quiz(Strict):
    """Multiple-choice questions over codes, scored before, between and after the phases."""

    num_questions: PositiveInt = 300
    """Most questions per difficulty."""
    num_options: Annotated[int, Field(ge=2, le=10)] = 4
    """Answers to choose from, one of them right."""
    difficulties: Annotated[tuple[Difficulty, ...], Field(min_length=1)] = (
        "easy",
        "medium",
        "hard",
    )
    """How near the wrong answers stand in the code hierarchy."""


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021) in place of full-parameter training."""

    rank: PositiveInt = 16
    """Inner dimension of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: adapters count `alpha / rank`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the adapters' input."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    """Names of the linear layers that get one; all-linear: all but the head."""
    export: Literal["merged", "adapter"] = "merged"
    """Publish a whole model with the adapters in its weights, or the adapters beside it too."""


class TaskExam(Strict):
    """Held-out prompts answered greedily, before and after training, scored by task type."""

    per_task: PositiveInt = 25
    """Most prompts of a task type."""
    max_new_tokens: PositiveInt = 64
    """Longest answer; prompts whose reference is longer are not asked."""


class TrainingStage(Strict):
    """What all training stages share.

    `global_batch` counts packed rows of `max_length` tokens per optimizer step. Documents longer
    than `max_length` are split, never cut.
    """

    reads: ClassVar[RecordKind] = "text"

    global_batch: PositiveInt
    """Packed rows per optimizer step, over all devices."""
    max_length: Annotated[int, Field(ge=16)]
    """Tokens of a packed row."""
    optimizer: Optimizer = Optimizer()
    eval_every_steps: PositiveInt = 100
    """Optimizer steps between held-out evaluations."""
    eval_max_rows: PositiveInt = 64
    """Packed rows that an evaluation reads at most."""


class TextStage(TrainingStage):
    """What PIT and DAPT share."""

    neftune_alpha: NonNegativeFloat = 0.0
    """Strength of NEFTune's embedding noise; 0: off."""
    quiz: Quiz | None = None
    """null: no quiz."""


class PitStage(TextStage):
    """Pre-instruction tuning (Jiang et al. 2024): task outputs, then outputs with documents."""

    kind: Literal["pit"]
    phase1: Phase
    """Task outputs alone."""
    phase2: Phase
    """Task outputs with their documents."""


class DaptStage(TextStage):
    """Domain-adaptive pre-training: next-token prediction on the documents."""

    kind: Literal["dapt"]
    phase: Phase


class ChatStage(TrainingStage):
    """What SFT and DPO share: whole conversations, never cut.

    One that is longer than `max_length` (or, for DPO, whose two answers are) is left out, counted
    and told; `too_long: refuse` stops instead.
    """

    phase: Phase
    too_long: Literal["drop", "refuse"] = "drop"
    """What becomes of a conversation that does not fit into `max_length`."""
    lora: Lora | None = None
    """null: train all parameters."""


class SftStage(ChatStage):
    """Supervised fine-tuning on the assistant's answers."""

    reads: ClassVar[RecordKind] = "conversation"

    kind: Literal["sft"]
    neftune_alpha: NonNegativeFloat = 0.0
    """Strength of NEFTune's embedding noise; 0: off."""
    train_on_prompt: bool = False
    """Learn the prompts' tokens too."""
    exam: TaskExam | None = TaskExam()
    """null: no task scores; the loss of the held-out answers is told all the same."""
    num_samples: NonNegativeInt = 4
    """Held-out prompts answered at every evaluation, written to `samples.jsonl`; only of sources
    whose licence says `contains_phi: false`."""


class DpoStage(ChatStage):
    """Direct preference optimisation (Rafailov et al. 2023) and its variants."""

    reads: ClassVar[RecordKind] = "preference"

    kind: Literal["dpo"]
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference; IPO's tau."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """Which function of the margin."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong: cDPO with sigmoid, robust DPO with robust."""
    length_normalised: bool = False
    """Log-probabilities per token instead of summed."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the chosen answers, per token, beside the preference loss."""
    reference: Literal["cached", "live", "none"] = "cached"
    """Log-probabilities of the reference: computed once and kept, beside every step, or zero."""
    share_prompt: bool = True
    """One forward pass of the prompt for both answers."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            yield BrokenRule("label_smoothing", f"loss={self.loss} has none; sigmoid and robust do")
        if self.loss == "robust" and not self.label_smoothing:
            yield BrokenRule("label_smoothing", "loss=robust needs the share of wrong labels, > 0")


class DoctorStage(Strict):
    """Looks at machine, model and data, and trains nothing."""

    kind: Literal["doctor"]
    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens of a packed row."""
    num_records: PositiveInt = 8
    """Records of each source that the proofs read, from its beginning."""
    wait_seconds: PositiveFloat = 60.0
    """How long processes may take to find one another."""


class MergeStage(Strict):
    """Several models become one, by the method that `merge` names; nothing is trained."""

    kind: Literal["merge"]


class SearchStage(Strict):
    """Finds the parameters of a merge on validation sets, and publishes the winner.

    The start values and what is not searched come from `merge`.
    """

    kind: Literal["search"]
    strategy: Literal["cmaes", "grid", "random", "greedy"] = "cmaes"
    """CMA-ES (Hansen 2016); every combination of `grid`; draws within the bounds; or the greedy
    soup of merge=linear (Wortsman et al. 2022), which takes models one by one."""
    evaluations: PositiveInt = 500
    """Candidates that are scored at most."""
    minutes: PositiveFloat | None = None
    """Minutes of search at most, over all its starts; null: as long as it takes."""
    sigma: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    """CMA-ES's first step, as a share of every parameter's range."""
    population: Annotated[int, Field(ge=4)] | None = None
    """Candidates of a generation; null: 4 + 3 ln(number of coordinates)."""
    searched: tuple[str, ...] | None = None
    """Parameters that are searched; null: all that the method's table gives bounds for."""
    bounds: dict[str, tuple[float, float]] = Field(default={})
    """Other bounds than the table's, by parameter."""
    grid: dict[str, Annotated[tuple[float, ...], Field(min_length=1)]] = Field(default={})
    """Values of each searched parameter, or coordinate (`t`, `weight/medcode`), for
    `strategy=grid`."""
    one_for_all: tuple[str, ...] = ()
    """Parameters that all models share one value of."""
    layer_groups: PositiveInt = 1
    """Groups of neighbouring layers with values of their own."""
    early_stop: bool = False
    """Give up a candidate that cannot become the best any more, or will not; it may stop after each
    tenth of the questions, drawn at random. Then there is no corrected score."""
    early_stop_risk: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a candidate which would become the best is given up by early_stop; 0: it is given
    up only if it could not win with all other answers right, which comes late."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.early_stop_risk and not self.early_stop:
            yield BrokenRule("early_stop_risk", "takes effect only with stage.early_stop=true")


Training = PitStage | DaptStage | SftStage | DpoStage
Stage = Annotated[Training | DoctorStage | MergeStage | SearchStage, Field(discriminator="kind")]
TRAINING_KINDS = ("pit", "dapt", "sft", "dpo")

"""The one schema that decides what a config may say. Hydra composes, this judges.

Who owns a number: `stage` what changes the *result*, `hardware` what changes only *speed or
memory*. Accumulation is derived from both and must come out whole.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mediphi.config.corpus import Corpus, RecordKind
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
    """Longest answer."""


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
    """null: no task scores."""
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


Stage = Annotated[PitStage | DaptStage | SftStage | DpoStage, Field(discriminator="kind")]


class Model(Strict):
    """Which causal LM.

    `path` is a local folder or hub id with weights; `architecture` a local folder with config and
    tokenizer, enough for `init: random` without a network.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Part of the run's name."""
    init: Literal["auto", "pretrained", "random"] = "auto"
    """Read weights, or draw them after `seed`; auto: read them where there is a `path`."""
    path: str | None = None
    """Run directory, local folder or hub id with weights."""
    architecture: str | None = None
    """Local folder with config and tokenizer."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""

    @property
    def folder(self) -> str:
        """Folder or hub id of config and tokenizer, and of the weights unless `init` is random."""
        chosen = self.path if self.is_pretrained else self.architecture or self.path
        assert chosen is not None  # broken_rules has seen to it
        return chosen

    @property
    def is_pretrained(self) -> bool:
        """Whether weights are read."""
        return self.init == "pretrained" or (self.init == "auto" and self.path is not None)

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.init == "pretrained" and not self.path:
            yield BrokenRule("path", "init=pretrained needs a local folder or hub id with weights")
        if not self.is_pretrained and not (self.architecture or self.path):
            yield BrokenRule("architecture", "init=random needs a folder with config and tokenizer")


class Checkpoints(Strict):
    """Resumable states on disk; the newest `keep` valid ones stay."""

    every_steps: PositiveInt = 200
    """Optimizer steps between states."""
    keep: PositiveInt = 2
    """Newest valid states that stay."""


class Hardware(Strict):
    """Speed and memory only. `micro_batch` counts packed rows per device and forward pass."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
    devices: PositiveInt = 1
    """Processes per node; more than one starts them."""
    num_nodes: PositiveInt = 1
    """More than one: start torchrun on every node."""
    strategy: Literal["auto", "ddp", "zero3", "fsdp2"] = "auto"
    """How processes share the work; auto: DDP, where each keeps the whole model. zero3 (DeepSpeed)
    and fsdp2 (PyTorch) split weights, gradients and moments."""
    offload: bool = False
    """With zero3: keep what is split in the machine's memory, and step there; slower."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16 autocast where the chip has it, else float32."""
    micro_batch: PositiveInt = 1
    """Packed rows per device and forward pass."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """auto: the fastest kernel that is there."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, slower."""
    loss_chunk_tokens: PositiveInt | None = None
    """Positions whose logits exist at a time; null: 2048 on a GPU, 128 on a CPU."""
    num_threads: PositiveInt | None = None
    """CPU threads of PyTorch's kernels; null: PyTorch's choice."""
    num_workers: NonNegativeInt = 0
    """Processes that tokenise; 0: in this one, right for all but the largest corpora."""
    prefetch: NonNegativeInt = 2
    """Batches that a thread prepares ahead of training."""
    checkpoints: Checkpoints = Checkpoints()

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.accelerator == "cpu" and self.attention in ("flash", "varlen"):
            yield BrokenRule("attention", "accelerator=cpu has auto and sdpa; flash is for GPUs")
        if self.offload and self.strategy != "zero3":
            yield BrokenRule("offload", "only strategy=zero3 keeps its parts in main memory")


class Logger(Strict):
    """CSV is always written; `kind` adds one more. W&B stays offline unless logged in."""

    kind: Literal["csv", "wandb", "tensorboard"] = "wandb"
    """What to write besides `metrics.csv`."""
    project: str = "mediphi"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    group: str | None = None
    """W&B group; a sweep sets it."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    every_steps: PositiveInt = 10
    """Optimizer steps between rows."""


class Paths(Strict):
    """Where bundled files are read, and runs and cached shards written."""

    assets: Annotated[str, Field(min_length=1)]
    """Bundled data and model folders."""
    runs: Annotated[str, Field(min_length=1)]
    """Run directories."""
    cache: Annotated[str, Field(min_length=1)]
    """Tokenised corpora."""


READS: dict[RecordKind, str] = {
    "text": "plain text",
    "conversation": "conversations",
    "preference": "preference pairs",
}
EXAMPLES: dict[RecordKind, str] = {
    "text": "medcode",
    "conversation": "mediflow",
    "preference": "mediflow_dpo",
}


class Config(Strict):
    """A whole experiment."""

    stage: Stage
    corpus: Corpus
    model: Model
    hardware: Hardware
    logger: Logger
    paths: Paths
    seed: NonNegativeInt = 0
    """Of weights, order, noise and quiz."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] | None = None
    """Run name; null: `<corpus>-<model>-<hash>`."""
    on_existing: Literal["resume", "overwrite", "refuse"] = "resume"
    """What to do with a run directory that is there."""
    check_only: bool = False
    """Validate, prepare the data, print the plan, stop."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        rows, batch = self.rows_per_pass, self.stage.global_batch
        if batch % rows:
            lower, upper = batch // rows * rows, (batch // rows + 1) * rows
            yield BrokenRule(
                "stage.global_batch",
                f"must be a multiple of hardware.micro_batch x devices x num_nodes = {rows}; "
                f"nearest: {f'{lower} or ' if lower else ''}{upper}",
            )
        if self.corpus.record_kind != self.stage.reads:
            yield BrokenRule(
                "corpus.name",
                f"stage={self.stage.kind} reads {READS[self.stage.reads]}, the corpus "
                f"{self.corpus.name!r} yields {READS[self.corpus.record_kind]}; "
                f"take corpus={EXAMPLES[self.stage.reads]}, or set the sources' format",
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step and rank."""
        return self.stage.global_batch // self.rows_per_pass

    @property
    def rows_per_pass(self) -> int:
        """Packed rows that all ranks take in one forward pass."""
        return self.hardware.micro_batch * self.world_size

    @property
    def world_size(self) -> int:
        return self.hardware.devices * self.hardware.num_nodes

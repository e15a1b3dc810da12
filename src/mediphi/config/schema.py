"""The one schema that decides what a config may say. Hydra composes, this judges.

Who owns a number: `stage` what changes the *result*, `hardware` what changes only *speed or
memory*. Accumulation is derived from both and must come out whole.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mediphi.config.corpus import Corpus, RecordKind, RowSource
from mediphi.config.merging import Merge
from mediphi.config.search_rules import broken_search
from mediphi.config.slurm import Slurm
from mediphi.config.stages import (
    TRAINING_KINDS,
    DpoStage,
    MergeStage,
    SearchStage,
    Stage,
    Training,
)
from mediphi.config.strict import BrokenRule, Strict
from mediphi.config.validation import Validation


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


GpuName = Literal["H200", "H100", "A100 80GB", "A100", "L40S", "A10", "RTX 4090"]


class Hardware(Strict):
    """Speed and memory only. `micro_batch` counts packed rows per device and forward pass."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
    devices: PositiveInt = 1
    """Processes per node; more than one starts them."""
    num_nodes: PositiveInt = 1
    """More than one: Slurm starts them, or torchrun on every node."""
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
    activation_checkpointing: bool | None = None
    """Recompute activations in backward: less memory, slower. null: those of as many layers as the
    GPU's memory asks for, on a CPU of none."""
    compile: bool = False
    """Let torch.compile fuse what surrounds attention, for rows padded to one length; the first
    step takes a minute longer. Off until a GPU has shown where it wins: docs/hardware.md."""
    loss_chunk_tokens: PositiveInt | None = None
    """Positions whose logits exist at a time; null: 2048 on a GPU, 128 on a CPU."""
    planned_gpu: GpuName | None = None
    """Which GPU check_only=true plans for, also where there is none or another one. null: the one
    that is here."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of PyTorch's kernels; null: PyTorch's choice."""
    num_workers: NonNegativeInt = 0
    """Processes that tokenise; 0: in this one, right for all but the largest corpora."""
    prefetch: NonNegativeInt = 2
    """Batches that a thread prepares ahead of training."""
    checkpoints: Checkpoints = Checkpoints()
    slurm: Slurm | None = None
    """null: run here; else the run becomes a job."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.accelerator == "cpu" and self.attention in ("flash", "varlen"):
            yield BrokenRule("attention", "accelerator=cpu has auto and sdpa; flash is for GPUs")
        elif self.precision == "32-true" and self.attention in ("flash", "varlen"):
            yield BrokenRule(
                "attention", "precision=32-true has auto and sdpa; others compute in half"
            )
        if self.accelerator == "cpu" and self.planned_gpu is not None:
            yield BrokenRule("planned_gpu", "accelerator=cpu plans for the CPU; take auto or gpu")
        if self.compile and self.strategy in ("zero3", "fsdp2"):
            yield BrokenRule("compile", f"strategy={self.strategy} cannot; auto and ddp can")
        if self.offload and self.strategy != "zero3":
            yield BrokenRule("offload", "only strategy=zero3 keeps its parts in main memory")
        if self.slurm is not None and self.accelerator == "auto":
            yield BrokenRule("accelerator", "a job says what it needs: gpu or cpu")


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
FORMATS: dict[RecordKind, str] = {
    "text": "text",
    "conversation": "messages, prompt_completion or mediflow",
    "preference": "preference or mediflow_dpo",
}


class Config(Strict):
    """A whole experiment."""

    stage: Stage
    corpus: Corpus
    model: Model
    hardware: Hardware
    logger: Logger
    paths: Paths
    merge: Merge | None = None
    """Of the stages merge and search; null elsewhere."""
    validation: Validation | None = None
    """Questions that a search is led by; null elsewhere."""
    seed: NonNegativeInt = 0
    """Of weights, order, noise, quiz and search."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] | None = None
    """Run name; null: `<corpus>-<model>-<hash>`, of a merge `<method>-<hash>`."""
    on_existing: Literal["resume", "overwrite", "refuse"] = "resume"
    """What to do with a run directory that is there."""
    check_only: bool = False
    """Validate, prepare the data, print the plan, stop."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        merges = isinstance(self.stage, MergeStage | SearchStage)
        if merges != (self.merge is not None):
            needed = "needs a method: merge=slerp, merge=breadcrumbs, ..."
            useless = "merges nothing; stage=merge and stage=search do"
            yield BrokenRule("merge", f"stage={self.stage.kind} {needed if merges else useless}")
        elif isinstance(self.stage, SearchStage) and self.merge is not None:
            yield from broken_search(self.stage, self.merge)
        searches = self.stage.kind == "search"
        if searches != (self.validation is not None):
            needed = "needs questions: validation=search, codes or files"
            useless = "asks no such questions; stage=search does"
            what = needed if searches else useless
            yield BrokenRule("validation", f"stage={self.stage.kind} {what}")
        elif (asked := self.validation) and asked.reads_documents and asked.corpus is None:
            yield BrokenRule("validation.corpus", "its sets are made from texts: give it a corpus")
        if self.stage.kind in TRAINING_KINDS:
            yield from self._broken_training()

    def _broken_training(self) -> Iterator[BrokenRule]:
        rows, batch = self.rows_per_pass, self.training.global_batch
        if batch % rows:
            lower, upper = batch // rows * rows, (batch // rows + 1) * rows
            yield BrokenRule(
                "stage.global_batch",
                f"must be a multiple of hardware.micro_batch x devices x num_nodes = {rows}; "
                f"nearest: {f'{lower} or ' if lower else ''}{upper}",
            )
        splits = self.hardware.strategy in ("zero3", "fsdp2")
        if splits and isinstance(self.stage, DpoStage) and self.stage.reference == "live":
            yield BrokenRule(
                "stage.reference",
                f"hardware.strategy={self.hardware.strategy} splits one model, live keeps a second "
                "one whole on every device; take cached, whose numbers are the same",
            )
        if self.corpus.record_kind != self.training.reads:
            reads, corpus = self.training.reads, self.corpus
            own = [
                f", or set corpus.sources.{name}.format to {FORMATS[reads]}"
                for name, source in corpus.sources.items()
                if isinstance(source, RowSource) and not source.format.startswith("mediflow")
            ]
            yield BrokenRule(
                "corpus.name",
                f"stage={self.stage.kind} reads {READS[reads]}, the corpus {corpus.name!r} yields "
                f"{READS[corpus.record_kind]}; take corpus={EXAMPLES[reads]}{''.join(own[:1])}",
            )

    @property
    def training(self) -> Training:
        """The stage, one that trains; the switch lets no other come to where this is asked."""
        assert isinstance(self.stage, Training)
        return self.stage

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step and rank."""
        return self.training.global_batch // self.rows_per_pass

    @property
    def rows_per_pass(self) -> int:
        """Packed rows that all ranks take in one forward pass."""
        return self.hardware.micro_batch * self.world_size

    @property
    def world_size(self) -> int:
        return self.hardware.devices * self.hardware.num_nodes

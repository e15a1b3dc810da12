"""Schema of a corpus: which sources, under which licence, how they are cleaned and split."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from mediphi.config.strict import BrokenRule, Strict
from mediphi.records import TaskKind

RecordKind = Literal["text", "conversation", "preference"]
"""What a corpus yields: PIT and DAPT read text, SFT conversations, DPO preferences."""

RowFormat = Literal[
    "text", "mediflow", "mediflow_dpo", "messages", "prompt_completion", "preference"
]
"""How a row is laid out: plain text; MediFlow's columns; TRL's dataset types, conversational or
not."""

Stratum = Literal["task_type", "input_data", "output_format", "error_type", "difficulty_level"]
"""MediFlow's columns that rows can be shared out over."""

CodeLevel = Literal["category", "subcategory", "code"]
"""ICD levels: `A00` is a category, `A00.0` a subcategory when it has children, else a code."""


class Licence(Strict):
    """Where text comes from and what may be done with it; manifest and model card repeat it."""

    id: str
    """Short name of the licence."""
    origin: str
    """Who published the text."""
    commercial_ok: bool
    """Whether commercial use is allowed."""
    dua: bool = False
    """Bound by a data-use agreement."""
    contains_phi: bool = False
    """Holds protected health information."""
    share_alike: bool = False
    """What is derived must carry the same licence."""

    @property
    def may_be_shown(self) -> bool:
        """Whether text may stand in files that people read."""
        return not (self.contains_phi or self.dua)


class SourceBase(Strict):
    """What every source has.

    `weight` is how often an epoch visits its documents (0.5: a seeded half of them; 2: twice).
    `max_documents` keeps a share chosen by hash, the same one every time.
    """

    licence: Licence
    """Required of every source."""
    weight: PositiveFloat = 1.0
    """Visits of its documents per epoch."""
    max_documents: PositiveInt | None = None
    """Keep so many, chosen by hash; null: all."""
    side: Literal["split", "train", "heldout"] = "split"
    """Split its groups by hash, or take all of it for one side."""

    @property
    def record_kind(self) -> RecordKind:
        return "text"


class Icd10cmSource(SourceBase):
    """ICD-10-CM order file and tabular XML in one folder -> one page per code."""

    kind: Literal["icd10cm"]
    path: str
    levels: tuple[CodeLevel, ...] = ("category", "subcategory", "code")


class Icd9cmSource(SourceBase):
    """ICD-9-CM code list -> one page per code."""

    kind: Literal["icd9cm"]
    path: str
    levels: tuple[CodeLevel, ...] = ("category", "subcategory", "code")


class MedquadSource(SourceBase):
    """MedQuAD pages of the named collections (`1_CancerGov_QA`, `3_GHR_QA`, ...)."""

    kind: Literal["medquad"]
    path: str
    collections: tuple[str, ...] = Field(min_length=1)


class FolderSource(SourceBase):
    """The other bundled sets: one folder, one reader each."""

    kind: Literal[
        "mtsamples",
        "mts_dialog",
        "aci_bench",
        "pubmedqa",
        "ncbi_disease",
        "wiki_pairs",
        "nstg",
        "markdown_pages",
    ]
    path: str


class RowSource(SourceBase):
    """A table of rows.

    `group_field` names the column whose equal values stay on one side of a split (a patient, a
    page); without it a text is its own group, and what answers one prompt is one. Of conversations
    and preferences `max_documents` can keep the best instead of a share by hash, and the same
    number of every kind.
    """

    format: RowFormat = "text"
    """How a row is laid out."""
    text_field: str = "text"
    """Column of the text, where `format` is text."""
    id_field: str | None = None
    """Column of unique ids; null: file and line."""
    group_field: str | None = None
    """Column whose equal values stay on one side of the split."""
    title_field: str | None = None
    """Column of a short title, where `format` is text."""
    choose_by: Literal["hash", "quality"] = "hash"
    """What `max_documents` keeps: a share by hash, or the rows with the best `quality`."""
    stratify_by: tuple[Stratum, ...] = ()
    """Share `max_documents` out evenly over the values of these columns."""

    @property
    def record_kind(self) -> RecordKind:
        if self.format == "text":
            return "text"
        return "preference" if self.format in ("preference", "mediflow_dpo") else "conversation"

    def broken_rules(self) -> Iterator[BrokenRule]:
        is_mediflow = self.format.startswith("mediflow")
        if "error_type" in self.stratify_by and self.format == "mediflow":
            yield BrokenRule("stratify_by", "format=mediflow has no error_type; mediflow_dpo has")
        for key, value in (("choose_by", self.choose_by), ("stratify_by", self.stratify_by)):
            if value not in ("hash", ()) and not is_mediflow:
                yield BrokenRule(key, f"format={self.format} has no such columns; mediflow has")
            elif value not in ("hash", ()) and self.max_documents is None:
                yield BrokenRule(key, "needs max_documents: how many to keep")


class FileSource(RowSource):
    """The user's own JSONL, Parquet, text files or `datasets` folder; a file, folder or glob."""

    kind: Literal["jsonl", "parquet", "text", "dataset_folder"]
    path: str
    """File, folder or glob."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        yield from super().broken_rules()
        if self.kind == "text" and self.format != "text":
            yield BrokenRule("format", "kind=text has plain text only; take jsonl or parquet")


class HubSource(RowSource):
    """A dataset of the Hugging Face hub, streamed. `expected_*` are the published sizes."""

    kind: Literal["hub"]
    repo_id: str
    """Dataset on the Hugging Face hub."""
    revision: str = "main"
    """Branch, tag or commit."""
    subset: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Which split to read."""
    expected_documents: PositiveInt | None = None
    """Published size; not enforced."""
    expected_tokens: PositiveInt | None = None
    """Published size; not enforced."""


class UnavailableSource(SourceBase):
    """Published only in a form that cannot be loaded; asking for it says what to obtain, where."""

    kind: Literal["unavailable"]
    obtain: str
    """What to obtain, where, in which form."""
    yields: RecordKind = "text"
    """What its rows are."""
    expected_documents: PositiveInt | None = None
    """Published size."""
    expected_tokens: PositiveInt | None = None
    """Published size."""

    @property
    def record_kind(self) -> RecordKind:
        return self.yields


Source = Annotated[
    Icd10cmSource
    | Icd9cmSource
    | MedquadSource
    | FolderSource
    | FileSource
    | HubSource
    | UnavailableSource,
    Field(discriminator="kind"),
]


class Deduplicate(Strict):
    """Exact duplicates always go; near ones above a Jaccard similarity of word shingles."""

    near: bool | None = None
    """Drop near duplicates too; null: of texts only, as conversations and pairs share prompts."""
    jaccard: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Similarity from which on two texts are near duplicates."""


class TaskOutputs(Strict):
    """Where PIT's task outputs come from.

    `rules` writes them from the document's structure (codes) or extracts them (prose);
    `files` reads `TaskOutput` records from JSONL, whoever wrote them.
    """

    generator: Literal["rules", "files"] = "rules"
    """Who writes them."""
    path: str | None = None
    """JSONL file, folder or glob for `files`."""

    def broken_rules(self) -> Iterator[BrokenRule]:
        if self.generator == "files" and not self.path:
            yield BrokenRule("path", "generator=files needs a JSONL file or folder of task outputs")


class Corpus(Strict):
    """One corpus: sources mixed by weight after splitting."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Part of the run's name."""
    sources: Annotated[dict[str, Source], Field(min_length=1)]
    """Sources by a name of your choice."""
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Share of document groups that is never trained on."""
    deduplicate: Deduplicate = Deduplicate()
    task_outputs: TaskOutputs = TaskOutputs()
    task_kinds: Annotated[tuple[TaskKind, ...], Field(min_length=1)] = ("summary",)
    """Which task outputs PIT trains on."""
    on_bad: Literal["strict", "skip"] = "strict"
    """Stop at a bad row, or set it aside and count it."""
    max_bad_share: Annotated[NonNegativeFloat, Field(le=1)] = 0.01
    """Largest share of bad rows that `skip` lets pass."""

    @property
    def record_kind(self) -> RecordKind:
        return next(iter(self.sources.values())).record_kind

    @property
    def drops_near_duplicates(self) -> bool:
        near = self.deduplicate.near
        return self.record_kind == "text" if near is None else near

    def broken_rules(self) -> Iterator[BrokenRule]:
        kinds = {name: source.record_kind for name, source in self.sources.items()}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            yield BrokenRule("sources", f"must all yield the same kind of record ({found})")

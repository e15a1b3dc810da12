"""Proofs on the user's own model and data: what is learnt, and that packing changes nothing.

Only counts are told, never a text: it may be clinical.
"""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from mediphi.backbone import original_positions
from mediphi.batches import Batch, PreferenceBatch
from mediphi.config.schema import READS
from mediphi.data.chat import ControlIds
from mediphi.data.loader import PackedLoader
from mediphi.data.plan import PlanSettings, TrainingPlan
from mediphi.data.render import neutralise
from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.doctor.packed import compare
from mediphi.doctor.sample import Sample
from mediphi.records import Conversation, Document, Preference
from mediphi.stages import phases_of

MICRO_BATCH = 2
DEFECT = "it is a defect, of this program or of a patched library: report it, do not train"
"""What to do where a proof fails."""


def corpus(case: Case) -> Iterator[Finding]:
    """The first records of every source can be read, rendered, and fit."""
    sample = case.sample()
    store, counts = sample.store, sample.counts
    sources = store.documents_per_source()
    told = ", ".join(f"{sources.get(name, 0)} of {name}" for name in counts)
    tokens = store.manifest.num_tokens
    yield ok("corpus", f"first records read and tokenised: {told}; {tokens:,} tokens")
    rejected = {name: count.rejected for name, count in counts.items() if count.rejected}
    if rejected:
        text = ", ".join(f"{number} of {name}" for name, number in rejected.items())
        remedy = "mend them; a run sets them aside and names them in corpora/*.quarantine.txt"
        yield warning("corpus", f"bad rows before these: {text}", remedy=remedy)
    yield from _too_long(case, sample)


def _too_long(case: Case, sample: Sample) -> Iterator[Finding]:
    """Conversations and pairs are never cut, so what is too long is left out."""
    settings = _settings(case)
    if settings.layout == "text":
        return
    lengths = TrainingPlan(sample.store, _settings(case, whole=sample)).sequences.length
    longer = int((lengths > settings.capacity).sum())
    if longer:
        share = f"{longer} of {len(lengths)} {READS[case.config.corpus.record_kind]}"
        text = f"{share} exceed stage.max_length={settings.capacity} and would be left out"
        remedy = f"stage.max_length={int(lengths.max())} in training takes them all"
        yield warning("corpus", text, remedy=remedy)


def loss_mask(case: Case) -> Iterator[Finding]:
    """`decode(ids[loss_mask])` is what must be learnt, for every record of the sample.

    The control: the tokens one place before each must not decode to it.
    """
    sample, tokenizer = case.sample(), case.tokenizer()
    plan = TrainingPlan(sample.store, _settings(case, whole=sample))
    control = ControlIds.of(tokenizer)
    ends = {sample.store.eos_id, control.end, control.end_of_text}
    num_tokens = num_texts = checked = wrong = told_apart = 0
    for batch in PackedLoader(plan):
        for one in learnt(batch, is_text=plan.settings.layout == "text"):
            expected = expected_texts(sample, one)
            got, moved = (_decoded(tokenizer, ids, ends) for ids in (one.labels, one.before))
            num_tokens, num_texts = num_tokens + one.num_targets, num_texts + len(expected)
            checked, wrong = checked + 1, wrong + (not _same(got, expected))
            told_apart += not _same(moved, expected)
    noun = {"text": "texts"}.get(plan.settings.layout, "answers")
    text = f"{num_tokens:,} learnt tokens of {len(plan.sequences.document)} records"
    if wrong:
        text = f"{text}: in {wrong} they do not decode to the {num_texts} {noun} and their ends"
        yield failure("loss mask", text, remedy=DEFECT)
    elif told_apart < checked:
        text = f"{text}: {checked - told_apart} would pass with a mask one token off"
        remedy = "a larger stage.num_records"
        yield warning("loss mask", f"{text}, which proves nothing", remedy=remedy)
    else:
        yield ok(
            "loss mask",
            f"{text} decode to their {num_texts} {noun} and ends, nothing else; "
            "one token off, none does",
        )


class Learnt(NamedTuple):
    """What is learnt of one document, or one answer of a pair.

    Attributes:
        document: row in the store.
        side: 0 chosen, 1 rejected; 0 where there are no pairs.
        labels: the tokens to be predicted; of plain text with the first one, which nothing
            predicts.
        before: the tokens one place earlier.
        num_targets: tokens with a loss.
    """

    document: int
    side: int
    labels: list[int]
    before: list[int]
    num_targets: int


def learnt(batch: Batch, *, is_text: bool) -> Iterator[Learnt]:
    """By the batch's own targets, as the loss takes them."""
    row = batch.input_ids[0]
    if isinstance(batch, PreferenceBatch):
        for answer in batch.answer_ids.unique().tolist():
            mine = batch.answer_ids == answer
            labels, before = batch.label_ids[mine].tolist(), row[batch.logit_index[mine]].tolist()
            pair, side = divmod(answer, 2)
            document = int(batch.document_index[pair])
            yield Learnt(document, side, labels, before, len(labels))
        return
    places, labels = batch.target_index, batch.label_ids
    bounds = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    for document, (start, stop) in zip(batch.document_index.tolist(), bounds, strict=True):
        mine = (places >= start) & (places < stop)
        head = row[start : start + 1].tolist() if is_text else []
        got, before = labels[mine].tolist(), row[places[mine]].tolist()
        yield Learnt(document, 0, [*head, *got], [*head, *before], len(got))


def expected_texts(sample: Sample, one: Learnt) -> list[str]:
    """What must be learnt, from the record itself."""
    name = sample.store.document_id(one.document)
    record = sample.records[name]
    if isinstance(record, Document):
        return [piece.text for piece in sample.rendered[name].pieces if piece.text]
    if isinstance(record, Preference):
        return [neutralise((record.chosen, record.rejected)[one.side])]
    assert isinstance(record, Conversation)
    first = record.num_prompt_turns
    turns = [turn for turn in record.turns[first:] if turn.role == "assistant"]
    return [neutralise(turn.text) for turn in turns]


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int], ends: set[int]) -> list[str]:
    """Texts between end tokens; none where the last one has no end."""
    texts, start = [], 0
    for place, number in enumerate(ids):
        if number in ends:
            texts.append(
                str(tokenizer.decode(ids[start:place], clean_up_tokenization_spaces=False))
            )
            start = place + 1
    return texts if start == len(ids) else []


def _same(texts: list[str], expected: list[str]) -> bool:
    """Alike up to blanks around them, and to the sign that stands for a blank in vocabularies.

    Of a plain prompt's completion the first token may begin in the prompt.
    """

    def plain(text: str) -> str:
        return text.replace("▁", " ").strip()

    return [*map(plain, texts)] == [*map(plain, expected)]


def packed_equals_separate(case: Case) -> Iterator[Finding]:
    """Hidden states of the user's rows, packed as in training and one sequence at a time."""
    sample, device = case.sample(), case.device()
    plan = TrainingPlan(sample.store, _settings(case))
    loader = PackedLoader(plan)
    batch = max((loader[i] for i in range(min(len(loader), 8))), key=lambda b: len(b.lengths))
    model, instead = case.model()
    if len(batch.lengths) < 2:
        text = "a single sequence in these rows: nothing to keep apart"
        yield warning("packing", text, remedy="a larger stage.num_records or stage.max_length")
        return
    found = compare(model, batch.to(device.type), device.kernel)
    number = len(batch.lengths) // 3 if _shares_prompt(batch) else len(batch.lengths)
    noun = "pairs" if _shares_prompt(batch) else "sequences"
    text = (
        f"{number} {noun}, {batch.num_tokens:,} tokens by {device.kernel}: hidden states differ by "
        f"{found.difference:.0e} from one sequence at a time (allowed {found.tolerance:.0e})"
    )
    if instead:
        text += ", in the first layers"
    if not found.holds:
        yield failure("packing", text, remedy=DEFECT)
    elif not found.can_tell:
        text = f"{text}, but only by {found.without:.0e} without boundaries: it proves little"
        remedy = "trained weights by model.path, or a larger stage.num_records"
        yield warning("packing", text, remedy=remedy)
    else:
        yield ok("packing", f"{text}; without boundaries by {found.without:.0e}")


def _shares_prompt(batch: Batch) -> bool:
    return isinstance(batch, PreferenceBatch) and batch.shares_prompt


def _settings(case: Case, *, whole: Sample | None = None) -> PlanSettings:
    """Rows as the training stage's last phase has them; with a sample: all of it in one row."""
    phase = phases_of(case.assumed.training)[-1]
    capacity, rows = case.stage.max_length, MICRO_BATCH
    if whole is not None:
        capacity, rows = max(3, whole.store.manifest.num_tokens), 1
    return PlanSettings(
        kinds=phase.kinds,
        layout=phase.layout,
        learnt=phase.learnt,
        capacity=capacity,
        global_batch=rows,
        micro_batch=rows,
        long_above=original_positions(case.budget().model_config),
    )

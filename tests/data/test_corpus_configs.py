import json
import lzma
from pathlib import Path
from typing import get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mediphi.config.corpus import Corpus, FileSource, Source, UnavailableSource
from mediphi.data import sources
from mediphi.data.bad_rows import BadRows
from mediphi.data.corpora import SIDES, read_documents
from mediphi.errors import UserError
from mediphi.records import Conversation, Preference
from scripts.build_mediflow.families.consumer_questions import SHORT_QUESTION

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conf" / "corpus"
TEXT = ("clinical", "datamix", "guidelines", "medcode", "medcode_full", "medwiki", "pubmed")
CHAT = {"mediflow": "conversation", "mediflow_dpo": "preference"}
OURS = (*TEXT, *CHAT)
PAPER = ("clinical", "datamix", "guidelines", "medcode", "medwiki", "pubmed", *CHAT)
CHOICES = (*OURS, *(f"paper/{name}" for name in PAPER))
PUBLISHED_SIZES = {
    "paper/pubmed": (39_800_000, 48_000_000_000),
    "paper/clinical": (316_000, 246_000_000),  # and MTSamples, bundled
    "paper/medcode": (206_000, 257_000_000),
    "paper/guidelines": (37_000, 90_000_000),
    "paper/medwiki": (80_000, 80_000_000),
}


def corpus(*overrides: str) -> Corpus:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", overrides=list(overrides))
    composed.paths.assets = str(ROOT / "assets")
    return Corpus.model_validate(OmegaConf.to_container(composed, resolve=True)["corpus"])


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    return {choice: corpus(f"corpus={choice}") for choice in CHOICES}


def test_every_file_is_a_choice():
    files = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")}
    assert files == {*CHOICES, "local"}
    assert len(files) == 18


def test_every_choice_is_valid_and_named_after_its_file(corpora):
    assert [c.name for c in corpora.values()] == [choice.replace("/", "_") for choice in CHOICES]


def test_every_source_states_its_licence_and_origin(corpora):
    for choice in corpora.values():
        for source in choice.sources.values():
            assert source.licence.id and source.licence.origin
            if "SA" in source.licence.id.split("-"):
                assert source.licence.share_alike
            if "NC" in source.licence.id.split("-"):
                assert not source.licence.commercial_ok


def test_only_real_questions_and_own_data_may_hold_health_information(corpora):
    closed = {
        (choice, name)
        for choice, found in corpora.items()
        for name, source in found.sources.items()
        if source.licence.contains_phi
    }
    names = ("questions", "questions_heldout")
    assert closed == {(choice, name) for choice in CHAT for name in names}
    assert corpus("corpus=local", "corpus.sources.mine.path=a").sources["mine"].licence.contains_phi


@pytest.mark.parametrize("choice", CHAT)
def test_a_row_is_of_meqsum_where_the_licence_says_health_information(corpora, choice):
    for source in corpora[choice].sources.values():
        with lzma.open(source.path, "rt", encoding="utf-8") as lines:
            asked = {json.loads(line)["instruction"] in SHORT_QUESTION.phrasings for line in lines}
        assert asked == {source.licence.contains_phi}


def test_every_bundled_folder_exists_with_its_licence_and_is_used(corpora):
    paths = [Path(source.path) for choice in OURS for source in corpora[choice].sources.values()]
    used = {path.parent if path.suffix else path for path in paths}
    assert used == {path for path in (ROOT / "assets" / "corpora").iterdir()}
    assert all((folder / "LICENCE.txt").stat().st_size > 100 for folder in used)


def test_the_bundle_stays_small():
    files = (ROOT / "assets" / "corpora").rglob("*")
    assert sum(path.stat().st_size for path in files if path.is_file()) < 15_000_000


@pytest.mark.parametrize("prefix", ["", "paper/"])
def test_datamix_is_all_five_corpora(corpora, prefix):
    parts = ("pubmed", "clinical", "medwiki", "guidelines", "medcode")
    expected = [name for part in parts for name in corpora[prefix + part].sources]
    assert list(corpora[prefix + "datamix"].sources) == expected
    assert len(set(expected)) == len(expected)


def test_default_medcode_is_the_categories_and_the_full_one_is_everything(corpora):
    assert corpora["medcode"].sources["icd10cm"].levels == ("category",)
    assert list(corpora["medcode"].sources) == ["icd10cm"]
    full = corpora["medcode_full"].sources
    assert list(full) == ["icd10cm", "icd9cm"]
    assert all(len(source.levels) == 3 for source in full.values())


@pytest.mark.parametrize("choice", PUBLISHED_SIZES)
def test_paper_editions_state_the_published_sizes(corpora, choice):
    found = corpora[choice].sources.values()
    sizes = [s for s in found if getattr(s, "expected_tokens", None)]
    total = (
        sum(source.expected_documents for source in sizes),
        sum(source.expected_tokens for source in sizes),
    )
    assert total == PUBLISHED_SIZES[choice]


def test_a_source_that_nobody_can_load_says_what_to_obtain_in_one_line(corpora):
    missing = [
        (name, source)
        for choice in PAPER
        for name, source in corpora[f"paper/{choice}"].sources.items()
        if isinstance(source, UnavailableSource)
    ]
    assert {name for name, _ in missing} == {"pmc_full_text", "pubmed_abstracts", "code_pages"}
    for name, source in missing:
        with pytest.raises(UserError, match="JSONL") as error:
            list(sources.read(source, name, BadRows()))
        assert f"corpus.sources.{name}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("choice", ["paper/medcode", "paper/pubmed"])
def test_the_overrides_that_the_sentence_names_work(corpora, choice):
    for name, source in corpora[choice].sources.items():
        words = source.obtain.replace("'", "").replace(",\n", " ").split()
        overrides = [w.rstrip(",") for w in words if w.startswith(("~corpus.", "+corpus."))]
        assert len(overrides) == 4
        changed = corpus(f"corpus={choice}", *overrides).sources[name]
        assert isinstance(changed, FileSource) and changed.path == "FILES"


def test_every_corpus_yields_what_its_stage_reads(corpora):
    found = {choice: corpus.record_kind for choice, corpus in corpora.items()}
    assert found == {choice: CHAT.get(choice.removeprefix("paper/"), "text") for choice in CHOICES}


@pytest.mark.parametrize("choice", CHAT)
def test_bundled_chat_corpora_hold_out_other_texts_than_they_train_on(corpora, choice):
    with read_documents(corpora[choice]) as reading:
        groups = [{record.group_id for record in reading.records(side)} for side in SIDES]
        kinds = {type(record) for record in reading.records()}
        assert all(count.rejected == 0 for count in reading.counts.values())
    assert kinds == {Conversation if choice == "mediflow" else Preference}
    assert all(groups)
    assert not groups[0] & groups[1]


def test_every_kind_of_source_has_a_reader():
    kinds = {
        kind
        for model in get_args(get_args(Source)[0])
        for kind in get_args(model.model_fields["kind"].annotation)
    }
    assert kinds == set(sources.READERS)


def test_sources_of_one_corpus_never_share_an_id(corpora):
    for choice in ("guidelines", "pubmed"):
        found = [
            document
            for name, source in corpora[choice].sources.items()
            for document in sources.read(source, name, BadRows())
        ]
        assert len({document.id for document in found}) == len(found)
        assert all(document.text.strip() for document in found)
        assert {document.source for document in found} == set(corpora[choice].sources)

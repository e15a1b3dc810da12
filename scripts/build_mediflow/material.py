"""Documents of the sources, read once; which of them are used, and which belong to benchmarks."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mediphi.config.corpus import FolderSource, Icd10cmSource, Licence, MedquadSource
from mediphi.data.bad_rows import BadRows
from mediphi.data.sources import (
    aci_bench,
    icd10cm,
    medquad,
    mts_dialog,
    mtsamples,
    ncbi_disease,
    nstg,
    pubmedqa,
)
from mediphi.data.sources.bundled import read_text
from mediphi.data.sources.csv_table import read_table
from mediphi.data.sources.detokenise import detokenise_signs
from mediphi.errors import UserError
from mediphi.records import Document
from scripts.build_mediflow.origins import Origins, find_origins
from scripts.build_mediflow.rows import share

CORPORA = Path(__file__).resolve().parents[2] / "assets" / "corpora"
LICENCE = Licence(id="see licences.py", origin="see LICENCE.txt", commercial_ok=True)
MEDQUAD_COLLECTIONS = (
    "1_CancerGov_QA",
    "2_GARD_QA",
    "3_GHR_QA",
    "5_NIDDK_QA",
    "6_NINDS_QA",
    "8_NHLBI_QA_XML",
    "9_CDC_QA",
)
MEQSUM_FILE = "MeQSum_ACL2019_BenAbacha_Demner-Fushman.jsonl"
MEDEC_FILE = "MEDEC-MS-{split}Set-with-GroundTruth-and-ErrorType.csv"
SHADR_FILE = "Partial_Iteration_2_demographic_annotated.csv"
ACI_TEST_FILES = ("clinicalnlp_taskB_test1", "clinicalnlp_taskC_test2", "clef_taskC_test3")
RESERVED_SHARE = 0.5
"""Of MeQSum and SHADR, which have no test split: `share(text)` below it is left to benchmarks."""
MOJIBAKE = re.compile(r"[\u00c2-\u00ef][^\x00-\x7f]+")
"""UTF-8 that was once read as Windows-1252: `\u00ce\u00bc` for a Greek mu."""


@dataclass
class Material:
    """Reads what a family asks for.

    Attributes:
        folder: published sets that are not bundled; None: only bundled ones can be asked for.
    """

    folder: Path | None = None

    @cached_property
    def mts_dialog(self) -> list[Document]:
        return read_bundled("mts_dialog", mts_dialog.read)

    @cached_property
    def aci_bench(self) -> list[Document]:
        return read_bundled("aci_bench", aci_bench.read)

    @cached_property
    def ncbi_disease(self) -> list[Document]:
        return read_bundled("bio_ner_ncbi-disease", ncbi_disease.read)

    @cached_property
    def nstg(self) -> list[Document]:
        return read_bundled("guidelines_nstg2022", nstg.read)

    @cached_property
    def medquad(self) -> list[Document]:
        source = MedquadSource(
            kind="medquad",
            path=str(CORPORA / "medquad"),
            licence=LICENCE,
            collections=MEDQUAD_COLLECTIONS,
        )
        return list(medquad.read(source, name="medquad", bad_rows=BadRows()))

    @cached_property
    def icd10cm(self) -> list[Document]:
        path = str(CORPORA / "icd10cm_2021")
        source = Icd10cmSource(kind="icd10cm", path=path, licence=LICENCE)
        return list(icd10cm.read(source, name="icd10cm", bad_rows=BadRows()))

    @cached_property
    def pubmedqa(self) -> dict[str, dict[str, Any]]:
        """Abstracts by PubMed id, without the 500 of the test set."""
        abstracts, tests = self._pubmedqa_files
        return {pmid: entry for pmid, entry in abstracts.items() if pmid not in tests}

    @cached_property
    def _pubmedqa_files(self) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = str(CORPORA / "pubmedqa_pqal")
        files = (pubmedqa.ABSTRACTS_FILE, pubmedqa.TEST_FILE)
        first, second = (pubmedqa.read_object(folder, f, name="pubmedqa")[1] for f in files)
        return first, second

    @cached_property
    def mtsamples(self) -> list[Document]:
        """Notes, without those that have findings and an impression: a benchmark's pairs."""
        return [note for note in self._mtsamples if not is_radiology_pair(note)]

    @cached_property
    def _mtsamples(self) -> list[Document]:
        return read_bundled("mtsamples", mtsamples.read)

    @cached_property
    def origins(self) -> Origins:
        """Notes that dialogues of MTS-Dialog were written from."""
        return find_origins(self._mtsamples, self.mts_dialog)

    @cached_property
    def mtsamples_keywords(self) -> dict[str, str]:
        """The published keywords by note id."""
        folder = str(CORPORA / "mtsamples")
        rows = mtsamples.read_rows(folder, name="mtsamples", bad_rows=BadRows())
        return {str(row["note_id"]): row.get("keywords") or "" for row in rows}

    @cached_property
    def meqsum(self) -> list[dict[str, str]]:
        return [row for row in self._meqsum if not is_reserved(row["CHQ"])]

    @cached_property
    def _meqsum(self) -> list[dict[str, str]]:
        _, text = read_text(self._folder("meqsum"), MEQSUM_FILE, name="meqsum")
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def shadr(self) -> list[dict[str, str]]:
        return [row for row in self._shadr if not is_reserved(row["original_sentence"])]

    @cached_property
    def _shadr(self) -> list[dict[str, str]]:
        return list(csv_rows(self._folder("sdoh_shadr"), SHADR_FILE))

    @cached_property
    def medec(self) -> list[dict[str, str]]:
        return self._medec("Validation")

    def _medec(self, split: str) -> list[dict[str, str]]:
        rows = csv_rows(self._folder("medec_ms"), MEDEC_FILE.format(split=split))
        return [
            {key: mend(value) for key, value in row.items()} for row in rows if row["Text"].strip()
        ]

    def _folder(self, name: str) -> str:
        if self.folder is None:
            raise UserError(f"{name} is not bundled; name the folder that holds it with --data")
        return str(self.folder / name)

    def bundled_test_texts(self) -> Iterator[str]:
        """What must not be trained on, of the sets in `assets/corpora`."""
        for file in mts_dialog.TEST_FILES:
            folder = str(CORPORA / "mts_dialog")
            for row in read_table(
                folder, file, fields=mts_dialog.FIELDS, name="mts", bad_rows=BadRows()
            ):
                yield from (row["dialogue"], row["section_text"])
        abstracts, tests = self._pubmedqa_files
        for pmid in tests:
            entry = abstracts[pmid]
            yield from (entry["QUESTION"], " ".join(entry["CONTEXTS"]), entry["LONG_ANSWER"])
        folder = str(CORPORA / "bio_ner_ncbi-disease")
        for sentence in ncbi_disease.read_sentences(
            folder, ncbi_disease.TEST_FILE, name="ncbi", bad_rows=BadRows()
        ):
            yield detokenise_signs(sentence.tokens)
        yield from (note.text for note in self._mtsamples if is_radiology_pair(note))

    def test_texts(self) -> Iterator[str]:
        """What must not be trained on, of all sets."""
        yield from self.bundled_test_texts()
        for file in ACI_TEST_FILES:
            for row in csv_rows(self._folder("aci_bench"), f"{file}.csv"):
                yield from (row["dialogue"], row["note"])
        for row in self._medec("Test"):
            yield from (row["Text"], row["Corrected Text"])
        for row in self._meqsum:
            if is_reserved(row["CHQ"]):
                yield from (row["CHQ"], row["Summary"])
        for row in self._shadr:
            if is_reserved(row["original_sentence"]):
                yield from (row["original_sentence"], row["demographic_inserted"])


def read_bundled(folder: str, read: Callable[..., Iterator[Document]]) -> list[Document]:
    """Documents of a bundled set; readers of a folder look at its path alone."""
    source = FolderSource(kind="mtsamples", path=str(CORPORA / folder), licence=LICENCE)
    return list(read(source, name=folder, bad_rows=BadRows()))


def csv_rows(folder: str, file: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV by column name."""
    _, text = read_text(folder, file, name=Path(folder).name)
    for row in csv.DictReader(io.StringIO(text)):
        yield {key: value or "" for key, value in row.items()}


def is_reserved(text: str) -> bool:
    """Whether a row of a set without a test split is left to benchmarks."""
    return share(text) < RESERVED_SHARE


def is_radiology_pair(note: Document) -> bool:
    return "FINDINGS:" in note.text and "IMPRESSION:" in note.text


def mend(text: str) -> str:
    """UTF-8 in place of what a Windows-1252 reader made of it, where that can be undone."""

    def utf8(match: re.Match[str]) -> str:
        try:
            return match[0].encode("cp1252").decode()
        except UnicodeError:
            return match[0]

    return MOJIBAKE.sub(utf8, text)

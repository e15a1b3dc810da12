"""Sources with their licence, as the tables name them."""

from typing import NamedTuple


class Source(NamedTuple):
    """A published set: name, licence, how near to practice its text is (1 to 4), and privacy."""

    name: str
    licence: str
    realism: float
    """4 as written in practice or for readers, 3.4 role-played, 3 exam style, 2.6 a code list,
    2.2 written by a model."""
    contains_phi: bool = False
    """People's own words about their health; such rows have files of their own."""


SOURCES = {
    "mts_dialog": Source("MTS-Dialog", "CC BY 4.0", 3.4),
    "aci_bench": Source("ACI-Bench", "CC BY 4.0", 3.4),
    "meqsum": Source("MeQSum", "CC BY 4.0", 4.0, contains_phi=True),
    "medquad": Source("MedQuAD", "CC BY 4.0", 4.0),
    "pubmedqa": Source("PubMedQA (PQA-L)", "MIT", 4.0),
    "icd10cm": Source("ICD-10-CM 2021", "public domain; files MIT", 2.6),
    "ncbi_disease": Source("NCBI disease corpus", "CC BY 4.0", 4.0),
    "shadr": Source("SHADR", "CC BY 4.0", 2.2),
    "mtsamples": Source("MTSamples", "CC0 by the uploader's word", 4.0),
    "medec": Source("MEDEC (MS part)", "CC BY 4.0", 3.0),
    "nstg": Source("Nigeria Standard Treatment Guidelines 2022", "CC BY 4.0", 3.4),
}

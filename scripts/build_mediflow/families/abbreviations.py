"""Sentences of MTSamples with clinical abbreviations that have one meaning there."""

import json
import re
from collections.abc import Iterator

from mediphi.records import Document
from scripts.build_mediflow.families.notes import document_type
from scripts.build_mediflow.material import Material
from scripts.build_mediflow.rows import Candidate, Split, Task, digest

TABLE = Task(
    name="abbreviation_table",
    task_type="abbreviation expansion",
    source="mtsamples",
    input_data="Clinical Note",
    level=0,
    output_format="json",
    max_rows=(280, 40),
    phrasings=(
        "Expand the abbreviations in this sentence. Output a JSON object from abbreviation to "
        "full form.",
        "Which abbreviations does the text use and what do they stand for? Answer in JSON.",
        "Give the meaning of every clinical abbreviation in the sentence as a JSON object.",
        "List each abbreviation of the sentence with its full form. Return JSON.",
    ),
)
SENTENCE = Task(
    name="abbreviation_sentence",
    task_type="abbreviation expansion",
    source="mtsamples",
    input_data="Clinical Note",
    level=1,
    max_rows=(280, 40),
    phrasings=(
        "Rewrite the sentence with its clinical abbreviations written out.",
        "Write out the abbreviations in this line of a note. Change nothing else.",
        "Replace every abbreviation by its full form and keep the rest as it is.",
        "Give the same sentence without abbreviations.",
    ),
)
EXPANSIONS = {
    "AAA": "abdominal aortic aneurysm",
    "ABG": "arterial blood gas",
    "ACL": "anterior cruciate ligament",
    "ADHD": "attention deficit hyperactivity disorder",
    "AICD": "automatic implantable cardioverter-defibrillator",
    "ALT": "alanine aminotransferase",
    "AST": "aspartate aminotransferase",
    "BMI": "body mass index",
    "BPH": "benign prostatic hyperplasia",
    "BUN": "blood urea nitrogen",
    "CABG": "coronary artery bypass graft",
    "CAD": "coronary artery disease",
    "CBC": "complete blood count",
    "CHF": "congestive heart failure",
    "CNS": "central nervous system",
    "COPD": "chronic obstructive pulmonary disease",
    "CPAP": "continuous positive airway pressure",
    "CSF": "cerebrospinal fluid",
    "CT": "computed tomography",
    "DIP": "distal interphalangeal",
    "DJD": "degenerative joint disease",
    "DKA": "diabetic ketoacidosis",
    "DVT": "deep vein thrombosis",
    "EBL": "estimated blood loss",
    "ECG": "electrocardiogram",
    "EEG": "electroencephalogram",
    "EGD": "esophagogastroduodenoscopy",
    "EKG": "electrocardiogram",
    "EMG": "electromyography",
    "EOMI": "extraocular movements intact",
    "ERCP": "endoscopic retrograde cholangiopancreatography",
    "ESRD": "end-stage renal disease",
    "GERD": "gastroesophageal reflux disease",
    "GI": "gastrointestinal",
    "GU": "genitourinary",
    "HCTZ": "hydrochlorothiazide",
    "HDL": "high-density lipoprotein",
    "HEENT": "head, eyes, ears, nose, and throat",
    "HIV": "human immunodeficiency virus",
    "HPI": "history of present illness",
    "HTN": "hypertension",
    "IBS": "irritable bowel syndrome",
    "ICU": "intensive care unit",
    "IDDM": "insulin-dependent diabetes mellitus",
    "INR": "international normalized ratio",
    "IOL": "intraocular lens",
    "IOP": "intraocular pressure",
    "IUD": "intrauterine device",
    "IUGR": "intrauterine growth restriction",
    "IV": "intravenous",
    "IVC": "inferior vena cava",
    "JVD": "jugular venous distention",
    "KUB": "kidneys, ureters, and bladder",
    "LDL": "low-density lipoprotein",
    "LLQ": "left lower quadrant",
    "LMP": "last menstrual period",
    "LUQ": "left upper quadrant",
    "LVEF": "left ventricular ejection fraction",
    "MCL": "medial collateral ligament",
    "MCP": "metacarpophalangeal",
    "MRA": "magnetic resonance angiography",
    "MRI": "magnetic resonance imaging",
    "MRSA": "methicillin-resistant Staphylococcus aureus",
    "MTP": "metatarsophalangeal",
    "MVA": "motor vehicle accident",
    "NICU": "neonatal intensive care unit",
    "NIDDM": "non-insulin-dependent diabetes mellitus",
    "NKDA": "no known drug allergies",
    "NPO": "nothing by mouth",
    "ORIF": "open reduction and internal fixation",
    "OSA": "obstructive sleep apnea",
    "PACU": "postanesthesia care unit",
    "PERRLA": "pupils equal, round, and reactive to light and accommodation",
    "PET": "positron emission tomography",
    "PFT": "pulmonary function test",
    "PICC": "peripherally inserted central catheter",
    "PIP": "proximal interphalangeal",
    "PMH": "past medical history",
    "PSA": "prostate-specific antigen",
    "PTCA": "percutaneous transluminal coronary angioplasty",
    "PTSD": "posttraumatic stress disorder",
    "PTT": "partial thromboplastin time",
    "RLQ": "right lower quadrant",
    "RSV": "respiratory syncytial virus",
    "RUQ": "right upper quadrant",
    "SIADH": "syndrome of inappropriate antidiuretic hormone secretion",
    "SROM": "spontaneous rupture of membranes",
    "SVT": "supraventricular tachycardia",
    "TAH": "total abdominal hysterectomy",
    "TEE": "transesophageal echocardiogram",
    "TIA": "transient ischemic attack",
    "TMJ": "temporomandibular joint",
    "TPN": "total parenteral nutrition",
    "TSH": "thyroid-stimulating hormone",
    "TURP": "transurethral resection of the prostate",
    "URI": "upper respiratory infection",
    "UTI": "urinary tract infection",
    "VBAC": "vaginal birth after cesarean",
    "VSD": "ventricular septal defect",
    "WBC": "white blood cell",
    "b.i.d.": "twice a day",
    "p.o.": "by mouth",
    "p.r.n.": "as needed",
    "q.i.d.": "four times a day",
    "t.i.d.": "three times a day",
}
"""Left out: those with several meanings in the notes (ACE wraps, IM nails, CVA, LAD, ED, PT)."""
FORMS = "|".join(re.escape(form) for form in sorted(EXPANSIONS, key=len, reverse=True))
ABBREVIATION = re.compile(rf"(?<![\w.&/-])(?:(?P<article>[Aa]n?) )?(?P<form>{FORMS})(?![\w&/-])")
OTHER_MEANING = re.compile(
    r"\b(?:stage|grade|class|type|phase|nerves?|zone|level|axis|factor|category|group|part)s? IV\b"
    r"|\bCT surg|\bV?III?, IV\b",
    re.IGNORECASE,
)
"""The Roman numeral; cardiothoracic surgery."""
OTHER_ABBREVIATION = re.compile(
    r"\b[A-Z]{2,5}s?\d*\b|\b[a-z]\.(?:[a-z]\.)+|\bq\.|\b[A-Za-z]/[A-Za-z]\b|\b[A-Z] and [A-Z]\b"
    r"|\b[A-Z]-[a-z]+|^[A-Z]\. "
)
"""A sentence with one that is not in the list would have an incomplete answer."""
SENTENCE_END = re.compile(r"(?<=[a-z)\d]\.) (?=[A-Z])")
PER_NOTE = 2


def candidates(material: Material) -> Iterator[Candidate]:
    """Two sentences of a note at most, by hash."""
    for note in material.mtsamples:
        split = material.origins.split_of_note(note.group_id)
        yield from of_note(note, split)


def of_note(note: Document, split: Split) -> Iterator[Candidate]:
    """Alternates between the table of abbreviations and the rewritten sentence."""
    usable = {s: found for s in sentences(note.text) if (found := abbreviations_of(s))}
    chosen = sorted(usable, key=lambda sentence: digest("sentence", sentence))[:PER_NOTE]
    kind = document_type(note)
    for sentence in chosen:
        found = usable[sentence]
        if int(digest("form", sentence), 16) % 2:
            wanted = json.dumps(found)
            task = TABLE
        else:
            wanted = ABBREVIATION.sub(written_out, sentence)
            task = SENTENCE
        level = min(task.level + len(found) - 1, 3)
        yield task.candidate(
            note.group_id, split, given=sentence, wanted=wanted, input_data=kind, level=level
        )


def sentences(text: str) -> Iterator[str]:
    """Sentences of a readable length."""
    for line in text.split("\n"):
        for sentence in SENTENCE_END.split(line):
            if 40 <= len(sentence) <= 300:
                yield sentence.strip()


def abbreviations_of(sentence: str) -> dict[str, str]:
    """Abbreviation -> full form; empty where the sentence has others or says the full form."""
    forms = dict.fromkeys(match["form"] for match in ABBREVIATION.finditer(sentence))
    found = {form: EXPANSIONS[form] for form in forms}
    rest = ABBREVIATION.sub(" ", sentence)
    spelled = any(full in sentence.lower() for full in found.values())
    other = OTHER_ABBREVIATION.search(rest) or OTHER_MEANING.search(sentence)
    return {} if spelled or other else found


def written_out(match: re.Match[str]) -> str:
    """The full form; `an MRI` becomes `a magnetic resonance imaging`."""
    full, article = EXPANSIONS[match["form"]], match["article"]
    if article is not None:
        vowel = full[0] in "aeio" or full.startswith("upper")
        return f"{article[0]}{'n' if vowel else ''} {full}"
    opens = match.start() == 0 or match.string[: match.start()].endswith(". ")
    return full[0].upper() + full[1:] if opens and match["form"].isupper() else full

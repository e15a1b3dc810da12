"""Words and what the rules put in their place."""

_PAIRS = """
left right; bilateral unilateral; increase decrease; increased decreased; increases decreases;
increasing decreasing; higher lower; high low; positive negative; present absent; with without;
acute chronic; benign malignant; proximal distal; anterior posterior; medial lateral; male female;
man woman; before after; always never; normal abnormal; improved worsened; improve worsen;
denies reports; mild severe; superior inferior; hypertension hypotension; early late;
hyperglycemia hypoglycemia; inpatient outpatient; maternal paternal; mother father; days weeks;
brother sister; systolic diastolic; upper lower; more less; common rare; effective ineffective;
significant insignificant; better worse; primary secondary; stable unstable; internal external;
elevated reduced; dominant recessive; arterial venous; intravenous oral; daily weekly;
months years; boy girl; older younger; first second; likely unlikely; safe unsafe; large small;
initial subsequent; open closed; dorsal ventral; specified unspecified; sensitive insensitive;
active inactive; son daughter; type grade
"""
OPPOSITES: dict[str, tuple[str, ...]] = {}
for _one, _other in (pair.split() for pair in _PAIRS.split(";")):
    OPPOSITES[_one] = (*OPPOSITES.get(_one, ()), _other)
    OPPOSITES[_other] = (*OPPOSITES.get(_other, ()), _one)
"""One word for its opposite or its neighbour on the same scale."""

KINDS = {
    "olol": ("atenolol", "metoprolol", "propranolol", "bisoprolol"),
    "pril": ("lisinopril", "enalapril", "ramipril", "captopril"),
    "sartan": ("losartan", "valsartan", "candesartan", "irbesartan"),
    "statin": ("atorvastatin", "simvastatin", "pravastatin", "rosuvastatin"),
    "cillin": ("amoxicillin", "ampicillin", "penicillin", "oxacillin"),
    "mycin": ("vancomycin", "clindamycin", "erythromycin", "azithromycin"),
    "azole": ("fluconazole", "omeprazole", "metronidazole", "voriconazole"),
    "itis": ("hepatitis", "arthritis", "pancreatitis", "bronchitis", "gastritis", "colitis"),
    "emia": ("anemia", "leukemia", "hyperlipidemia", "bacteremia", "ischemia"),
    "osis": ("cirrhosis", "thrombosis", "fibrosis", "stenosis", "tuberculosis", "scoliosis"),
    "oma": ("lymphoma", "carcinoma", "melanoma", "adenoma", "glioma", "hematoma"),
    "pathy": ("neuropathy", "cardiomyopathy", "retinopathy", "nephropathy", "myopathy"),
    "ectomy": ("appendectomy", "cholecystectomy", "mastectomy", "hysterectomy", "colectomy"),
    "oscopy": ("colonoscopy", "bronchoscopy", "laparoscopy", "arthroscopy", "cystoscopy"),
    "ology": ("cardiology", "neurology", "oncology", "radiology", "nephrology"),
    "algia": ("myalgia", "neuralgia", "arthralgia", "fibromyalgia"),
}
"""Endings that name a kind, with members of it."""

HEDGES = {
    "is": ("may be", "might or might not be", "could be something like", "is perhaps"),
    "are": ("may be", "might or might not be", "are perhaps", "could be"),
    "was": ("may have been", "was perhaps", "might have been", "was more or less"),
    "were": ("may have been", "were perhaps", "might have been", "were to some degree"),
    "has": ("may have", "possibly has", "seems to have"),
    "have": ("may have", "possibly have", "seem to have"),
    "had": ("may have had", "possibly had", "seems to have had"),
    "will": ("may or may not", "might at some point", "could"),
    "should": ("could perhaps", "might want to", "may at some stage"),
    "can": ("may or may not", "could in some cases", "might"),
    "causes": ("has something to do with", "is in some way linked to"),
    "shows": ("may point to", "seems to say something about"),
    "denies": ("does not clearly mention", "says little about"),
    "reports": ("seems to mention", "may have spoken of"),
    "not": ("not quite", "not really", "perhaps not"),
    "because": ("possibly in connection with the fact that", "maybe since"),
}
VAGUE_AMOUNTS = ("some", "a few", "several", "a certain number of", "a number of", "so many")
_QUALIFIER = (
    r"(?<![\w'-])(?:(?!(?:a|an|and|as|by|for|from|has|have|in|is|no|of|on|or|the|to|was|with)\b)"
    r"[a-z]+[ -])?"
)
VAGUE_NAMES = (
    (_QUALIFIER + r"(?:\w+(?:itis|emia|osis|oma|pathy|algia)|syndrome|disease|cancer"
     r"|infection|disorder|deficiency|failure|injury|pain|fever|diabetes|hypertension|asthma)\b",
     ("a health problem", "the condition", "some illness", "this kind of problem")),
    (r"(?<![\w'-])\w{4,}(?:olol|pril|sartan|statin|cillin|mycin|azole|mide|pine|tine)\b",
     ("a medication", "some drug", "the medicine", "one of the drugs")),
    (r"(?<![\w'-])(?:\w+(?:ectomy|oscopy|plasty)|surgery|operation|biopsy|tomography|x-ray|ultrasound"
     r"|imaging|therapy|treatment|chemotherapy)\b",
     ("a procedure", "something that was done", "the measure in question", "some intervention")),
    (r"\b(?:the )?(?:patient|mother|father|brother|sister|wife|husband|child)\b",
     ("someone", "the person in question", "one of them")),
    (r"\b(?:left|right|upper|lower|anterior|posterior|proximal|distal|bilateral)\b",
     ("one", "a certain", "some")),
)  # fmt: skip
"""Patterns of precise terms with the vague words that stand in for them."""

PADDED = {
    "because": ("due to the fact that", "for the simple reason that"),
    "to": ("in order to", "so as to"),
    "now": ("at this point in time",),
    "many": ("a large number of", "a great many different"),
    "some": ("a certain number of",),
    "can": ("has the ability to", "is in a position to"),
    "may": ("may in some cases possibly",),
    "if": ("in the event that",),
    "before": ("prior to the time of",),
    "after": ("following the occurrence of",),
    "about": ("on the subject of",),
    "and": ("and also", "as well as", "and, in addition to this,"),
    "shows": ("goes to show", "serves to demonstrate"),
    "most": ("the vast majority of",),
    "often": ("on a great many occasions",),
    "but": ("but on the other hand", "although it must be said that"),
    "the patient": ("the patient who is concerned here", "the patient in question"),
}
CASUAL = {
    "patient": ("guy", "person"),
    "patients": ("folks", "people"),
    "children": ("kids",),
    "child": ("kid",),
    "physician": ("doc",),
    "doctor": ("doc",),
    "abdomen": ("tummy",),
    "abdominal": ("tummy",),
    "however": ("but hey",),
    "therefore": ("so yeah",),
    "very": ("super", "totally"),
    "significant": ("pretty big", "huge"),
    "significantly": ("a whole lot",),
    "severe": ("really nasty", "super bad"),
    "medication": ("meds",),
    "medications": ("meds",),
    "information": ("info",),
    "approximately": ("like", "around"),
    "treatment": ("fix",),
    "treated": ("fixed up",),
    "disease": ("sickness", "bug"),
    "mother": ("mom",),
    "father": ("dad",),
    "symptoms": ("stuff going on",),
    "problems": ("issues and stuff",),
    "many": ("tons of", "loads of"),
    "is not": ("ain't",),
    "do not": ("don't",),
    "does not": ("doesn't",),
    "cannot": ("can't",),
    "was not": ("wasn't",),
    "were not": ("weren't",),
    "because": ("cuz", "'cause"),
    "going to": ("gonna",),
    "want to": ("wanna",),
    "also": ("plus",),
    "and": ("&", "n"),
    "with": ("w/",),
    "you": ("u",),
    "study": ("paper thing",),
    "results": ("numbers and stuff",),
    "history": ("back story",),
    "pain": ("ouch",),
    "died": ("passed",),
    "usually": ("most times",),
    "important": ("a big deal",),
    "good": ("cool",),
    "serious": ("no joke",),
}
WRONG_FORMS = {
    "is": ("are", "be"), "are": ("is",), "was": ("were",), "were": ("was",), "has": ("have",),
    "have": ("has",), "does": ("do",), "do": ("does",), "an": ("a",), "a": ("an",),
    "this": ("these",), "these": ("this",), "in": ("on", "at"), "on": ("in",), "for": ("to",),
    "by": ("from",), "of": ("from",), "at": ("on",), "them": ("they",), "their": ("they",),
    "its": ("it's",), "who": ("which",), "he": ("him",), "she": ("her",), "been": ("be",),
    "being": ("been",), "treated": ("treat",), "diagnosed": ("diagnose",), "shown": ("shows",),
    "admitted": ("admit",), "associated": ("associate",), "compared": ("compare",),
    "found": ("find",), "given": ("gave",), "taken": ("took",), "seen": ("saw",),
    "used": ("use",), "performed": ("perform",), "reported": ("report",), "noted": ("note",),
    "presents": ("present",), "denies": ("deny",), "reports": ("report",), "shows": ("show",),
    "includes": ("include",), "causes": ("cause",), "occurs": ("occur",), "takes": ("take",),
    "went": ("go",), "came": ("come",), "better": ("more better",), "worse": ("more worse",),
    "much": ("many",), "many": ("much",), "years": ("year",), "days": ("day",),
    "weeks": ("week",), "months": ("month",), "patients": ("patient",), "symptoms": ("symptom",),
    "children": ("childs",), "people": ("peoples",), "what": ("which",),
    "should": ("should to",), "can": ("can to",), "may": ("may to",), "must": ("must to",),
}  # fmt: skip

CAUSAL = {
    "because of": ("despite", "and thus led to"),
    "due to": ("leading to", "despite"),
    "caused by": ("the cause of",),
    "secondary to": ("the cause of", "resulting in"),
    "causes": ("is caused by", "results from"),
    "cause": ("result from", "follow from"),
    "leads to": ("results from", "is a result of"),
    "lead to": ("result from",),
    "results in": ("results from",),
    "result in": ("result from",),
    "results from": ("results in",),
    "because": ("although", "and for this reason"),
    "therefore": ("nevertheless", "despite this"),
    "thus": ("even so", "nonetheless"),
    "although": ("because", "since"),
    "though": ("because",),
    "however": ("therefore", "consequently"),
    "but": ("and therefore", "because"),
    "despite": ("because of", "as a result of"),
    "if": ("unless", "even if"),
    "unless": ("if",),
    "while": ("because",),
    "so that": ("even though",),
    "associated with": ("the sole cause of", "excluded by"),
    "indicates": ("rules out",),
    "suggests": ("rules out",),
    "suggest": ("rule out",),
    "risk factor for": ("consequence of",),
    "followed by": ("preceded by",),
}

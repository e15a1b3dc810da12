"""Makes `assets/corpora/mediflow`: a small instruction set in MediFlow's published format.

MediFlow (arXiv 2505.10717) is written by a large language model. This set has the same columns,
task names and document types, but its inputs and outputs are text of published, licensed data
sets or follow from it by rule.

    python -m scripts.build_mediflow --data FOLDER

FOLDER has one folder per published set that is not bundled: `medec_ms` (MEDEC, its MS part:
validation and test CSV), `meqsum` (MeQSum as JSONL), `sdoh_shadr` (SHADR, the annotated CSV), and
`aci_bench` with the three test CSVs of ACI-Bench, which serve to keep their text out. Everything
else is read from `assets/corpora`.
"""

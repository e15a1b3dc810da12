"""Write the resolved config of every selectable setting to tests/golden/config/.

A change of conf/ then shows all that it moves, in the diff. Run: python scripts/golden_configs.py
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "config"
PARTNERS = {"sft": "mediflow", "dpo": "mediflow_dpo"}
MODELS = ["++merge.models.a.path=runs/pit/a", "++merge.models.b.path=runs/pit/b"]
PLACES = {"MEDIPHI_ROOT": ".", "MEDIPHI_RUNS": "runs", "MEDIPHI_CACHE": ".cache/mediphi"}


def cases() -> dict[str, list[str]]:
    """Overrides of each setting, by the name of its golden file."""
    found: dict[str, list[str]] = {"default": []}
    for group in ("corpus", "corpus/paper", "hardware", "experiment", "merge", "validation"):
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            option = "/".join((*group.split("/")[1:], path.stem))
            name = f"{group.split('/')[0]}-{option.replace('/', '-')}"
            found[name] = [f"{group.split('/')[0]}={option}"]
    for stage in sorted((ROOT / "conf" / "stage").glob("*.yaml")):
        for model in sorted((ROOT / "conf" / "model").glob("*.yaml")):
            overrides = [f"stage={stage.stem}", f"model={model.stem}"]
            found[f"stage-{stage.stem}-{model.stem}"] = overrides
    return found


def partnered(overrides: list[str]) -> list[str]:
    """A stage with a corpus that it can read, and the like.

    A corpus with a stage that can read it, eight GPUs with a model whose batch divides by eight, a
    merge with models.
    """
    text = " ".join(overrides)
    if "stage=merge" in text or "stage=search" in text:
        return [*overrides, "merge=breadcrumbs", *MODELS]
    if text.startswith("validation="):
        return [*overrides, "stage=search", "merge=breadcrumbs", *MODELS]
    if text == "merge=mergekit":
        return [*overrides, "stage=merge", "merge.config=merge.yml"]
    if text.startswith("merge="):
        return [*overrides, "stage=merge", *MODELS[: 1 if text == "merge=slerp" else 2]]
    if "x8_" in text or "8_ddp" in text:
        return [*overrides, "model=phi35_mini"]
    for stage, corpus in PARTNERS.items():
        if f"stage={stage}" in text:
            return [*overrides, f"corpus={corpus}"]
        if any(o in (f"corpus={corpus}", f"corpus=paper/{corpus}") for o in overrides):
            return [*overrides, f"stage={stage}"]
    return overrides


def resolved(overrides: list[str]) -> str:
    """The judged config as YAML, the same on every machine."""
    from mediphi.config import dump, load
    from mediphi.door.compose import compose, make_loader
    from mediphi.door.files import tame_hydra

    before = {key: os.environ.get(key) for key in PLACES}
    os.environ.update(PLACES)
    try:
        tame_hydra()
        loader = make_loader(ROOT / "conf")
        return dump(load(compose(loader, "config", partnered(overrides))))
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    texts = {f"{name}.yaml": resolved(overrides) for name, overrides in cases().items()}
    for old in GOLDEN.glob("*.yaml"):
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
    print(f"{len(texts)} configs in {GOLDEN.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What a config is called and where its run lives: functions of the config, never of the clock."""

import hashlib
import json
from pathlib import Path

import yaml

from mediphi.config.schema import Config


def config_hash(config: Config) -> str:
    """16 hex digits over what decides the result: stage, seed, and corpus and model or the merge.

    Hardware, logger, paths and `check_only` change speed or places only. Bundled files are named
    relative to `paths.assets`, so that a checkout elsewhere gives the same hash.
    """
    decides = config.model_dump(mode="json", include={"stage", "seed", *_read_by(config)})
    text = json.dumps(decides, sort_keys=True).replace(json.dumps(config.paths.assets)[1:-1], "@")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_by(config: Config) -> set[str]:
    """The sections that decide what a stage makes, beside its own."""
    match config.stage.kind:
        case "merge":
            return {"merge"}
        case "search":
            return {"merge", "validation"}
        case _:
            return {"corpus", "model"}


def run_name(config: Config) -> str:
    """The user's `name`, or `<corpus>-<model>-<hash8>`, of a merge `<method>-<hash8>`."""
    if config.merge is None:
        what = f"{config.corpus.name}-{config.model.name}"
    else:
        what = config.merge.method or Path(config.merge.config or "").stem
    return config.name or f"{what}-{config_hash(config)[:8]}"


def run_dir(config: Config) -> Path:
    """`<paths.runs>/<stage>/<name>`."""
    return Path(config.paths.runs) / config.stage.kind / run_name(config)


def dump(config: Config) -> str:
    """The resolved config as YAML; loading it again gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

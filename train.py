"""Compose the config with Hydra, judge it with the schema, run one stage."""

import os
import signal
from pathlib import Path

# Until a stage can save its state, Ctrl-C ends without a traceback; imports take a while.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from mediphi.door import enter, one_line_errors

os.environ.setdefault("MEDIPHI_ROOT", str(Path(__file__).resolve().parent))
# Spinning OpenMP threads on busy cores slow a step down tenfold; must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Packed rows come in every length, and a CPU's kernels keep a compiled product for each in two
# caches: 1,024 of them take gigabytes, and few are met again.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
@one_line_errors
def main(cfg: DictConfig) -> float | None:
    """Run one experiment and return its objective. Imports stand here: errors need no torch."""
    from mediphi import config

    judged = config.load(cfg)

    from mediphi.run import run

    return run(judged).metric


if __name__ == "__main__":
    enter(main)

"""Compose the config with Hydra, judge it with the schema, run one stage."""

import os
import signal
from pathlib import Path

# Until a stage can save its state, Ctrl-C ends without a traceback; imports take a while.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from mediphi.door import enter, one_line_errors, prepare_process

os.environ.setdefault("MEDIPHI_ROOT", str(Path(__file__).resolve().parent))
prepare_process()


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

"""The way in: Hydra extended and tamed, so that every mendable error is one screen and exit 2."""

from mediphi.door.enter import enter, forced, one_line_errors
from mediphi.door.process import PROCESS_SETTINGS, prepare_process

__all__ = ["PROCESS_SETTINGS", "enter", "forced", "one_line_errors", "prepare_process"]

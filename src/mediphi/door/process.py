"""What has to be in the environment before PyTorch is loaded."""

import os

PROCESS_SETTINGS = {
    # Spinning OpenMP threads on busy cores slow a step down tenfold.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Packed rows come in every length, and a CPU's kernels keep a compiled product for each in two
    # caches: 1,024 of them take gigabytes, and few are met again.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Environment variables; what the user has set stays."""


def prepare_process() -> None:
    """Set what is not set; child processes inherit it."""
    for name, value in PROCESS_SETTINGS.items():
        os.environ.setdefault(name, value)

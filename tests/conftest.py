"""For all tests: they run as outside of a Slurm job, also on a node that Slurm gave."""

import os


def pytest_configure() -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]

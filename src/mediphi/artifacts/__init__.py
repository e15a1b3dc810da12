"""What a run directory holds and who may write to it. A folder without a valid manifest is none."""

from mediphi.artifacts.files import (
    free_space,
    preflight_space,
    rename_folder,
    room_for,
    write_atomic,
)
from mediphi.artifacts.lineage import (
    check_data,
    named_parents,
    plain_folder,
    trained_from,
    verified_parent,
)
from mediphi.artifacts.lock import locked
from mediphi.artifacts.manifest import Parent, manifest_hash, publish, read_manifest, verify
from mediphi.artifacts.runs import (
    RunDirectory,
    is_run_of,
    open_run,
    read_config_hash,
    refuse_taken,
)

__all__ = [
    "Parent",
    "RunDirectory",
    "check_data",
    "free_space",
    "is_run_of",
    "locked",
    "manifest_hash",
    "named_parents",
    "open_run",
    "plain_folder",
    "preflight_space",
    "publish",
    "read_config_hash",
    "read_manifest",
    "refuse_taken",
    "rename_folder",
    "room_for",
    "trained_from",
    "verified_parent",
    "verify",
    "write_atomic",
]

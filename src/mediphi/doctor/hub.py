"""The Hugging Face hub: whether anything of this config needs it, and whether it is there."""

from collections.abc import Iterator
from pathlib import Path

from mediphi.config.corpus import HubSource
from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning
from mediphi.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def is_local(folder: str) -> bool:
    """Whether a model's name is a folder's, there or not, and no hub id."""
    return Path(folder).exists() or folder.startswith((".", "/")) or folder.count("/") != 1


def refuse_absent(folder: str, revision: str) -> None:
    """Told before libraries try: they retry for half a minute.

    Raises:
        UserError: no such model folder, or a hub id that cannot be had from here.
    """
    from huggingface_hub import constants

    from mediphi.backbone import REMEDY
    from mediphi.hub import reachable

    if is_local(folder):
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"model {folder}: no config.json there; {REMEDY}")
    elif not is_cached(folder, ("config.json",), revision):
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{folder} is not in the local cache, HF_HUB_OFFLINE is set; {REMEDY}")
        if not reachable(folder):
            raise UserError(f"{folder} is not in the local cache, and no network; {REMEDY}")


def is_cached(repo_id: str, names: tuple[str, ...], revision: str) -> bool:
    """Whether one of these files of a hub id is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo_id, name, revision=revision) for name in names)
    return any(isinstance(path, str) for path in found)


def hub(case: Case) -> Iterator[Finding]:
    """Asks the network only for what the config takes from the hub."""
    from huggingface_hub import constants

    sources, model = case.config.corpus.sources, case.config.model
    data = [name for name, source in sources.items() if isinstance(source, HubSource)]
    offline = constants.HF_HUB_OFFLINE
    state = f"HF_HUB_OFFLINE is {'set' if offline else 'not set'}"
    if is_local(model.folder) and not data:
        yield ok("hub", f"not needed: model and corpus are local ({state})")
        return
    if data and offline:
        remedy = "unset it, or give a local copy: kind=parquet, jsonl or dataset_folder"
        text = f"corpus.sources {', '.join(data)} stream from the hub, but {state}"
        yield failure("hub", text, remedy=remedy)
    elif data:
        yield ok("hub", f"corpus.sources {', '.join(data)} stream from the hub ({state})")
    if is_local(model.folder):
        return
    folder = case.folder()
    if is_cached(folder, WEIGHTS, model.revision):
        yield ok("hub", f"{folder} is in the local cache ({state})")
    else:
        remedy = f"hf download {folder}, before a run on many devices waits for it"
        yield warning("hub", f"the weights of {folder} are to be downloaded", remedy=remedy)

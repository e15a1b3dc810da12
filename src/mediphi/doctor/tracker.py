"""The logger that the config asks for: W&B's state without a word to its server."""

import importlib.util
import os
from collections.abc import Iterator

from mediphi.doctor.case import Case
from mediphi.doctor.findings import Finding, failure, ok, warning


def logger(case: Case) -> Iterator[Finding]:
    """Which mode W&B would take, and whether there is a key; never the key."""
    kind = case.config.logger.kind
    if kind != "wandb":
        yield from _other(kind)
        return
    case.libraries()
    try:
        import wandb  # noqa: F401

        from mediphi.tracking.wandb_log import logged_in, wandb_mode
    except Exception as error:
        found = f"wandb cannot be imported ({type(error).__name__})"
        yield failure("logger", found, remedy="pip install -e ., or logger=csv")
        return
    mode, has_key, wanted = wandb_mode(), logged_in(), os.environ.get("WANDB_MODE", "")
    if mode == "disabled":
        text = "W&B is disabled (WANDB_MODE); metrics.csv is written all the same"
        yield ok("logger", text)
    elif mode == "online":
        yield ok("logger", "W&B online: a key is there; it was not tried, nothing was sent")
    elif wanted in ("online", "run", "shared") and not has_key:
        yield warning(
            "logger",
            f"WANDB_MODE={wanted}, but there is no key: runs are kept offline",
            remedy="wandb login, or WANDB_API_KEY in the environment",
        )
    else:
        key = "a key is there" if has_key else "no key; wandb login or WANDB_API_KEY sends them"
        yield ok("logger", f"W&B offline, runs are kept in wandb/ of their directory ({key})")


def _other(kind: str) -> Iterator[Finding]:
    if kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        remedy = "pip install -e '.[tensorboard]', or logger=csv"
        yield failure("logger", "logger=tensorboard, which is not installed", remedy=remedy)
    else:
        yield ok("logger", f"{kind}; metrics.csv is always written")

"""The first line of a `merge.yml` of ours: what mergekit's YAML cannot say of the weights."""

import re
from typing import NamedTuple

from mediphi.config.methods import METHODS, Semantics
from mediphi.errors import ConfigError

MARK = "# mediphi:"
SHAPE = re.compile(
    rf"{MARK} semantics=(mergekit|paper) seed=(\d{{1,19}})( dtypes=own)?(?: \(.*\))?"
)


class Header(NamedTuple):
    """What decides the weights beside the YAML.

    Attributes:
        seed: of random masks.
        own_dtypes: whether each tensor keeps the type it has in the first model, in place of the
            file's one type for all.
    """

    semantics: Semantics
    seed: int
    own_dtypes: bool = False


def with_header(text: str, header: Header, *, method: str) -> str:
    """The text of a recipe under the line that completes it; an older one is replaced."""
    known = METHODS.get(method)
    differs = known.differs if known and header.semantics == "paper" else ""
    told = f" (mergekit would give other weights: here {differs})" if differs else ""
    if text.startswith(MARK):
        text = text.partition("\n")[2]
    own = " dtypes=own" if header.own_dtypes else ""
    return f"{MARK} semantics={header.semantics} seed={header.seed}{own}{told}\n{text}"


def read_header(text: str, where: str) -> Header | None:
    """What the first line says; None where it is not ours.

    Raises:
        ConfigError: it begins like ours and is not.
    """
    if not text.startswith(MARK):
        return None
    found = SHAPE.fullmatch(text.partition("\n")[0].rstrip())
    if found is None:
        raise ConfigError(
            [
                f"{where}:1: must be '{MARK} semantics=mergekit|paper seed=NUMBER [dtypes=own]', "
                "or left out"
            ]
        )
    semantics = "paper" if found[1] == "paper" else "mergekit"
    return Header(semantics, int(found[2]), own_dtypes=bool(found[3]))

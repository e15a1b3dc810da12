"""The base of every config section."""

from collections.abc import Iterator
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

BROKEN_RULES = "broken_rules"
"""Pydantic error type of a section whose keys are each fine but do not go together."""


class BrokenRule(NamedTuple):
    """One rule between keys that a section breaks.

    Attributes:
        key: the key to change, relative to the section.
        allowed: what it may be, in words.
    """

    key: str
    allowed: str


class Strict(BaseModel):
    """Unknown keys are errors, values never change after loading, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    def broken_rules(self) -> Iterator[BrokenRule]:
        """Rules between this section's keys; a section overrides it to add its own."""
        return iter(())

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        if broken := tuple(self.broken_rules()):
            text = "; ".join(f"{rule.key}: {rule.allowed}" for rule in broken)
            raise PydanticCustomError(BROKEN_RULES, "{text}", {"text": text, "broken": broken})
        return self

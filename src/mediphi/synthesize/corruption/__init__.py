"""The rejected side of preference pairs, written by rules until a generator by LLM does it.

MediPhi's DPO set (arXiv 2505.10717, section 3) asks an LLM to make an output marginally worse with
one of twelve error types. Here each type is one function with a stated rule. A rule changes as
little as it can, and says None where its error cannot stand in that output: a one-word label has
no detail to unbalance.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Literal, get_args

from mediphi.errors import UserError
from mediphi.synthesize.corruption.content import (
    ambiguity,
    factual_inaccuracy,
)
from mediphi.synthesize.corruption.extent import (
    brevity,
    over_verbosity,
    partial_correctness,
    unbalanced_detail,
)
from mediphi.synthesize.corruption.language import (
    grammatical_errors,
    spelling_errors,
    stylistic_issues,
)
from mediphi.synthesize.corruption.misreading import misinterpretation
from mediphi.synthesize.corruption.reasoning import logical_flaws, simplistic_reasoning
from mediphi.synthesize.corruption.source import Source
from mediphi.synthesize.corruption.trees import Tree, decode, encode, is_json

ErrorType = Literal[
    "ambiguity",
    "partial correctness",
    "over-verbosity",
    "brevity",
    "unbalanced detail",
    "stylistic issues",
    "factual inaccuracy",
    "logical flaws",
    "misinterpretation",
    "simplistic reasoning",
    "grammatical errors",
    "spelling errors",
]
ERROR_TYPES: tuple[ErrorType, ...] = get_args(ErrorType)

Rule = Callable[[Tree, Source], Tree | None]

RULES: dict[ErrorType, Rule] = {
    "ambiguity": ambiguity,
    "partial correctness": partial_correctness,
    "over-verbosity": over_verbosity,
    "brevity": brevity,
    "unbalanced detail": unbalanced_detail,
    "stylistic issues": stylistic_issues,
    "factual inaccuracy": factual_inaccuracy,
    "logical flaws": logical_flaws,
    "misinterpretation": misinterpretation,
    "simplistic reasoning": simplistic_reasoning,
    "grammatical errors": grammatical_errors,
    "spelling errors": spelling_errors,
}


def corrupt(
    row: Mapping[str, str], error_type: ErrorType, *, seed: int, pool: Sequence[str] = ()
) -> str | None:
    """A marginally worse `output` with that error, or None where the error does not apply.

    The result is never empty and differs from the output in more than blanks. Output in JSON stays
    JSON: only its values change. The same arguments give the same text on every machine.

    Args:
        row: `instruction`, `input`, `output`, `task_type`, `output_format` (`plain_text` | `json`).
        error_type: one of `ERROR_TYPES`.
        seed: draws another variant of the same error.
        pool: other outputs of the same task; labels and names are taken from them.

    Raises:
        UserError: an error type that does not exist.
    """
    if error_type not in RULES:
        raise UserError(f"error type '{error_type}': allowed are {', '.join(ERROR_TYPES)}")
    output = row["output"]
    json_text = is_json(output, row["output_format"])
    tree = decode(output) if json_text else output
    source = Source(
        task_type=row["task_type"],
        instruction=row["instruction"],
        document=row["input"],
        pool=tuple(decode(o) if is_json(o, row["output_format"]) else o for o in pool),
        # A string is hashed by SHA-512: the same draws in every process.
        rng=Random(f"{error_type}/{seed}/{row['input']}/{output}"),
    )
    changed = RULES[error_type](tree, source)
    if changed is None:
        return None
    text = encode(changed, like=output) if json_text else changed.strip()
    return text if text.split() and "".join(text.split()) != "".join(output.split()) else None

"""Cases of the doctor, closed at the end; attention as it was."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doctor_cases import doctor_config
from transformers import AttentionInterface

from mediphi.attention import IMPLEMENTATIONS
from mediphi.doctor.case import Case


@pytest.fixture
def make_case(tmp_path: Path) -> Iterator[Callable[..., Case]]:
    made = []

    def make(*overrides: str) -> Case:
        made.append(Case(doctor_config(tmp_path, *overrides)))
        return made[-1]

    yield make
    for case in made:
        case.__exit__()


@pytest.fixture(autouse=True)
def _own_attention() -> Iterator[None]:
    name = IMPLEMENTATIONS["sdpa"]
    own = AttentionInterface()[name]
    yield
    AttentionInterface.register(name, own)

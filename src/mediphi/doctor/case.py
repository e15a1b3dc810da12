"""What is examined: a config, and what its parts turn out to be here, each found out once."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mediphi.config.schema import Config
from mediphi.config.stages import DoctorStage, DpoStage, Phase, PitStage, SftStage, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mediphi.budget import Budget
    from mediphi.doctor.model import Built
    from mediphi.doctor.sample import Sample
    from mediphi.engine import Device

Value = TypeVar("Value")

LIBRARIES = ("torch", "transformers", "lightning")
"""What may be installed and still not load."""


class Unknown(Exception):  # noqa: N818  a state, not an error
    """A part that could not be made, by its name; the check that asked first has told why."""


class Case:
    """The config and its parts. Heavy libraries are imported by the part that needs them.

    Attributes:
        config: as the user gave it.
        assumed: the same with a training stage that reads the corpus, for what asks for one.
    """

    def __init__(self, config: Config) -> None:
        assert isinstance(config.stage, DoctorStage)
        self.config = config
        self.stage = config.stage
        stage = assumed_stage(config, max_length=self.stage.max_length)
        self.assumed = config.model_copy(update={"stage": stage})
        self._made: dict[str, Any] = {}
        self._failed: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> "Case":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def scratch(self) -> Path:
        """A temporary folder, gone at the end."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="doctor-")))

    def libraries(self) -> None:
        """Load what everything heavy needs."""
        self._once("libraries", lambda: [import_module(name) for name in LIBRARIES])

    def device(self) -> "Device":
        """What `hardware` comes down to, or what is there where it asks for what is not."""
        self.libraries()
        from mediphi import engine
        from mediphi.errors import UserError

        hardware = self.config.hardware
        shares = isinstance(self.assumed.stage, DpoStage) and self.assumed.stage.share_prompt

        def make() -> engine.Device:
            try:
                return engine.resolve(hardware, shares_prompts=shares)
            except UserError:
                there = {"accelerator": "auto", "devices": 1, "attention": "auto"}
                found = hardware.model_copy(update={**there, "precision": "auto"})
                return engine.resolve(found, shares_prompts=shares)

        return self._once("device", make)

    def folder(self) -> str:
        """Where model config and tokenizer are."""
        self.libraries()
        from mediphi.backbone import resolve_folder
        from mediphi.doctor.hub import refuse_absent

        def find() -> str:
            folder = resolve_folder(self.config.model.folder)
            refuse_absent(folder, self.config.model.revision)
            return folder

        return self._once("model folder", find)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        from mediphi.backbone import load_tokenizer

        folder, revision = self.folder(), self.config.model.revision
        return self._once("tokenizer", lambda: load_tokenizer(folder, revision=revision))

    def budget(self) -> "Budget":
        """Sizes of the model, and what training all of it would take."""
        from mediphi.budget import estimate

        folder, device = self.folder(), self.device()
        return self._once(
            "model config", lambda: estimate(folder, config=self.assumed, device=device)
        )

    def sample(self) -> "Sample":
        """The corpus's first records, tokenised."""
        from mediphi.doctor.sample import take

        tokenizer, number = self.tokenizer(), self.stage.num_records
        return self._once(
            "corpus",
            lambda: take(self.config.corpus, tokenizer, folder=self.scratch, first=number),
        )

    def model(self) -> "Built":
        """The model in float32 and eval mode, on the device."""
        from mediphi.doctor.model import build

        budget, device, folder = self.budget(), self.device(), self.folder()
        return self._once("model", lambda: build(self.config, budget, device, folder=folder))

    def _once(self, name: str, make: Callable[[], Value]) -> Value:
        if name in self._failed:
            raise Unknown(name)
        if name not in self._made:
            try:
                self._made[name] = make()
            except BaseException:
                self._failed.add(name)
                raise
        return self._made[name]


def assumed_stage(config: Config, *, max_length: int) -> Training:
    """The training stage that reads such records: PIT (whose second phase DAPT is a part of)..."""
    common: dict[str, Any] = {"global_batch": config.rows_per_pass, "max_length": max_length}
    phase = Phase(lr=1e-3)
    if config.corpus.record_kind == "conversation":
        return SftStage(kind="sft", phase=phase, **common)
    if config.corpus.record_kind == "preference":
        return DpoStage(kind="dpo", phase=phase, **common)
    return PitStage(kind="pit", phase1=phase, phase2=phase, **common)

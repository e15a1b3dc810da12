"""Real fits of a small model on a small store, for one process or several."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from toy_store import TEXT, Piece, phi_like_tokenizer, toy_store

from mediphi import engine
from mediphi.backbone import BackboneSpec
from mediphi.checkpointing import SafeCheckpointIO
from mediphi.config.schema import Hardware
from mediphi.config.stages import Optimizer, Phase
from mediphi.data.datamodule import PackedDataModule, References
from mediphi.data.encoding import tokenizer_sha256
from mediphi.data.plan import PlanSettings
from mediphi.data.render import Rendered
from mediphi.data.sequences import PAIR_KINDS, Layout
from mediphi.data.tokenization import build_store
from mediphi.data.tokens import StoreKey, TokenStore
from mediphi.modules.causal_lm import CausalLMModule
from mediphi.modules.dpo import DpoModule, Objective
from mediphi.modules.language_model import LanguageModelModule
from mediphi.records import PIECE_KINDS, PieceKind
from mediphi.strategies.sharding import Sharded

SETTINGS = PlanSettings(kinds=PIECE_KINDS, capacity=48, global_batch=4, max_steps=5)
CPU = engine.Device(type="cpu", name="test", precision="32-true", kernel="sdpa")


WORDS = TEXT.split()


def unequal_store(cache: Path) -> TokenStore:
    """Documents whose lengths don't fill rows evenly: micro-batches with unequal target counts."""
    rng = np.random.default_rng(4)
    documents = [
        (
            f"{source}/{i}",
            source,
            [
                Piece("document", " ".join(rng.choice(WORDS, size=rng.integers(10, 34)))),
                Piece("summary", " ".join(rng.choice(WORDS, size=2))),
            ],
        )
        for source in ("a", "b")
        for i in range(18)
    ]
    return toy_store(cache, documents, data="unequal")


Sizes = tuple[int, int, int]
"""Tokens of a pair's prompt, chosen and rejected answer."""
ERRORS = ("spelling errors", "brevity")


def random_pairs(cache: Path, sizes: Sequence[Sizes], *, vocab: int = 4000) -> TokenStore:
    """Pairs of random tokens."""
    rng, tokenizer = np.random.default_rng(5), phi_like_tokenizer()

    def piece(kind: PieceKind, size: int) -> Piece:
        return Piece(kind, "", tuple(rng.integers(3, vocab, size).tolist()), ())

    kinds: tuple[PieceKind, ...] = ("user", "chosen", "rejected")
    documents = [
        Rendered(
            f"a/{number}",
            "a",
            [piece(kind, size) for kind, size in zip(kinds, own, strict=True)],
            {"task_type": "summarization", "error_type": ERRORS[number % 2]},
        )
        for number, own in enumerate(sizes)
    ]
    key = StoreKey(tokenizer_sha256(tokenizer), "random", f"{vocab} {sizes}", "train", 0)
    return build_store(documents, cache=cache, tokenizer=tokenizer, key=key)


def pair_settings(layout: Layout = "shared_pairs", **changes: Any) -> PlanSettings:
    return replace(PlanSettings(PAIR_KINDS, 48, 4, layout=layout), **changes)


def differs(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of any weight."""
    return max(float((left[n] - right[n]).abs().max()) for n in left)


def gradients(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; all have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and all(g.abs().max() > 1e-4 for g in theirs.values())
    for name, value in ours.items():
        error = (value - theirs[name]).norm() / theirs[name].norm()
        assert error < 1e-5, name  # measured: 2e-6


def nudge(model: Any) -> None:
    """Away from its reference, the same way every time."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def logps_by_row(module: DpoModule, batches: Iterable[Any], *, size: int) -> np.ndarray:
    """What `predict_step` gives, float32 `[size, 2]` by row of the store."""
    found = np.full((size, 2), np.nan, dtype=np.float32)
    with torch.no_grad():
        for scored in (module.predict_step(batch, 0) for batch in batches):
            found[scored.document_index.numpy()] = scored.logps.numpy()
    return found


class Sgd(CausalLMModule):
    """AdamW divides a wrong scale of the gradient away; plain SGD shows it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class SgdModule(Sgd, LanguageModelModule):
    """Next tokens by plain SGD."""


class SgdDpoModule(Sgd, DpoModule):
    """Preferences by plain SGD."""


class SpoilGradient(Callback):
    """Puts NaN into the gradient of one optimizer step; goes before the guard."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self._module, self._optimizer = pl_module, optimizer
            self._before = self._learnt()
            next(pl_module.parameters()).grad.mul_(float("nan"))

    def changed_nothing(self) -> bool:
        """Whether parameters, moments and step counts are those before the step."""
        after = self._learnt()
        return all(torch.equal(now, after[name]) for name, now in self._before.items())

    def _learnt(self) -> dict[str, Tensor]:
        """Before the first step there are no moments: then only parameters."""
        found = {}
        for name, parameter in self._module.named_parameters():
            tensors = {"weight": parameter, **self._optimizer.state[parameter]}
            found |= {f"{name} {key}": t.detach().cpu().clone() for key, t in tensors.items()}
        return found


@dataclass(frozen=True, slots=True)
class Fit:
    """What a fit left behind."""

    module: Any
    data: PackedDataModule
    heldout: list[dict[str, float]]
    train: dict[str, float]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Whole on rank 0; where a strategy splits the model, empty on the others."""
        backbone, strategy = self.module.backbone, self.module.trainer.strategy
        if isinstance(strategy, Sharded):
            return dict(strategy.whole_tensors(backbone))
        found = backbone.named_parameters(remove_duplicate=False)
        return {name: parameter.detach().clone() for name, parameter in found}


def spec_of(folder: Path) -> BackboneSpec:
    return BackboneSpec(
        str(folder), init="random", revision="main", kernel="sdpa", loss_chunk_tokens=13
    )


def options_of(folder: Path, data: PackedDataModule) -> dict[str, Any]:
    """What the modules of all stages take."""
    plan = data.train_plan
    return {
        "backbone": spec_of(folder),
        "phase": Phase(lr=1e-2, schedule="linear"),
        "optimizer": Optimizer(),
        "num_steps": plan.num_steps,
        "splits": plan.accumulate * data.settings.world_size,
    }


def make_module(
    folder: Path,
    data: PackedDataModule,
    *,
    sgd: bool = True,
    kind: type[LanguageModelModule] | None = None,
    **changes: Any,
) -> LanguageModelModule:
    names = data.group_names
    groups = {"kind": PIECE_KINDS, "source": names["source"], "task": names["task_type"]}
    options = {**options_of(folder, data), "group_names": groups, **changes}
    return (kind or (SgdModule if sgd else LanguageModelModule))(**options)


def make_dpo_module(
    folder: Path, data: PackedDataModule, *, sgd: bool = True, **changes: Any
) -> DpoModule:
    names = data.group_names
    groups = {"source": names["source"], "error": names["error_type"], "task": names["task_type"]}
    options = {**options_of(folder, data), "group_names": groups, "objective": Objective()}
    return (SgdDpoModule if sgd else DpoModule)(**{**options, **changes})


def fit(
    folder: Path,
    store: TokenStore,
    *,
    settings: dict[str, Any] | PlanSettings | None = None,
    heldout: TokenStore | None = None,
    clip: float | None = None,
    callbacks: Any = (),
    make: Callable[..., CausalLMModule] = make_module,
    references: References | None = None,
    strategy: Strategy | None = None,
    precision: str = "32-true",
    checkpoint: Path | None = None,
    **module_changes: Any,
) -> Fit:
    is_whole = isinstance(settings, PlanSettings)
    chosen = settings if is_whole else replace(SETTINGS, **(settings or {}))
    data = PackedDataModule(
        store, heldout=heldout, settings=chosen, max_heldout_rows=5, references=references
    )
    module = make(folder, data, **module_changes)
    logged: list[dict[str, float]] = []
    trainer = engine.make_trainer(
        Hardware(accelerator="cpu", devices=chosen.world_size),
        replace(CPU, precision=precision),
        checkpoint_io=SafeCheckpointIO(),
        callbacks=list(callbacks),
        loggers=[],
        loop={
            "max_steps": data.train_plan.num_steps,
            "accumulate_grad_batches": data.train_plan.accumulate,
            "gradient_clip_val": clip,
            "limit_val_batches": None if heldout else 0,
            "val_check_interval": data.train_plan.num_steps * data.train_plan.accumulate,
        },
        strategy=strategy,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    if heldout:
        logged.append(module.heldout_meter.means("heldout", trainer.strategy))
    return Fit(module, data, logged, module.take_metrics())

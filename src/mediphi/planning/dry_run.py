"""A training step on tensors that have shapes and no numbers: what would it allocate?

The module's own `training_step` and its backward pass run under PyTorch's `FakeTensorMode`: what
the model, adapters, precision and recomputation keep is seen, not guessed. Nothing is computed, and
nothing compiled: of compiled layers the plain ones are seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from mediphi import attention
from mediphi.backbone import BackboneSpec, prepare_training, shapes_of
from mediphi.batches import Batch
from mediphi.modules.causal_lm import CausalLMModule
from mediphi.modules.dpo import DpoModule
from mediphi.planning.ledger import LARGEST_IN_HEAP, Ledger, Peak, Use
from mediphi.strategies.memory import Sizes, layer_sizes
from mediphi.strategies.sharding import make_rotary_buffers, set_parameter, stand_ins


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint(Sizes):
    """Bytes on a device that keeps the whole model.

    Attributes:
        peak: by use, at the largest moment of an optimizer step.
        passing_peak: by use, when what a micro-batch needs for itself is most.
        in_heap: of `passing_peak`, in blocks that glibc cuts out of its heap.
        weights_in_heap: bytes of weights in such blocks.
        traffic: bytes read and written by all operations of a micro-batch.
    """

    peak: Peak
    passing_peak: Peak
    in_heap: int
    weights_in_heap: int
    traffic: int


def dry_run(
    make_module: Callable[[], CausalLMModule], batch: Batch, *, mixed: bool, accumulates: bool
) -> Footprint:
    """What training on this micro-batch allocates, in any optimizer step but the first.

    Args:
        make_module: a module that is not built, of a model with random weights.
        mixed: bf16 autocast.
        accumulates: gradients are kept, as other micro-batches of the same optimizer step came
            before or as DDP keeps them in its buckets.
    """
    ledger, module = Ledger(), make_module()
    module.model = _shapes(module.spec)
    reference = getattr(module, "live_reference", None)
    if isinstance(module, DpoModule) and reference is not None:
        module._reference = (_shapes(reference).eval().requires_grad_(False),)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),  # a batch is real
        ledger,
        _real_boundaries(),
    ):
        for model in (module.model, *getattr(module, "_reference", ())):
            _allocate(model)
        step = _Step(module, ledger, mixed=mixed)
        step.train(batch, accumulates=accumulates)
    backbone: Any = module.backbone
    return Footprint(
        peak=ledger.peak,
        passing_peak=ledger.passing_peak,
        in_heap=ledger.in_heap,
        weights_in_heap=sum(n for n in map(_nbytes, backbone.parameters()) if n < LARGEST_IN_HEAP),
        traffic=ledger.traffic,
        trained=sum(p.numel() for p in step.trained),
        **layer_sizes(backbone),
    )


class _Step:
    """A forward and a backward pass as Lightning runs them, their tensors told apart."""

    def __init__(self, module: CausalLMModule, ledger: Ledger, *, mixed: bool) -> None:
        self.module, self.ledger, self.mixed = module, ledger, mixed
        self.decoder: Any = module.backbone.get_decoder()
        self.trained = [p for p in module.parameters() if p.requires_grad]
        models = [module.backbone, *getattr(module, "_reference", ())]
        for model in models:
            model.get_decoder().register_forward_pre_hook(self._use("activations"))
            model.get_decoder().register_forward_hook(self._use("loss"))
        for model in models[1:]:
            for tensor in (*model.parameters(), *model.buffers()):
                ledger.move(tensor, "reference")
        self._moments = [torch.empty_like(p) for p in self.trained for _ in range(2)]
        for moment in self._moments:
            ledger.move(moment, "moments")
        for parameter in self.trained:  # the last step's
            parameter.grad = torch.empty_like(parameter)
            self._keep_gradient(parameter)
            parameter.register_post_accumulate_grad_hook(self._keep_gradient)

    def train(self, batch: Batch, *, accumulates: bool) -> None:
        self.ledger.forget_peaks()
        self.ledger.use = "activations"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            loss: Any = self.module.training_step(batch, 0)
        if not accumulates:  # Lightning forgets the last step's gradients after the forward pass
            self.module.zero_grad()
        self.ledger.use = "backward"
        loss.backward()

    def _use(self, use: Use) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.ledger.use = use

        return hook

    def _keep_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.move(parameter.grad, "gradients")


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shapes(spec: BackboneSpec) -> PreTrainedModel:
    """What `build_model` gives, on the meta device; adapters and buffers are real."""
    model = shapes_of(spec)
    with stand_ins(model):
        prepare_training(model, replace(spec, compiled_tokens=None))
    make_rotary_buffers(model)
    return model


def _allocate(model: PreTrainedModel) -> None:
    """Parameters that the ledger sees, in place of those of the meta device."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones once
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            fake = torch.empty(parameter.shape)
            made[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        set_parameter(model, name, made[parameter])


@contextmanager
def _real_boundaries() -> Iterator[None]:
    """Which tokens attend to which is worked out on real lengths: shapes follow from it."""
    boundaries = attention.boundaries

    def real(*args: Any) -> dict[str, Any]:
        with _disable_current_modes():
            return boundaries(*args)

    attention.boundaries = real
    try:
        yield
    finally:
        attention.boundaries = boundaries

"""DeepSpeed ZeRO-3 (Rajbhandari et al. 2020): every rank keeps its part of all that is trained.

Lightning's own strategy divides gradients twice by the accumulation, casts batches and rotary
buffers to bfloat16, and leaves clipping and checkpoints to DeepSpeed. This one gives the numbers of
a single device: weights, gradients and moments are float32, steps run under torch's autocast, and
accumulation and clipping are ours.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float32
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from transformers import PreTrainedModel

from mediphi.backbone import BackboneSpec, build_model, prepare_training, shapes_of
from mediphi.checkpointing.slices import LocalSlice
from mediphi.errors import UserError
from mediphi.strategies.checkpoints import Read, SlicedCheckpoints, moments_of
from mediphi.strategies.memory import ZERO3_BUCKET
from mediphi.strategies.sharding import Result, StoredWeights, make_rotary_buffers
from mediphi.strategies.zero3_parameters import (
    OneByOne,
    gathered,
    send_rounded,
    trained_parts,
    whole_shapes,
)

ENVIRONMENT = (
    "DS_ACCELERATOR",
    *("MASTER_ADDR", "MASTER_PORT"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"),
)
"""Variables that DeepSpeed reads and Lightning sets, for as long as the strategy runs."""
NORM_ELEMENTS = 1 << 24
"""Gradients that are squared at a time."""


class Zero3Precision(DeepSpeedPrecision):
    """Casts neither weights nor batches; DeepSpeed's engine opens the autocast."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


class Zero3Strategy(SlicedCheckpoints, DeepSpeedStrategy):
    """ZeRO stage 3 on GPUs, or on CPUs with gloo.

    Args:
        device_type: `cuda` or `cpu`.
        offload: weights, gradients and moments lie in the CPU's memory, and AdamW steps there.
        whole_numel: parameters of at most this size stay whole on every rank between steps.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(
        self, *, device_type: str, offload: bool = False, whole_numel: int = 100_000
    ) -> None:
        if find_spec("deepspeed") is None:
            raise UserError("ZeRO-3 needs DeepSpeed: pip install 'mediphi[deepspeed]'")
        self._linear = nn.functional.linear
        self._environment = {name: os.environ.get(name) for name in ENVIRONMENT}
        self._offload, self._whole_numel = offload, whole_numel
        self._precision = Zero3Precision("32-true")
        self._zero: Any = None
        os.environ["DS_ACCELERATOR"] = device_type  # read once, when deepspeed is imported
        super().__init__(stage=3, logging_level=logging.ERROR)

    @property
    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def precision_plugin(self) -> Precision:
        return self._precision

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """The trainer brings Lightning's own: only its name is taken."""
        if precision_plugin is not None:
            self._precision = Zero3Precision(precision_plugin.precision)  # type: ignore[arg-type]

    # Lightning's life cycle ---------------------------------------------------------------------

    def setup_environment(self) -> None:
        # What DeepSpeedStrategy adds is to refuse a CPU.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed

        if self.root_device.type == "cpu":
            # gloo does; what DeepSpeed would compile for it needs a compiler.
            deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
        super(DeepSpeedStrategy, self).setup_distributed()
        self._set_node_environment_variables()
        deepspeed.init_distributed(self._process_group_backend)

    def model_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # `build` splits the backbone, and it alone

    def _format_config(self) -> None:
        """All that DeepSpeed is told; it would ignore what it does not know."""
        on_gpu = self.root_device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": 3,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": ZERO3_BUCKET,
            "stage3_param_persistence_threshold": self._whole_numel,
        }
        if self._offload:
            place = {"device": "cpu", "pin_memory": on_gpu}
            zero |= {"offload_optimizer": place, "offload_param": place}
        self.config = {
            "train_micro_batch_size_per_gpu": 1,  # for log lines that nobody sees
            # Lightning divides the loss by the accumulation, and calls `step` when it is time.
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at every pass
            "torch_autocast": {
                "enabled": self._precision.precision == "bf16-mixed",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # `send_rounded` chooses them
            },
        }

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()  # there is nobody who could keep whole gradients

    def init_deepspeed(self) -> None:
        """Split what `build` did not, and put hooks on all modules that gather and split."""
        import deepspeed

        module = self._module
        module.to(self.root_device)  # buffers, and new adapters
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        optimizer, schedule = self._init_optimizers() if fitting else (None, None)
        groups = [] if optimizer is None else optimizer.param_groups
        without_parameters = [group for group in groups if not group["params"]]
        engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config, dist_init_required=False
        )[0]
        if self._precision.precision == "bf16-mixed":
            send_rounded(engine)
        self._zero = engine.optimizer
        if optimizer is not None:
            optimizer.param_groups += without_parameters  # the schedule counts on them
            self.optimizers = [engine.optimizer]
        self.lr_scheduler_configs = [] if schedule is None else [schedule]
        self.model = engine

    def _init_optimizers(self) -> Any:
        with whole_shapes(self._module.parameters()):
            return super()._init_optimizers()

    def teardown(self) -> None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        engine: Any = self.model
        if engine is not self.lightning_module:
            engine.destroy()
        self.model, self.optimizers = self.lightning_module, []
        FWD_MODULE_STACK.clear()  # it would keep the module
        nn.functional.linear = self._linear
        super().teardown()
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    # What `Sharded` asks for --------------------------------------------------------------------

    def build(self, spec: BackboneSpec) -> PreTrainedModel:
        import deepspeed

        self._init_config_if_needed()
        if spec.init == "random":
            model = build_model(spec)
            deepspeed.zero.Init(module=model, config_dict_or_path=self.config)
            return model
        model = shapes_of(spec)
        stored = StoredWeights(spec, model)
        make_rotary_buffers(model)
        one_by_one = OneByOne(model, stored, self.root_device)
        deepspeed.zero.Init(module=one_by_one, config_dict_or_path=self.config)
        stored.refuse_faults()
        prepare_training(model, spec)
        return model

    def gradient_norm(self) -> Float32[Tensor, ""]:
        # In float64: a CPU's sum of millions of float32 squares is off in the fifth digit.
        pieces = self._zero.grad_partitions_flat_buffer.split(NORM_ELEMENTS)
        squares = torch.stack([piece.double().square().sum() for piece in pieces]).sum()
        squares = squares.to(self.root_device)
        dist.all_reduce(squares)
        return squares.sqrt().float()

    def clip_gradients_to(self, limit: float, norm: Float32[Tensor, ""]) -> None:
        gradients = self._zero.grad_partitions_flat_buffer
        gradients.mul_((limit / (norm + 1e-6)).clamp(max=1.0).to(gradients.device))

    def whole_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict(keep_vars=True).items():
            is_split = hasattr(tensor, "ds_tensor")
            whole = gathered(tensor, self.root_device) if is_split else tensor.detach()
            yield name, whole.float().cpu() if self.is_global_zero else torch.empty(0)

    def compute(self, step: Callable[[], Result]) -> Result:
        with torch.no_grad():
            return step()

    # What `SlicedCheckpoints` asks for ----------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def local_slices(self) -> Iterator[LocalSlice]:
        from deepspeed.utils import safe_get_local_optimizer_state

        keys = moments_of(self._zero.optimizer) if self._zero.state else ()
        for name, parameter, start, size in trained_parts(self._module):
            moments = {key: safe_get_local_optimizer_state(parameter, key) for key in keys}
            parts = {"weight": parameter.ds_tensor, **moments}
            own = {key: part[:size] for key, part in parts.items()}
            yield LocalSlice(name, parameter.ds_numel, start, own)

    def load_slices(self, read: Read, *, num_steps: int) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        keys = moments_of(self._zero.optimizer)
        for flat in self._zero.fp32_partitioned_groups_flat if keys else ():
            step = torch.tensor(float(num_steps), device=flat.device)  # where fused AdamW has it
            self._zero.state[flat] = {"step": step, **{k: torch.zeros_like(flat) for k in keys}}
        for name, parameter, start, size in trained_parts(self._module):
            part = torch.zeros_like(parameter.ds_tensor)  # padded at its end
            for key in keys:
                part[:size] = read(name, key, start, start + size)
                safe_set_local_optimizer_state(parameter, part, key)
            part[:size] = read(name, "weight", start, start + size)
            safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
            parameter.partition()  # a small one may be whole, and old

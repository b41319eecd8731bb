"""A DeepSpeed engine made from our typed configs; the one call of `deepspeed.initialize`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import pydantic
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from torch.overrides import TorchFunctionMode

from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.config import OptimConfig
from setformer_dist.engine.fused_update import quicken
from setformer_dist.engine.offload import forget_gradients_after_steps
from setformer_dist.engine.optim import optimizer_of, parameter_groups
from setformer_dist.engine.protocol import Engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer before DeepSpeed does, without compiling its kernels.

    DeepSpeed asks of every optimizer whether it is Muon. No run here uses that, and for its kernels torch would import
    its compiler: 2.4 seconds of every rank's start.
    """
    real, compiler.compile = compiler.compile, lambda *args, **options: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = real


_import_muon()


class ScalarsAsBytes(TorchFunctionMode):
    """Lets weights without dimensions be viewed as bytes: so DeepSpeed sends all weights, and PyTorch refuses these."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.view and args[1:] == (torch.uint8,) and not args[0].dim():
            return args[0].view(1).view(torch.uint8)
        return func(*args, **(kwargs or {}))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's and PyTorch's routine chatter out of the terminal; warnings still come."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*|deepspeed\..*")


def supported_dtypes() -> set[str]:
    """Return which of "fp32", "bf16", "fp16" DeepSpeed's accelerator computes here."""
    accelerator = get_accelerator()
    names = {"fp32"}
    if accelerator.is_bf16_supported():
        names.add("bf16")
    if accelerator.is_fp16_supported():
        names.add("fp16")
    return names


def initialize(
    model: nn.Module, optim: OptimConfig, deepspeed_json: Mapping[str, object], leaves: Sequence[nn.Module] = ()
) -> Engine:
    """Return a DeepSpeed engine with an optimizer over the model's parameter groups.

    Args:
        model: on the CPU, in fp32.
        optim: see `OptimConfig`.
        deepspeed_json: see `zero.deepspeed_config`.
        leaves: modules whose weights ZeRO-3 gathers as a whole, by hooks outside of their forward pass.

    Raises:
        ConfigError: DeepSpeed does not take a key or a value of its config.
    """
    quiet_deepspeed()
    for module in leaves:
        set_z3_leaf_module(module, True)
        module.register_forward_pre_hook(_reached)
    optimizer = optimizer_of(parameter_groups(model, optim), optim)
    if not is_zero_supported_optimizer(optimizer):  # DeepSpeed has not tested it; our tests have, under every stage
        deepspeed_json = {**deepspeed_json, "zero_allow_untested_optimizer": True}
    try:
        with ScalarsAsBytes():
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_json, dist_init_required=False
            )
    except (DeepSpeedConfigError, pydantic.ValidationError) as error:
        raise ConfigError(f"DeepSpeed refuses its config: {' '.join(str(error).split())}") from None
    if engine.zero_use_cpu_optimizer() or engine.zero_optimization_stage() == 3:
        forget_gradients_after_steps(engine.optimizer)
    quicken(engine)
    made: Engine = engine
    return made


def _reached(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let gradients reach the first input of a leaf where nothing before it is trained.

    DeepSpeed reduces a leaf's gradients when those of its inputs are there. Where no input needs one, PyTorch says so
    before the leaf's backward pass, and its weights have no gradients yet.
    """
    given = [x for x in inputs[:1] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if not given or not torch.is_grad_enabled() or any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        return None
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    return given[0].detach().requires_grad_(), *inputs[1:]


def set_accumulation(engine: Engine, plan: BatchPlan, accumulation: int) -> None:
    """Have DeepSpeed accumulate another number of micro batches from the next optimizer step on.

    Args:
        engine: between two optimizer steps.
        plan: of the run's batches.
        accumulation: micro batches of a step.
    """
    engine.set_train_micro_batch_size(plan.global_size // (accumulation * plan.groups))
    engine.set_train_batch_size(plan.global_size * plan.sequence)
    # It counts micro batches from the start, and a step ends where their number divides by that of a step.
    engine.micro_steps = 0
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation

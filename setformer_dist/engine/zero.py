"""DeepSpeed's JSON, made from the tables of precision and ZeRO.

What is not named here passes through the config's [deepspeed] table; what is named must be set here, so that
two places never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setformer_dist.core.config import merge
from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.config import PrecisionConfig, ZeroConfig

# Elements of a bucket that is reduced beside the backward pass: the 25 MiB of PyTorch's DDP, in fp32.
OVERLAPPED = 25 * 2**20 // 4

# Keys of DeepSpeed's that we set from our own config; a [deepspeed] table that names one contradicts it.
OWNED_KEYS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "data_types": "precision.grad_accum",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.overlap_comm": "zero.overlap_comm",
    "zero_optimization.reduce_bucket_size": "zero.bucket_mib",
    "zero_optimization.allgather_bucket_size": "zero.bucket_mib",
    "zero_optimization.offload_optimizer": "zero.offload",
    "zero_optimization.offload_param": "zero.offload",
    "zero_optimization.cpu_offload": "zero.offload",  # an older name of the same
    "zero_optimization.cpu_offload_param": "zero.offload",
    "zero_force_ds_cpu_optimizer": "zero.offload",
    "compile": "compile.mode",
}


def deepspeed_config(
    precision: PrecisionConfig,
    zero: ZeroConfig,
    plan: BatchPlan,
    clip_norm: float,
    extra: Mapping[str, object],
) -> dict[str, object]:
    """Return the JSON for `deepspeed.initialize`.

    Raises:
        ConfigError: `extra` names a key that our config owns.
    """
    nested = extra.get("zero_optimization", {})
    if not isinstance(nested, dict):
        raise ConfigError(f"deepspeed.zero_optimization = {nested!r} is not a table of DeepSpeed's keys")
    for key in (*extra, *(f"zero_optimization.{name}" for name in nested)):
        if key in OWNED_KEYS:
            raise ConfigError(f"deepspeed.{key} is set by this program: use {OWNED_KEYS[key]} instead")
    config: dict[str, Any] = {
        "train_batch_size": plan.global_size * plan.sequence,  # it knows no groups: each rank has a batch of its own
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": clip_norm,
        "steps_per_print": 1_000_000_000,  # our metrics print
        "zero_optimization": _zero_section(zero, overlaps(precision, zero, extra)),
    }
    if zero.offload != "none":
        # The optimizer stays PyTorch's or timm's: the numbers of a run without offload, and nothing to compile.
        config["zero_force_ds_cpu_optimizer"] = False
    if precision.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if precision.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": precision.loss_scale}
    if precision.dtype != "fp32":
        # timm's models are written for model.to(dtype): a mask left in fp32 would make its sums fp32 as well.
        config["data_types"] = {"buffer_dtype": precision.dtype}
        if precision.grad_accum == "fp32":
            config["data_types"]["grad_accum_dtype"] = "fp32"
    return merge(config, extra)


def reduced_here(precision: PrecisionConfig, zero: ZeroConfig, extra: Mapping[str, object]) -> bool:
    """Return whether a config leaves all that `reduction.py` does to it, and nothing to DeepSpeed."""
    fp32_besides = precision.dtype != "fp32" and precision.grad_accum == "fp32"
    return zero.stage < 3 and zero.offload == "none" and not extra and not (zero.stage == 1 and fp32_besides)


def overlaps(precision: PrecisionConfig, zero: ZeroConfig, extra: Mapping[str, object]) -> bool:
    """Return whether gradients are reduced beside the backward pass; `extra` is the [deepspeed] table."""
    asked = zero.overlap_comm is True and zero.stage > 0  # DeepSpeed overlaps nothing under stage 0
    return asked or (zero.overlap_comm is not False and reduced_here(precision, zero, extra))


def set_aside(precision: PrecisionConfig, zero: ZeroConfig, extra: Mapping[str, object], count: int) -> int:
    """Return the elements of the reduction buckets that a GPU gives away whole, besides gradients and one copy of them.

    Args:
        precision: the run's.
        zero: the run's.
        extra: the [deepspeed] table.
        count: parameters of the model.
    """
    bucket, overlap = zero.bucket_mib * 2**20 // 4, overlaps(precision, zero, extra)
    if reduced_here(precision, zero, extra):  # a bucket is the copy
        return 2 * min(bucket, OVERLAPPED, count) if overlap else 0
    return (1 + overlap) * bucket if zero.stage else 0


def _zero_section(zero: ZeroConfig, overlap: bool) -> dict[str, object]:
    elements = zero.bucket_mib * 2**20 // 4
    section: dict[str, object] = {
        "stage": zero.stage,
        "overlap_comm": overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
    }
    in_host_memory = {"device": "cpu", "pin_memory": True}  # DeepSpeed pins nothing where the device is the CPU
    if zero.offload != "none":
        section["offload_optimizer"] = in_host_memory
    if zero.offload == "all":
        section["offload_param"] = dict(in_host_memory)
    return section


def check_precision(precision: PrecisionConfig, zero: ZeroConfig, supported: set[str], device: str) -> None:
    """Refuse a dtype that the device cannot compute.

    Args:
        precision: the run's.
        zero: the run's.
        supported: dtypes the accelerator supports, of "fp32", "bf16", "fp16".
        device: its name, for the message.

    Raises:
        ConfigError: the dtype is not supported, or the combination has no DeepSpeed optimizer.
    """
    if precision.dtype not in supported:
        usable = ", ".join(sorted(supported))
        raise ConfigError(
            f"precision.dtype = {precision.dtype!r}: this {device} does not compute {precision.dtype} "
            f"(DeepSpeed's accelerator says so); use one of {usable}"
        )
    if precision.dtype != "fp32" and precision.grad_accum == "fp32" and zero.stage == 0:
        raise ConfigError(
            "precision.grad_accum = 'fp32' with zero.stage = 0 has no DeepSpeed optimizer: use zero.stage = 1, 2 or 3"
        )

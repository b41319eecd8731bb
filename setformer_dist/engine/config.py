"""The tables of a run config that the engine reads; nothing here imports torch, so a typo is told at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.continuing import FREE, Permitted
from setformer_dist.core.errors import ConfigError

# The solutions are divisors, and to find those of any number that TOML can write would take longer than training.
LARGEST_GLOBAL_BATCH = 2**31 - 1

# A loss spike is told from the start of training by at least so many losses before it.
SPIKE_NEEDS = 20


class BatchConfig(FrozenConfig):
    """How many samples make an optimizer step, and how many of them a rank computes at once.

    Attributes:
        global_size: samples per optimizer step over all ranks; part of the run's identity.
        micro: samples per rank and accumulation step; "auto" takes the largest that divides, up to max_micro.
        max_micro: bound for "auto", by memory.
    """

    global_size: Annotated[int, Permitted("global_batch")] = pydantic.Field(gt=0, le=LARGEST_GLOBAL_BATCH)
    micro: Annotated[int | Literal["auto"], FREE] = "auto"
    max_micro: Annotated[int, FREE] = pydantic.Field(default=128, gt=0)

    @pydantic.field_validator("micro")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError('must be a positive number of samples, or "auto"')
        return value


class ScheduleConfig(FrozenConfig):
    """Linear warm-up, then cosine decay (Loshchilov & Hutter 2017). Give epochs or steps, not both.

    Attributes:
        epochs: length of the run in epochs.
        steps: length of the run in optimizer steps.
        warmup_epochs: length of the warm-up in epochs (of the run's own epochs).
        warmup_steps: length of the warm-up in optimizer steps.
        warmup_lr: learning rate at step 0.
        min_lr: learning rate at the end.
    """

    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)
    warmup_epochs: float | None = pydantic.Field(default=None, ge=0, le=1e9)
    warmup_steps: int | None = pydantic.Field(default=None, ge=0)
    warmup_lr: float = pydantic.Field(default=1e-6, ge=0)
    min_lr: float = pydantic.Field(default=5e-6, ge=0)

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("schedule: give either epochs or steps, one of them")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("schedule: give warmup_epochs or warmup_steps, not both")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in optimizer steps."""
        return self.steps if self.steps is not None else int(self.epochs or 0) * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Return the length of the warm-up in optimizer steps.

        Raises:
            ConfigError: the warm-up is as long as the run.
        """
        if self.warmup_steps is not None:
            steps = self.warmup_steps
        else:
            steps = round((self.warmup_epochs or 0) * steps_per_epoch)
        total = self.total_steps(steps_per_epoch)
        if steps >= total:
            raise ConfigError(f"schedule: a warm-up of {steps} steps does not fit into a run of {total} steps")
        return steps


class OptimConfig(FrozenConfig):
    """AdamW (Loshchilov & Hutter 2019).

    Attributes:
        name: which optimizer.
        lr: peak learning rate at the configured global batch.
        weight_decay: decay of the weights, apart from the gradient (decoupled); not applied to norms, biases,
            references and what else the model names.
        betas: decay of the averages of the gradient and of its square, per optimizer step.
        eps: added to the root of the averaged square, against divisions by zero.
        clip_norm: bound of the global gradient norm; 0 turns clipping off.
        layer_decay: factor per layer group from the head down; 1 turns it off.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = pydantic.Field(default=1e-3, gt=0)
    weight_decay: float = pydantic.Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = pydantic.Field(default=1e-8, gt=0)
    clip_norm: float = pydantic.Field(default=5.0, ge=0)
    layer_decay: float = pydantic.Field(default=1.0, gt=0, le=1)

    @pydantic.field_validator("betas", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @pydantic.field_validator("betas")
    @classmethod
    def _in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must lie in [0, 1)")
        return value


class PrecisionConfig(FrozenConfig):
    """Compute dtype of weights and activations; masters and optimizer states are fp32 always.

    Attributes:
        dtype: "fp32", "bf16" or "fp16" (with loss scaling; needs a device that supports it).
        grad_accum: dtype in which gradients accumulate and travel; "auto" is the compute dtype.
        loss_scale: fp16 only; 0 scales dynamically.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_accum: Literal["auto", "fp32"] = "auto"
    loss_scale: float = pydantic.Field(default=0.0, ge=0)


class ZeroConfig(FrozenConfig):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020).

    Attributes:
        stage: 0 replicates; 1 shards optimizer states, 2 also gradients, 3 also parameters.
        overlap_comm: overlap the reduction of gradients with the backward pass.
        bucket_mib: size of the reduction and gather buckets.
        offload: what lies in host memory and is updated there (ZeRO-Offload, Ren et al. 2021): "none"; "optimizer",
            the masters, Adam's states, the average and the gradients that Adam takes (stages 1, 2, 3); or "all", the
            weights as well, brought to the device where they are needed (stage 3). May change at a resume.
    """

    stage: Literal[0, 1, 2, 3] = 2
    overlap_comm: bool = False
    bucket_mib: int = pydantic.Field(default=256, gt=0)
    offload: Literal["none", "optimizer", "all"] = "none"

    @pydantic.model_validator(mode="after")
    def _offload_possible(self) -> ZeroConfig:
        if self.offload != "none" and self.stage == 0:
            raise ValueError(
                f"offload = {self.offload!r} needs stage = 1, 2 or 3, got stage = 0, where nothing is sharded: raise "
                'zero.stage, or set zero.offload = "none"'
            )
        if self.offload == "all" and self.stage != 3:
            raise ValueError(
                f"offload = 'all' needs stage = 3, got stage = {self.stage}, where every rank computes with whole "
                'weights: set zero.stage = 3, or zero.offload = "optimizer"'
            )
        return self


class EmaConfig(FrozenConfig):
    """Average of the weights.

    Attributes:
        decay: of the average per optimizer step; 0 keeps no average.
        warmup: let the decay grow as (1 + step) / (10 + step) up to `decay`, as TensorFlow's and timm's do.
    """

    decay: float = pydantic.Field(default=0.0, ge=0, lt=1)
    warmup: bool = True

    def decay_at(self, step: int) -> float:
        """Return the decay used after optimizer step `step` (0-based)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class EvalConfig(FrozenConfig):
    """Periodic evaluation.

    Attributes:
        every_epochs: evaluate after every so many epochs; 0 turns it off. The end of the run always evaluates.
        every_steps: evaluate after every so many optimizer steps as well; 0 turns it off.
        marginal_error: report also how far the plans of SeT attention are from their marginals, largest and mean over
            blocks, heads and images of the first micro batch of every rank; for models with SeT attention.
    """

    every_epochs: int = pydantic.Field(default=1, ge=0)
    every_steps: int = pydantic.Field(default=0, ge=0)
    marginal_error: bool = False


class GuardConfig(FrozenConfig):
    """The `[guard]` table.

    Attributes:
        nonfinite: what a loss or gradient that is NaN or infinite does: "stop", "skip" or "rollback". The update is
            left out in any case. In fp16 the loss scale falls and the run goes on, whatever is set here.
        spike: a loss beyond this many times the median of the last `window` is a leap and is rolled back; 0 is off.
        window: losses that the median is of; and trouble within so many steps after one that a rollback passes over
            makes the next rollback go to a checkpoint before the one of that rollback.
        limit: bad steps borne in one run; one more ends it.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spike: float = pydantic.Field(default=0.0, ge=0.0)
    window: int = pydantic.Field(default=100, ge=SPIKE_NEEDS)
    limit: int = pydantic.Field(default=5, ge=1)

    @pydantic.field_validator("spike")
    @classmethod
    def _beyond_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be 0 (off) or above 1: it multiplies the median of the last losses")
        return value

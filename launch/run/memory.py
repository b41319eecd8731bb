"""What a rank of a run will take of its memory at its largest images, and the policy that keeps it within a budget."""

from __future__ import annotations

import dataclasses
import functools
import math
import os

import torch
from torch import nn

from dataloaders.config import DataConfig
from launch.run.config import ResolvedRun
from launch.run.inputs import Split, evaluated_shapes, shapes_of_images
from launch.run.objective import averaged_bytes, encoder_of
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import Recompute
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.engine.optim import OPTIMIZERS
from setformer_dist.engine.zero import set_aside
from setformer_dist.models.measure import Memory, measure_evaluation, parameters, predict_memory
from setformer_dist.models.recompute import candidates, set_recompute

# Predictions were within 7 % of what was measured (docs/memory.md): what is far beyond the memory is refused.
_MARGIN = 1.1
_FEW_PIXELS = 1 << 20  # of a micro batch


def largest_batch(run: ResolvedRun, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the micro batch of most pixels, of a run that begins with samples of `shape`."""
    data, plan = run.config.data, run.plan
    if not isinstance(data, DataConfig):
        return (plan.micro, *shape)
    batches = [(plan.micro_at(sides), *sides) for sides in shapes_of_images(data)]
    micro, *sides = max(batches, key=math.prod)
    return (micro, *shape[:-2], *sides)


def predicted(run: ResolvedRun, model: nn.Module, shape: tuple[int, ...], batch_dtype: torch.dtype | None) -> Memory:
    """Return a rank's memory at the largest micro batch of the run.

    Args:
        run: the run.
        model: with its policy of recomputation set.
        shape: of the samples that the run begins with.
        batch_dtype: what the model takes: integers, or None for its own floating dtype.
    """
    c, plan = run.config, run.plan
    dtype = DTYPES[c.precision.dtype]
    micro, *largest = largest_batch(run, shape)
    memory = predict_memory(
        model,
        dtype,
        torch.float32 if c.precision.grad_accum == "fp32" else dtype,
        c.zero.stage,
        plan.world_size,
        c.ema.decay > 0,
        (micro, *part_of_sample(tuple(largest), plan.sequence)),
        batch_dtype,
        c.zero.offload,
        plan.global_size // (micro * plan.groups),
        len(OPTIMIZERS[c.optim.name].states),
        _set_aside(run, parameters(model)),
    )
    return dataclasses.replace(memory, parameters=memory.parameters + averaged_bytes(model, dtype))


def check_images_fit(
    run: ResolvedRun, model: nn.Module, shape: tuple[int, ...], batch_dtype: torch.dtype | None, local_ranks: int
) -> None:
    """Refuse images that do not fit: of a schedule of sizes, the largest would end the run when they come, in days.

    Images of one size are looked at on CPUs alone, where others suffer, and from a million pixels a micro batch on:
    predicting takes a second of each start.

    Args:
        run: its config.
        model: with its policy of recomputation set.
        shape: of the samples that the run begins with.
        batch_dtype: as in `predicted`.
        local_ranks: ranks on this host, which share its memory.

    Raises:
        ConfigError: naming the size, what it is predicted to take, and what there is.
    """
    data = run.config.data
    if not isinstance(data, DataConfig):
        return
    micro, *largest = largest_batch(run, shape)
    scheduled = len(shapes_of_images(data)) > 1
    few = micro * largest[-2] * largest[-1] < _FEW_PIXELS
    if not scheduled and (few or torch.cuda.is_available()):
        return
    memory = predicted(run, model, shape, batch_dtype)
    need = memory.total + (0 if torch.cuda.is_available() else memory.host)
    there, whose = _there(local_ranks)
    if need <= _MARGIN * there:
        return
    what = "data.resolutions comes to images" if scheduled else "the micro batch is images"
    raise ConfigError(
        f"{what} of {largest[-2]} x {largest[-1]}, {micro} at a time, for which a rank is "
        f"predicted to take {_shown(need)}, and {whose} has {_shown(there)}: lower batch.micro or batch.micro_pixels, "
        "or set model.memory_budget, model.recompute or parallel.sequence"
    )


def check_evaluation_fits(run: ResolvedRun, model: nn.Module, split: Split, local_ranks: int) -> None:
    """Refuse whole images that do not fit where evaluation shows them: the first one would end the run.

    Args:
        run: its config.
        model: of the run.
        split: that evaluation reads.
        local_ranks: as in `check_images_fit`.

    Raises:
        ConfigError: naming the size, what it is predicted to take, and what there is.
    """
    data = run.config.data
    if not isinstance(data, DataConfig) or data.eval_view != "whole":
        return
    height, width = max(evaluated_shapes(data, split), key=math.prod)
    if height * width < _FEW_PIXELS:
        return
    need = measure_evaluation(model, DTYPES[run.config.precision.dtype], (1, data.bands, height, width))
    there, whose = _there(local_ranks)
    if need > _MARGIN * there:
        raise ConfigError(
            f"evaluation shows whole images, the largest as {height} x {width}, for which a rank is predicted to take "
            f"{_shown(need)} besides its weights, and {whose} has {_shown(there)}: cut the validation images, set "
            'data.eval_longest, or data.eval_view = "centre" to score the centre of each'
        )


def check_image_fits(model: nn.Module, bands: int, height: int, width: int) -> None:
    """Refuse an image that does not fit the memory where a trained model, in fp32, is to see it.

    Raises:
        ConfigError: naming the size, what it is predicted to take, and what there is.
    """
    if height * width < _FEW_PIXELS:
        return
    need = measure_evaluation(model, torch.float32, (1, bands, height, width))
    on_gpu = next(model.parameters()).is_cuda
    there, whose = (torch.cuda.mem_get_info()[1], "the device") if on_gpu else (memory_of_machine(), "this machine")
    if need > _MARGIN * there:
        raise ConfigError(
            f"the model would see {height} x {width} pixels of it, for which it is predicted to take {_shown(need)}, "
            f"and {whose} has {_shown(there)}: cut the image"
        )


def _there(local_ranks: int) -> tuple[int, str]:
    """Return the bytes that a rank may take, and of what."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], "the device"
    return memory_of_machine() // local_ranks, "this host, per rank,"


def memory_of_machine() -> int:
    """Return the bytes of this host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_within_budget(
    run: ResolvedRun, model: nn.Module, shape: tuple[int, ...], batch_dtype: torch.dtype | None
) -> str | None:
    """Set the policy that recomputes least among those that fit `model.memory_budget`, and say which it is.

    It follows from the config and the number of ranks alone, so all ranks choose alike. Arguments as of `predicted`.

    Returns:
        A line for people; None without a budget.

    Raises:
        ConfigError: nothing fits; naming what the least would take.
    """
    budget, name = run.config.model.budget_bytes, run.config.model.name
    if budget is None:
        return None
    choices: list[Recompute | tuple[Recompute, ...]] = ["none", "block"]
    encoder = encoder_of(model)
    if hasattr(encoder, "set_recompute"):
        choices = [*candidates(len(encoder.stages), torch.cuda.is_available())]  # type: ignore[arg-type]

    @functools.cache
    def total(index: int) -> int:
        set_recompute(model, choices[index], name)
        return predicted(run, model, shape, batch_dtype).total

    first, last = 0, len(choices) - 1
    if total(last) > budget:
        micro, *largest = largest_batch(run, shape)
        sides = " x ".join(map(str, largest[-2:]))
        raise ConfigError(
            f"model.memory_budget = {run.config.model.memory_budget!r} is less than the {_shown(total(last))} "
            f"that {name} is predicted to take with samples of {sides} and "
            f"batch.micro = {micro} when it recomputes all that it can: lower batch.micro or the image size, "
            "or raise zero.stage or parallel.sequence"
        )
    while first < last:  # the first that fits: each holds less than the one before
        middle = (first + last) // 2
        first, last = (first, middle) if total(middle) <= budget else (middle + 1, last)
    set_recompute(model, choices[first], name)
    chosen = choices[first]
    shown = chosen if isinstance(chosen, str) else ", ".join(chosen)
    return f"{shown}: {_shown(total(first))} of {run.config.model.memory_budget}"


def _shown(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def part_of_sample(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Return what one of the ranks that share a sample has of it; of an image, its share of the rows."""
    return shape if parts == 1 else (shape[0], shape[1] // parts, *shape[2:])


def _set_aside(run: ResolvedRun, count: int) -> int:
    """Return the bytes of the reduction buckets that are set aside on a GPU; a CPU's are taken as they fill."""
    c = run.config
    elements = set_aside(c.precision, c.zero, c.deepspeed, count) if torch.cuda.is_available() else 0
    return elements * DTYPES[c.precision.dtype].itemsize

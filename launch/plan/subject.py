"""The model of a run config, measured once: what every row of a plan follows from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dataloaders.config import DataConfig
from launch.plan.groups import Exchange, exchange_of
from launch.plan.traffic import Model
from launch.run.config import RunConfig
from launch.run.inputs import inputs_of
from launch.run.memory import part_of_sample
from launch.run.objective import assumed_classes, build_assumed, build_for
from launch.run.sequence import check_sequence
from setformer_dist.core.errors import DataError
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.engine.optim import OPTIMIZERS, parameter_groups
from setformer_dist.models.build import freeze
from setformer_dist.models.measure import Activations, measure_activations, multiply_adds_of
from setformer_dist.tasks.build import build_task

_MEASURED_AT = (1, 8, 64)  # samples of a micro batch


@dataclass(frozen=True)
class Passes:
    """Activations of any micro batch, from some that were measured."""

    measured: Mapping[int, Activations]

    def at(self, micro: int) -> Activations:
        """Return the activations of a micro batch.

        The largest of several sums that each grow by the sample is convex: between two measured sizes the straight line
        is at or above it, and beyond the last the last line continues.
        """
        sizes = sorted(self.measured)
        above = next((i for i, size in enumerate(sizes) if size >= micro and i), len(sizes) - 1)
        low, high = sizes[above - 1], sizes[above]
        first, last = self.measured[low], self.measured[high]

        def line(a: int, b: int) -> int:
            return round(a + (b - a) * (micro - low) / (high - low))

        return Activations(line(first.kept, last.kept), line(first.peak, last.peak), line(first.added, last.added))


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        config: the run's.
        shape: of one sample.
        model: what traffic follows from.
        references: parameters in reference sets, of `model.count`.
        multiply_adds: of a sample's forward pass.
        exchange: of ranks that share each image; None where images are whole.
        modules: without submodules, each of which Python calls once in a pass.
        passes: activations of a rank without and with activation checkpointing; one of them alone where a model has no
            choice.
        assumed: what was not there to be read, or "".
    """

    config: RunConfig
    shape: tuple[int, ...]
    model: Model
    references: int
    multiply_adds: int
    modules: int
    passes: Mapping[bool, Passes]
    assumed: str
    exchange: Exchange | None = None

    @property
    def parts(self) -> int:
        """Ranks that share each sample."""
        return self.config.parallel.sequence

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[self.config.precision.dtype]

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of accumulated gradients."""
        return torch.float32 if self.config.precision.grad_accum == "fp32" else self.dtype

    @property
    def states(self) -> int:
        """What the optimizer keeps of each element."""
        return len(OPTIMIZERS[self.config.optim.name].states)

    @property
    def ema(self) -> bool:
        """Whether an average is kept."""
        return self.config.ema.decay > 0


def subject_of(config: RunConfig) -> Subject:
    """Build and measure the model of a run config.

    Raises:
        SetformerError: the model cannot be built or split; or its data are tokens, and not there.
    """
    model, shape, assumed = _model_of(config)
    check_sequence(config, None, model)
    inputs = inputs_of(config.data)
    dtype = DTYPES[config.precision.dtype]
    groups = parameter_groups(model, config.optim)
    return Subject(
        config=config,
        shape=shape,
        model=Model.of(
            tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            dtype.itemsize,
            config.zero.bucket_mib,
            config.deepspeed,
            tuple(p.numel() for p in model.parameters() if not p.requires_grad),
        ),
        references=sum(p.numel() for name, p in model.named_parameters() if "references" in name.split(".")[-1]),
        multiply_adds=multiply_adds_of(model, shape, inputs.dtype or torch.float32),
        modules=sum(1 for module in model.modules() if not list(module.children())),
        passes=_passes_of(model, config, dtype, part_of_sample(shape, config.parallel.sequence), inputs.dtype),
        assumed=assumed,
        exchange=exchange_of(model, (shape[-2], shape[-1]), dtype) if config.parallel.sequence > 1 else None,
    )


def _model_of(config: RunConfig) -> tuple[nn.Module, tuple[int, ...], str]:
    inputs = inputs_of(config.data)
    try:
        train = inputs.open_train()
        model = build_for(config, build_task(config.task, train.classes), inputs.spec(train))
        freeze(model, config.model.freeze)
        return model, inputs.shape(train), ""
    except DataError:
        if not isinstance(config.data, DataConfig):
            raise
    model = build_assumed(config)
    freeze(model, config.model.freeze)
    return model, (config.data.bands, *config.data.shape), f"the data are not there: {assumed_classes(config)} classes"


def _passes_of(
    model: nn.Module, config: RunConfig, dtype: torch.dtype, shape: Sequence[int], batch_dtype: torch.dtype | None
) -> dict[bool, Passes]:
    switch = getattr(model, "set_grad_checkpointing", None)
    choices = (False, True) if switch is not None else (config.model.recomputes_blocks,)
    found = {}
    for choice in choices:
        if switch is not None:
            switch(choice)
        found[choice] = Passes({m: measure_activations(model, dtype, (m, *shape), batch_dtype) for m in _MEASURED_AT})
    return found

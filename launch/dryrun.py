"""`setformer train --dry-run`: what a run would be, in full, and what it would cost a rank. Nothing is started."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dataloaders.config import TokenConfig
from launch.config import ResolvedRun
from launch.inputs import inputs_of
from setformer_dist.core.errors import DataError
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.models.build import build_model
from setformer_dist.models.measure import multiply_adds_of, parameters, predict_memory


@dataclass(frozen=True)
class _Known:
    """The model of a run on its data, and what one sample is to it."""

    model: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    source: str


def predict_costs(run: ResolvedRun, known: _Known) -> dict[str, Any]:
    """Return predicted costs on one rank: counts and bytes."""
    c, model = run.config, known.model
    dtype = DTYPES[c.precision.dtype]
    grad_dtype = torch.float32 if c.precision.grad_accum == "fp32" else dtype
    memory = predict_memory(
        model,
        dtype,
        grad_dtype,
        c.zero.stage,
        run.plan.world_size,
        c.ema.decay > 0,
        (run.plan.micro, *known.shape),
        known.dtype,
        c.zero.offload,
        run.plan.accumulation,
    )
    return {
        "parameters": parameters(model),
        "multiply_adds": multiply_adds_of(model, known.shape, known.dtype or torch.float32),
        "memory": {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "masters_and_optimizer": memory.masters,
            "activations": memory.activations,
            "total": memory.total,
            "host": memory.host,
        },
    }


def know(run: ResolvedRun) -> _Known:
    """Build the model for the data, or for images of 1000 classes where these are not there yet.

    Raises:
        DataError: token sequences are not there: their vocabulary and length are not known otherwise.
    """
    c = run.config
    inputs = inputs_of(c.data)
    try:
        split = inputs.open_train()
    except DataError:
        if isinstance(c.data, TokenConfig):
            raise
        model = build_model(c.model, 1000, c.data.image_size, c.run.seed)
        source = f"1000 classes (assumed, since {Path(c.data.root) / c.data.train} holds no packed data)"
        return _Known(model, (3, c.data.image_size, c.data.image_size), None, source)
    source = f"{len(split.classes)} classes ({Path(c.data.root) / c.data.train})"
    model = inputs.build_model(c.model, len(split.classes), inputs.told(split), c.run.seed)
    return _Known(model, inputs.shape(split), inputs.dtype, source)


def dry_run(run: ResolvedRun, console: Console) -> None:
    """Print the resolved config, DeepSpeed's JSON, and the predicted costs."""
    known = know(run)
    costs = predict_costs(run, known)
    console.rule("resolved config", align="left")
    console.print_json(json.dumps(run.as_json()))
    console.rule("DeepSpeed config", align="left")
    console.print_json(json.dumps(run.deepspeed_json()))
    console.rule("predicted", align="left")
    table = Table(show_header=False, box=None)
    plan = run.plan
    table.add_row("model", f"{run.config.model.name}, {known.source}")
    table.add_row("parameters", f"{costs['parameters'] / 1e6:.2f} M")
    table.add_row(
        "multiply-adds", f"{costs['multiply_adds'] / 1e9:.3f} G per sample of {'×'.join(map(str, known.shape))}"
    )
    table.add_row(
        "batch",
        f"{plan.global_size} = {plan.micro} per rank × {plan.accumulation} accumulated × {plan.world_size} ranks",
    )
    host = costs["memory"].pop("host")
    for name, value in costs["memory"].items():
        table.add_row(f"memory per rank: {name.replace('_', ' ')}", f"{value / 2**20:,.1f} MiB")
    if host:
        table.add_row("host memory per rank, by zero.offload", f"{host / 2**20:,.1f} MiB")
    console.print(table)

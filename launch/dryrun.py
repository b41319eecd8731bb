"""`setformer train --dry-run`: what a run would be, in full, and what it would cost a rank. Nothing is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dataloaders import open_split
from launch.config import ResolvedRun
from setformer_dist.core.errors import DataError
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.models.build import build_model
from setformer_dist.models.measure import multiply_adds, parameters, predict_memory


def predict_costs(run: ResolvedRun, num_classes: int) -> dict[str, Any]:
    """Return predicted costs on one rank: counts and bytes."""
    c, size = run.config, run.config.data.image_size
    model = build_model(c.model, num_classes, size, c.run.seed)
    dtype = DTYPES[c.precision.dtype]
    grad_dtype = torch.float32 if c.precision.grad_accum == "fp32" else dtype
    images = (run.plan.micro, size, size)
    memory = predict_memory(model, dtype, grad_dtype, c.zero.stage, run.plan.world_size, c.ema.decay > 0, images)
    return {
        "parameters": parameters(model),
        "multiply_adds": multiply_adds(model, size, size),
        "memory": {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "masters_and_optimizer": memory.masters,
            "activations": memory.activations,
            "total": memory.total,
        },
    }


def classes_of(run: ResolvedRun) -> tuple[int, str]:
    """Return the number of classes and where it is known from; 1000 where the data is not there yet."""
    folder = Path(run.config.data.root) / run.config.data.train
    try:
        return len(open_split(folder).classes), str(folder)
    except DataError:
        return 1000, f"assumed, since {folder} holds no packed data"


def dry_run(run: ResolvedRun, console: Console) -> None:
    """Print the resolved config, DeepSpeed's JSON, and the predicted costs."""
    num_classes, source = classes_of(run)
    costs = predict_costs(run, num_classes)
    console.rule("resolved config", align="left")
    console.print_json(json.dumps(run.as_json()))
    console.rule("DeepSpeed config", align="left")
    console.print_json(json.dumps(run.deepspeed_json()))
    console.rule("predicted", align="left")
    table = Table(show_header=False, box=None)
    plan, size = run.plan, run.config.data.image_size
    table.add_row("model", f"{run.config.model.name}, {num_classes} classes ({source})")
    table.add_row("parameters", f"{costs['parameters'] / 1e6:.2f} M")
    table.add_row("multiply-adds", f"{costs['multiply_adds'] / 1e9:.3f} G per image of {size}×{size}")
    table.add_row(
        "batch",
        f"{plan.global_size} = {plan.micro} per rank × {plan.accumulation} accumulated × {plan.world_size} ranks",
    )
    for name, value in costs["memory"].items():
        table.add_row(f"memory per rank: {name.replace('_', ' ')}", f"{value / 2**20:,.1f} MiB")
    console.print(table)

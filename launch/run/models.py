"""`setformer models`: every architecture that this package registers with timm, with its size and cost."""

from __future__ import annotations

import timm
import torch
from rich.console import Console
from rich.progress import track

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.terminal import open_table
from setformer_dist.models import measure

OURS = ("setformer_*", "soft_*")


def list_models(pattern: str, size: int | None, console: Console) -> None:
    """Print the table.

    Args:
        pattern: of names, as a shell's; "" for all.
        size: image side for which multiply-adds are counted; None takes each model's own.
        console: where to.

    Raises:
        ConfigError: no model has such a name.
    """
    names = [name for ours in OURS for name in timm.list_models(ours)]
    chosen = [name for name in names if name in timm.list_models(pattern or "*")]
    if not chosen:
        raise ConfigError(f"no model is named like {pattern!r}: there are {', '.join(names)}")
    table = open_table("model", "parameters", "image", "multiply-adds")
    for name in track(chosen, "counting", console=console, transient=True):
        side = size or timm.get_pretrained_cfg(name, allow_unregistered=True).input_size[-1]
        with torch.device("meta"):
            model = timm.create_model(name)
        cost = measure.multiply_adds(model, side, side)
        table.add_row(name, f"{measure.parameters(model) / 1e6:.2f} M", f"{side}²", f"{cost / 1e9:.2f} G")
    console.print(table)

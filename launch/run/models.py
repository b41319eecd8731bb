"""`setformer models`: every architecture that this package registers with timm, with its size and cost."""

from __future__ import annotations

import sys

import timm
import torch
from rich.console import Console
from rich.progress import track

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.terminal import open_table
from setformer_dist.models import measure
from setformer_dist.models.text import OF_TEXTS

OURS = ("setformer_*", "soft_*", f"{OF_TEXTS}*")

# What `setformer text` makes without options: tokens of a text, and of a tokenizer.
_LENGTH, _VOCABULARY = 128, 8192


def list_models(pattern: str, size: int | None, console: Console) -> None:
    """Print the table.

    Args:
        pattern: of names, as a shell's; "" for all.
        size: image side for which multiply-adds of models of images are counted; None takes each model's own.
        console: where to.

    Raises:
        ConfigError: no model has such a name.
    """
    names = [name for ours in OURS for name in timm.list_models(ours)]
    chosen = [name for name in names if name in timm.list_models(pattern or "*")]
    if not chosen:
        raise ConfigError(f"no model is named like {pattern!r}: there are {', '.join(names)}")
    table = open_table("model", "parameters", "input", "multiply-adds")
    for name in track(chosen, "counting", console=console, transient=True):
        if name.startswith(OF_TEXTS):
            given = f"{_LENGTH} tokens"
            with torch.device("meta"):
                model = timm.create_model(name, length=_LENGTH, vocabulary=_VOCABULARY)
            cost = measure.multiply_adds_of(model, (_LENGTH,), torch.int32)
        else:
            side = size or timm.get_pretrained_cfg(name, allow_unregistered=True).input_size[-1]
            given = f"{side}²"
            with torch.device("meta"):
                model = timm.create_model(name)
            cost = measure.multiply_adds_of(model, (3, side, side))
        table.add_row(name, f"{measure.parameters(model) / 1e6:.2f} M", given, f"{cost / 1e9:.2f} G")
    console.print(table)
    if any(name.startswith(OF_TEXTS) for name in chosen):
        print(f"parameters of encoders of texts are those with a table of {_VOCABULARY:,} tokens", file=sys.stderr)

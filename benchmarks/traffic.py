"""Memory traffic of a training step on a GPU: how many kernels it launches, and the bytes they read and write.

    python -m benchmarks.traffic [--models setformer_tiny …] [--batch 256] [--size 224] [--out FILE]

Needs no GPU: operators run on tensors without memory, our Triton kernels are compiled for Hopper and not launched.
Forward, cross entropy and backward in eager mode, bf16. Every tensor that a kernel gets counts once, in whole:
caches hold little of a batch. "one by one" are our models by PyTorch's operators, without `ops/block.py`. timm's Swin
computes attention by PyTorch's operators unless it is told otherwise.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks.ahead import step_of
from benchmarks.host import Stub, on_stub
from benchmarks.measure import NO_KERNEL, write
from setformer_dist.ops import block
from setformer_dist.ops.set import op

MODELS = [
    f"{name}{size}" for size in ("tiny", "base")
    for name in ("setformer_", "swin_", "convnext_")
]  # fmt: skip
SWIN = "_patch4_window7_224"
KINDS = {
    "product": ("mm", "addmm", "bmm", "linear"),
    "attention": ("attention",),
    "norm": ("native_layer_norm", "native_layer_norm_backward", "add_norm", "add_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "sum": ("sum",),
}


class Traffic(TorchDispatchMode, Stub):
    """Counts kernels and bytes, by kind."""

    def __init__(self) -> None:
        """Stand for an H100."""
        TorchDispatchMode.__init__(self)
        Stub.__init__(self)
        self.reset()

    def reset(self) -> None:
        """Begin at nothing."""
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def count(self, name: str, *tensors: object) -> None:
        """Add a kernel."""
        kind = next((kind for kind, names in KINDS.items() if name in names), "other")
        self.kernels[kind] += 1
        self.bytes[kind] += sum(tensor.nbytes for tensor in _tensors(tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.count(name, args, list((kwargs or {}).values()), result)
        return result

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return what counts a launch of a Triton kernel."""
        name = metadata.name
        return lambda *arguments: self.count(name if name in KINDS["norm"] + KINDS["GELU"] else "attention", arguments)


def _tensors(found: object) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def row(traffic: Traffic, name: str, batch: int, size: int, one_by_one: bool) -> dict[str, Any]:
    """Count a training step of a model."""
    full = name + SWIN if name.startswith("swin") else name
    step = step_of(full, size, batch, **({"img_size": size} if name.startswith("swin") else {}))
    traffic.reset()
    with (
        mock.patch.object(block, "WIDEST", 0 if one_by_one else block.WIDEST),
        mock.patch.object(block, "watched", return_value=False),  # by our counter
        mock.patch.object(op, "watched", return_value=False),
        traffic,
    ):
        step()
    kinds = {kind: round(traffic.bytes[kind] / 1e9, 2) for kind in [*KINDS, "other"]}
    total = round(sum(traffic.bytes.values()) / 1e9, 1)
    shown = f"{name}, one by one" if one_by_one else name
    return {"model": shown, "batch": batch, "size": size, "kernels": sum(traffic.kernels.values()), "GB": total} | kinds


def main() -> None:
    """Count every model, and ours once more by PyTorch's operators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/traffic.json"))
    arguments = parser.parse_args()
    traffic = Traffic()
    on_stub(traffic)
    rows = []
    for name in arguments.models:
        rows += [row(traffic, name, arguments.batch, arguments.size, False)]
        rows += [row(traffic, name, arguments.batch, arguments.size, True)] if name.startswith("setformer") else []
    table = Table(*rows[0])
    for found in rows:
        table.add_row(*map(str, found.values()))
    Console().print(table)
    write(arguments.out, {"rows": rows})


if __name__ == "__main__":
    main()

"""Compile the kernels of ops/block.py for a GPU where there is none: `python -m tests.numerics.block_compiles SM`."""

from __future__ import annotations

import itertools
import sys

import torch
from torch import nn
from triton.runtime import driver

from benchmarks.host import Stub
from setformer_dist.ops import block


def main(capability: int) -> None:
    gpu = Stub(capability)
    driver.set_active(gpu)
    for dtype, c in itertools.product((torch.bfloat16, torch.float32), (64, 96, 512)):
        x = torch.zeros(2, 20, c, dtype=dtype, requires_grad=True)
        norm, output, fc1, fc2 = nn.LayerNorm(c), nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        for layer in (norm, output, fc1, fc2):
            layer.to(dtype)
        for scale, keep in ((None, None), (nn.Parameter(torch.ones(c, dtype=dtype)), torch.ones(2, 2))):
            y, normed = block.enter(x, norm)
            weights = block.Weights.of(output, scale, norm, fc1, fc2, scale)
            block.leave(y, normed, keep, weights, norm.eps).sum().backward()
    for name in sorted({kernel.name for kernel in gpu.compiled}):
        print(f"{name} compiled, {sum(kernel.name == name for kernel in gpu.compiled)} times")


if __name__ == "__main__":
    main(int(sys.argv[1]))

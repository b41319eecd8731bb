"""A part of the model with the averaged weights, whole on every rank: what the rest of it learns to predict."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import nn

from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.ema import Ema


class AveragedModel:
    """A copy of a part of the model, without gradients, that takes over the average when it is told to.

    Its weights are a function of the average, so a checkpoint holds nothing of it.

    Args:
        module: the copy, in evaluation mode, on the device and of the compute dtype.
        prefix: what the names of its parameters begin with in the whole model.
    """

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module = module
        self._parameters = {f"{prefix}{name}": p.data.view(-1) for name, p in module.named_parameters()}
        first = next(module.parameters())
        self._device, self._dtype = first.device, first.dtype
        self._layout: list[list[tuple[str, int, int]]] | None = None

    @torch.no_grad()
    def follow(self, ema: Ema, comm: TorchCollectives) -> None:
        """Take over the average, of which every rank holds a part. Collective.

        Each rank sends what it holds to all others, in the compute dtype; where each holds all (ZeRO stage 0),
        nothing travels.
        """
        mine = [f for f in ema.fragments() if f.name in self._parameters]
        flat = [f.tensor.to(self._device, self._dtype, non_blocking=True) for f in mine]
        held = torch.cat([torch.zeros(0, device=self._device, dtype=self._dtype), *flat])
        if self._layout is None:
            self._layout = comm.gather_json([(f.name, f.start, f.tensor.numel()) for f in mine])
        layout = self._layout
        sizes = [sum(count for _, _, count in places) for places in layout]
        if min(sizes) == sum(p.numel() for p in self._parameters.values()):
            self._take(held, layout[comm.ranks.rank])
            return
        sent = torch.zeros(max(sizes), device=self._device, dtype=self._dtype)
        sent[: len(held)] = held
        received = torch.empty(len(sizes) * len(sent), device=self._device, dtype=self._dtype)
        dist.all_gather_into_tensor(received, sent)
        for part, places in zip(received.chunk(len(sizes)), layout, strict=True):
            self._take(part, places)

    def _take(self, values: torch.Tensor, places: list[tuple[str, int, int]]) -> None:
        ends = itertools.accumulate(count for _, _, count in places)
        for (name, start, count), end in zip(places, ends, strict=True):
            self._parameters[name][start : start + count] = values[end - count : end]

"""What ranks that share images by rows exchange for each of them (parallel.sequence, docs/sequence_parallel.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from setformer_dist.models.attention import SetAttention, SoftmaxAttention
from setformer_dist.models.setformer import SeTformer
from setformer_dist.ops.set.attention import problem_of
from setformer_dist.ops.set.split import traffic
from setformer_dist.ops.sinkhorn import working_dtype


@dataclass(frozen=True)
class Exchange:
    """Messages of one micro batch in a group, forward and backward, and their bytes for each image.

    Attributes:
        sums: messages of the attention and of the pooling; one message is for all images.
        sum_bytes: what a rank puts into them.
        rows: messages that give a row of tokens to a neighbour.
        row_bytes: what a rank gives.
        gathers: messages that bring keys and values of all ranks, of softmax attention.
        gather_bytes: what a rank gets and has.
    """

    sums: int
    sum_bytes: int
    rows: int
    row_bytes: int
    gathers: int = 0
    gather_bytes: int = 0


def exchange_of(model: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> Exchange:
    """Return what the ranks of a group exchange for an image.

    Args:
        model: a SeTformer that can be split.
        shape: (height, width) of the whole image.
        dtype: of the activations.
    """
    assert isinstance(model, SeTformer)
    sums = sum_bytes = 0
    for layer in model.modules():
        if isinstance(layer, SetAttention):
            problem, width_of_head = problem_of(layer.config), layer.output.in_features // layer.num_heads
            found = traffic(problem, layer.config.reference_sets, layer.references.shape[1], width_of_head)
            working = working_dtype(dtype, layer.config.epsilon)
            assert working is not None
            backward = torch.float64 if problem.implicit else working  # systems of equations travel in fp64
            sums += found.forward_messages + found.backward_messages
            numbers = found.forward * working.itemsize + found.backward * backward.itemsize
            sum_bytes += layer.num_heads * numbers
    gathers = gather_bytes = 0
    for reduction, stage in zip(model.config.reductions, model.stages, strict=True):
        for gathering in (layer for layer in stage.modules() if isinstance(layer, SoftmaxAttention)):
            numbers = 2 * (shape[0] // reduction) * (shape[1] // reduction) * gathering.output.in_features
            gathers, gather_bytes = gathers + 1, gather_bytes + numbers * dtype.itemsize
            sums, sum_bytes = sums + 1, sum_bytes + numbers * max(4, dtype.itemsize)  # of their gradients
    pooled = 2 * model.num_features * max(4, dtype.itemsize)
    stages = list(zip(model.widths[:-1], model.config.reductions[:-1], strict=True))
    rows = sum(channels * (shape[1] // reduction) * dtype.itemsize for channels, reduction in stages)
    return Exchange(sums + 2, sum_bytes + pooled, 2 * len(stages), 2 * rows, gathers, gather_bytes)

"""What all implementations of the split form share: what a part knows of the whole image, what travels, what is kept.

Letters as in split.py.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from setformer_dist.ops.kernels import log_filter
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.sinkhorn import working_dtype

_TILE = 1 << 20  # numbers of a filter at once, where its largest entries are looked for


@dataclass(frozen=True)
class Whole:
    """What a part must know of the whole image.

    Attributes:
        tokens: of the image, masked ones included.
        mask_bn: True for its valid tokens, None where all are.
        nearest_b1m: largest logarithm of the position filter in each column, over all valid tokens; None without one.
    """

    tokens: int
    mask_bn: torch.Tensor | None
    nearest_b1m: torch.Tensor | None


def part_of(whole: Inputs, problem: SetProblem, rows: Rows) -> tuple[Inputs, Whole]:
    """Cut what is known of the whole image down to this rank's tokens.

    Args:
        whole: x and features of this part; positions and mask of the whole image.
        problem: the numbers.
        rows: the group.
    """
    n = whole.x_bhnd.shape[2] * rows.count
    own = rows.own(n)
    positions, places, mask = whole.positions_bna, whole.places_ma, whole.mask_bn
    nearest = None
    if positions is not None and problem.renormalise:
        assert places is not None
        dtype = working_dtype(whole.x_bhnd.dtype, problem.epsilon)
        assert dtype is not None
        if mask is None:
            nearest = _kept_nearest(positions, places, problem.tau, dtype)
        else:
            nearest = _nearest(positions, places, problem.tau, dtype, mask)
    inputs = whole._replace(
        positions_bna=None if positions is None else positions[:, own], mask_bn=None if mask is None else mask[:, own]
    )
    return inputs, Whole(n, mask, nearest)


def _nearest(
    positions_bna: torch.Tensor,
    places_ma: torch.Tensor,
    tau: float,
    dtype: torch.dtype,
    mask_bn: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the largest entry of each column of the filter's logarithm, over valid tokens, (b or 1, 1, m)."""
    images = positions_bna.shape[0] if mask_bn is None else mask_bn.shape[0]
    tile = max(1, _TILE // (images * places_ma.shape[0]))
    found: torch.Tensor | None = None
    for at in range(0, positions_bna.shape[1], tile):
        chosen = positions_bna[:, at : at + tile].expand(images, -1, -1).to(dtype)
        logs = log_filter(chosen, places_ma.to(dtype), tau)
        if mask_bn is not None:
            logs = logs.masked_fill(~mask_bn[:, at : at + tile].unsqueeze(-1), -math.inf)
        largest = logs.amax(-2, keepdim=True)
        found = largest if found is None else torch.maximum(found, largest)
    assert found is not None
    return found


# What `_nearest` found, by positions, places, and (tau, dtype), as long as both tensors live: those of a grid are kept
# (attention.py), those that a caller gives are new each time.
_Found = dict[tuple[float, torch.dtype], torch.Tensor]
_found: MutableMapping[torch.Tensor, MutableMapping[torch.Tensor, _Found]] = WeakTensorKeyDictionary()


def _kept_nearest(positions_bna: torch.Tensor, places_ma: torch.Tensor, tau: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `_nearest` of all tokens, found once for the same tensors."""
    by_places = _found.get(positions_bna)
    if by_places is None:
        by_places = _found[positions_bna] = WeakTensorKeyDictionary()
    if (found := by_places.get(places_ma)) is None:
        found = by_places[places_ma] = {}
    kept = found.get((tau, dtype))
    if kept is None:
        with torch.inference_mode(False):  # an evaluation may be the first that asks
            kept = found[tau, dtype] = _nearest(positions_bna, places_ma, tau, dtype)
    return kept


class Kept(NamedTuple):
    """What the backward needs besides the inputs.

    Attributes:
        rounds: v of all rounds, (sets, z, L + 1, m).
        pooled: (z, m, d).
        inverse_sum: 1 / N, (z, m, 1).
    """

    rounds: torch.Tensor
    pooled: torch.Tensor
    inverse_sum: torch.Tensor


def needs_last(problem: SetProblem, sets: int) -> bool:
    """Return whether the last v of every set is needed; a renormalised gathering set of two cancels its own."""
    return sets == 1 or not problem.renormalise or problem.implicit


def last_sums(problem: SetProblem, sets: int, z: int, m: int, d: int) -> list[tuple[int, ...]]:
    """Return the shapes of what travels in the last round: P, N if renormalised, and u K of the sets that need it."""
    needed = sets if needs_last(problem, sets) else sets - 1
    return [(z, m, d), *[(z, m)] * problem.renormalise, (needed, z, m)]


def message_for(
    like: torch.Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return memory for what travels together, and the place of each tensor in it.

    Args:
        like: a tensor on the same device.
        shapes: of the tensors.
        dtype: theirs.
    """
    message = like.new_empty(sum(math.prod(shape) for shape in shapes), dtype=dtype)
    return message, parts_of_message(message, shapes)


def parts_of_message(message: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return the tensors of a message, views of it."""
    parts = torch.split(message, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def sum_all(rows: Rows, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the sums over the parts of several tensors, in one message."""
    total = rows.sum(torch.cat([t.reshape(-1) for t in tensors]))
    parts = torch.split(total, [t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

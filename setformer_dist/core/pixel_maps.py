"""Maps at another size, and the loss of their pixels, by matrix products.

Values are those of torch's own functions. Gradients of these add up in any order on a GPU, so that no run would be
repeatable; those of a product of matrices do not.

B = images, K = channels or classes, H, W = rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from setformer_dist.core.batch import VOID

_STRIP = 1 << 24  # logits that are made at a time where no gradient needs them all: small beside a model's maps


def resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return (..., H, W) maps at another size, bilinear as `F.interpolate` without aligned corners."""
    if x.shape[-2:] == (height, width):
        return x
    rows, columns = _linear_weights(x.shape[-2], height, x), _linear_weights(x.shape[-1], width, x)
    return rows.T @ (x @ columns)


def resized_pixels(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the pixels of (B, K, H, W) maps at another size, (B, height, width, K); see `resized`."""
    [(_, pixels)] = strips(x, height, width, height)
    return pixels


def strips(x: torch.Tensor, height: int, width: int, rows: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the pixels of (B, K, H, W) maps at another size in strips: which rows, and (B, their number, width, K).

    Args:
        x: the maps.
        height: of the whole.
        width: of the whole.
        rows: of a strip; 0 for as many as take little memory.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    b, there, across, classes = x.shape
    down, columns = _linear_weights(there, height, x), _linear_weights(across, width, x)
    rows = rows or max(1, _STRIP // (b * width * classes))
    for first in range(0, height, rows):
        part = slice(first, min(first + rows, height))
        tall = down[:, part].T @ x.view(b, there, across * classes)
        yield part, columns.T @ tall.view(b, -1, across, classes)


def classes_of(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the most probable class of each pixel of (B, K, H, W) logits at another size, (B, height, width) uint8."""
    found = [pixels.argmax(dim=3).to(torch.uint8) for _, pixels in strips(logits.float(), height, width)]
    return torch.cat(found, dim=1)


def pooled(x: torch.Tensor, bins: int) -> torch.Tensor:
    """Return the means of (..., H, W) maps over bins x bins parts, as `F.adaptive_avg_pool2d`."""
    rows, columns = (F.adaptive_avg_pool1d(_each(side, x), bins)[0].to(x.dtype) for side in x.shape[-2:])
    return rows.T @ (x @ columns)


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cross entropy summed over the pixels that have a class, shape (), fp32.

    Args:
        logits: (B, K, h, w), of any size; they are resized to the masks.
        masks: (B, H, W), the class of each pixel, `VOID` where it has none.
        weights: (K,), of the classes.
    """
    pixels = resized_pixels(logits.float(), *masks.shape[1:]).flatten(0, 2)
    # Of rows: torch's kernel for images adds up in any order on a GPU.
    return F.cross_entropy(pixels, masks.flatten().long(), weights, ignore_index=VOID, reduction="sum")


def _linear_weights(there: int, here: int, like: torch.Tensor) -> torch.Tensor:
    """Return the weights (there, here) by which `here` values are interpolated from `there`."""
    return F.interpolate(_each(there, like), here, mode="linear", align_corners=False)[0].to(like.dtype)


def _each(count: int, like: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.eye(count, dtype=dtype, device=like.device)[None]

"""Maps at another size, and the loss of their pixels, by matrix products.

Values are those of torch's own functions. Gradients of these add up in any order on a GPU, so that no run would be
repeatable; those of a product of matrices do not.

B = images, K = channels or classes, H, W = rows and columns.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

VOID = 255  # the class of a pixel that does not count


def resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return (..., H, W) maps at another size, bilinear as `F.interpolate` without aligned corners."""
    if x.shape[-2:] == (height, width):
        return x
    rows, columns = _linear_weights(x.shape[-2], height, x), _linear_weights(x.shape[-1], width, x)
    return rows.T @ (x @ columns)


def resized_pixels(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the pixels of (B, K, H, W) maps at another size, row by row: (B · height · width, K); see `resized`."""
    x = x.permute(0, 2, 3, 1).contiguous()
    b, there, across, classes = x.shape
    rows, columns = _linear_weights(there, height, x), _linear_weights(across, width, x)
    tall = (rows.T @ x.view(b, there, across * classes)).view(b, height, across, classes)
    return (columns.T @ tall).view(b * height * width, classes)


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
    pixels = resized_pixels(logits.float(), *masks.shape[1:])
    # Of rows: torch's kernel for images adds up in any order on a GPU.
    return F.cross_entropy(pixels, masks.flatten().long(), weights, ignore_index=VOID, reduction="sum")


def _linear_weights(there: int, here: int, like: torch.Tensor) -> torch.Tensor:
    """Return the weights (there, here) by which `here` values are interpolated from `there`."""
    return F.interpolate(_each(there, like), here, mode="linear", align_corners=False)[0].to(like.dtype)


def _each(count: int, like: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.eye(count, dtype=dtype, device=like.device)[None]

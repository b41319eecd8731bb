"""Tensors of a micro batch on their way to the device."""

from __future__ import annotations

import torch


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; on a GPU without waiting for the kernels that were launched before.

    `tensor.to(device)` waits until the GPU has done all that is queued, and so does a copy from pageable memory. One
    from pinned memory is queued behind it. torch keeps the pinned memory until the copy is done, and uses it again.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

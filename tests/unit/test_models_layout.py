"""Every family of models computes the same from images in another memory layout, weights as they are."""

from __future__ import annotations

import pytest
import torch

from setformer_dist.core.model_config import ModelConfig
from setformer_dist.models.build import build_model


@pytest.mark.parametrize("name", ["setformer_nano", "soft_tiny", "vit_tiny_patch16_224", "convnext_atto"])
def test_channels_last_images_give_the_same_outputs_and_gradients(name: str) -> None:
    model = build_model(ModelConfig(name=name), 10, 64, 0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.zero_grad()
        outputs = model(images.contiguous(memory_format=layout))
        outputs.square().mean().backward()
        found.append((outputs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, gradients), (other, others) = found
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

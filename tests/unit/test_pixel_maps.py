"""Maps at another size by matrix products: torch's own values and gradients, in any strips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from setformer_dist.core.batch import VOID
from setformer_dist.core.pixel_maps import classes_of, pixel_loss, pooled, resized, resized_pixels, strips

SIZES = [((5, 7), (20, 28)), ((12, 16), (23, 31)), ((9, 4), (9, 17)), ((30, 20), (7, 11)), ((6, 6), (6, 6))]


@pytest.mark.parametrize(("there", "here"), SIZES)
def test_a_map_is_resized_as_torch_does_it(there, here):
    x = torch.randn(2, 3, *there, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(x, here, mode="bilinear", align_corners=False)
    weight = torch.randn_like(expected)
    for found in (resized(x, *here), resized_pixels(x, *here).permute(0, 3, 1, 2)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 7), (6, 10), (3, 2), (1, 13)])
def test_a_map_is_pooled_as_torch_does_it(size, bins):
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(pooled(x, bins), F.adaptive_avg_pool2d(x, bins), rtol=1e-12, atol=1e-12)


def test_low_precision_is_resized_within_its_rounding():
    x = torch.randn(1, 8, 14, 14)
    found = resized(x.bfloat16(), 37, 41)
    assert found.dtype == torch.bfloat16
    expected = F.interpolate(x.bfloat16().double(), (37, 41), mode="bilinear", align_corners=False)
    assert (found.double() - expected).abs().max() < 0.03 * x.abs().max()


def test_the_loss_is_that_of_resized_logits():
    logits = torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 5, (2, 24, 30), dtype=torch.uint8)
    masks[0, :7] = VOID
    weights = torch.rand(5)
    large = F.interpolate(logits.float(), (24, 30), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large, masks.long(), weights, ignore_index=VOID, reduction="sum")
    found = pixel_loss(logits, masks, weights)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss, logits)[0].float() for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_masks_without_any_class_have_no_loss_and_finite_gradients():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 8, 8), VOID, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_strips_are_the_whole():
    logits = torch.randn(2, 4, 5, 6)
    whole = resized_pixels(logits, 21, 17)
    for rows in (1, 4, 21, 50):
        parts = list(strips(logits, 21, 17, rows))
        assert [part.start for part, _ in parts] == list(range(0, 21, rows))
        torch.testing.assert_close(torch.cat([pixels for _, pixels in parts], 1), whole)
    assert torch.equal(classes_of(logits, 21, 17), whole.argmax(3).to(torch.uint8))

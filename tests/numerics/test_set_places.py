"""Where tokens and references lie: in their cells, per token, and as the size of an image changes."""

from __future__ import annotations

import re

import pytest
import torch

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import grid_places, line_places
from setformer_dist.ops.set.attention import SetAttentionConfig, set_attention

IMPLEMENTATIONS = ["reference", "torch", "cpp"]


def tensors(n: int, b: int = 2, h: int = 2, d: int = 8, m: int = 4, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((b, h, n, d), (h, m, d), (h, m, d))]


def attend(x, there, back, config, **where):
    return set_attention(x, there, config, return_references_hmd=back, **where)


def config_of(**choices) -> SetAttentionConfig:
    return SetAttentionConfig(references=4, **choices)


def test_centres_of_cells_do_not_move_when_the_cells_are_halved():
    """The mean of the four tokens into which one token is cut lies where that token lay; at edges it does not."""
    for offset, moved in ((0.5, 0.0), (0.0, 0.25 / 7)):
        coarse, fine = (grid_places((side, side), torch.float64, offset=offset) for side in (7, 14))
        means = fine.view(7, 2, 7, 2, 2).mean((1, 3)).view(-1, 2)
        torch.testing.assert_close(means - coarse, torch.full_like(coarse, moved))
    assert line_places(3, torch.float64, offset=0.5).squeeze(1).tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_an_image_that_is_enlarged_gives_what_it_gave_only_with_cell_centres():
    """Each token cut into 4 x 4 equal ones: plan and values stay, and with them the output but for the filter."""
    x, there, back = tensors(36)
    fine = x.view(2, 2, 6, 6, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).view(2, 2, 576, 8)
    moved = {}
    for places in ("centres", "edges"):
        config = config_of(places=places, tau=1.0)
        small, large = attend(x, there, back, config, grid=(6, 6)), attend(fine, there, back, config, grid=(24, 24))
        means = large.view(2, 2, 6, 4, 6, 4, 8).mean((3, 5)).view_as(small)
        moved[places] = float((means - small).norm() / small.norm())
    assert 0.0 < moved["centres"] < moved["edges"] / 10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("places", ["centres", "edges"])
def test_positions_of_a_grid_or_a_line_are_what_is_taken_without(places, implementation):
    x, there, back = tensors(24, dtype=torch.float32)
    offset = 0.5 if places == "centres" else 0.0
    for choice, positions, grid in (
        ("separable", grid_places((4, 6), torch.float32, offset=offset), (4, 6)),
        ("linear", line_places(24, torch.float32, offset=offset), None),
    ):
        config = config_of(places=places, position_filter=choice, implementation=implementation)
        given = attend(x, there, back, config, positions_bna=positions.unsqueeze(0))
        assert torch.equal(given, attend(x, there, back, config, grid=grid))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_some_tokens_alone_are_the_whole_image_with_the_others_masked(implementation):
    x, there, back = tensors(36)
    positions = grid_places((6, 6), torch.float64, offset=0.5)
    kept = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(seed))[:14] for seed in (1, 2)])
    mask = torch.zeros(2, 36, dtype=torch.bool).scatter_(1, kept, True)
    config = config_of(implementation=implementation)
    whole = attend(x, there, back, config, grid=(6, 6), mask_bn=mask)
    at = kept[:, None, :, None].expand(2, 2, 14, 8)
    alone = attend(x.gather(2, at), there, back, config, positions_bna=positions[kept])
    torch.testing.assert_close(alone, whole.gather(2, at), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_images_of_several_sizes_in_one_batch_are_each_as_alone(implementation):
    config = config_of(implementation=implementation)
    sides = [(3, 4), (5, 6)]
    _, there, back = tensors(1)
    images = [tensors(rows * columns, b=1)[0] for rows, columns in sides]
    batch, positions = (torch.full(shape, torch.nan, dtype=torch.float64) for shape in ((2, 2, 30, 8), (2, 30, 2)))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    for index, (image, side) in enumerate(zip(images, sides, strict=True)):
        count = image.shape[2]
        batch[index, :, :count], mask[index, :count] = image[0], True
        positions[index, :count] = grid_places(side, torch.float64, offset=0.5)
    together = attend(batch, there.requires_grad_(), back, config, positions_bna=positions, mask_bn=mask)
    assert torch.autograd.grad(together.square().sum(), there)[0].isfinite().all()  # padding may lie anywhere, too
    for index, (image, side) in enumerate(zip(images, sides, strict=True)):
        alone = attend(image, there, back, config, grid=side)
        torch.testing.assert_close(together[index : index + 1, :, : image.shape[2]], alone, atol=1e-13, rtol=1e-13)
    assert not together[0, :, 12:].any()


def test_gradients_with_positions_are_right():
    x, there, back = (t.requires_grad_() for t in tensors(5, d=3))
    positions = torch.rand(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for implementation in ("torch", "cpp"):
        config = config_of(implementation=implementation)
        assert torch.autograd.gradcheck(
            lambda *given, config=config: attend(*given, config, positions_bna=positions), (x, there, back),
            fast_mode=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "where", "message"),
    [
        ({"position_filter": "none"}, {"positions_bna": torch.zeros(1, 6, 2)}, "no use for them: leave them out"),
        ({}, {"positions_bna": torch.zeros(1, 6, 2), "grid": (2, 3)}, "leave one of them out"),
        ({}, {"positions_bna": torch.zeros(1, 6, 1)}, "expected floats (2 or 1, 6, 2)"),
        ({"position_filter": "linear"}, {"positions_bna": torch.zeros(3, 6, 1)}, "expected floats (2 or 1, 6, 1)"),
        ({}, {"positions_bna": torch.zeros(1, 6, 2, dtype=torch.int64)}, "expected floats (2 or 1, 6, 2)"),
    ],
)
def test_positions_that_do_not_fit_are_refused(choices, where, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        attend(*tensors(6), config_of(**choices), **where)

"""Masked autoencoding: hidden pixels reach nothing, gathered tokens are what masked ones are, and the loss is plain."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.masking import check_unit, hidden_units, visible_units
from setformer_dist.core.ranks import RankInfo
from setformer_dist.models.layers import conv_tokens
from setformer_dist.models.masked import MaskedAutoencoder, latents
from setformer_dist.models.simmim import SimmimModel
from setformer_dist.tasks.mae import Masked

UNIT, RATIO = 8, 0.6


def autoencoder(dtype=torch.float32, **args):
    torch.manual_seed(0)
    encoder = timm.create_model("setformer_nano", num_classes=0, **args)
    return MaskedAutoencoder(encoder, UNIT, RATIO, 32, 1).to(dtype)


def inputs(dtype=torch.float32, height=32, width=40):
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    hidden = torch.from_numpy(hidden_units(np.arange(3, dtype=np.int64), height // UNIT, width // UNIT, RATIO))
    pixels = hidden.repeat_interleave(UNIT, 1).repeat_interleave(UNIT, 2).unsqueeze(1)
    return torch.cat([images, pixels.to(dtype)], 1), pixels


@pytest.mark.parametrize("args", [{}, {"attn": {"position_filter": "linear"}}, {"attn": {"position_filter": "none"}}])
def test_hidden_pixels_change_no_visible_feature_bit_by_bit(args):
    model = autoencoder(**args).eval()
    given, pixels = inputs()
    visible = model.visible_of(given)
    before = [*model.encoder.forward_visible(given[:, :3], visible), model(given)]
    changed = given.clone()
    changed[:, :3] = torch.where(pixels, torch.tensor(float("nan")), given[:, :3])
    after = [*model.encoder.forward_visible(changed[:, :3], visible), model(changed)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # and the test can fail: one visible pixel changes them
    row, column = (~pixels[0, 0]).nonzero()[0].tolist()
    given[0, :, row, column] += 1
    assert not torch.equal(model.encoder.forward_visible(given[:, :3], visible)[-1], before[-2])


def dense(encoder, image, visible):
    """The same by another way: whole maps, masked attention, and zeros put in after every operation."""
    side = image.shape[2] // visible.rows
    x = image * visible.seen(side).unsqueeze(1)
    x = encoder.stem.conv1(x) * visible.seen(side // 2).unsqueeze(1)
    x = encoder.stem.norm(conv_tokens(x.permute(0, 2, 3, 1), encoder.stem.conv2))
    maps = []
    for index, stage in enumerate(encoder.stages):
        if index:
            side //= 2
            x = stage.downsample.norm(conv_tokens(x * seen.unsqueeze(-1), stage.downsample.conv))  # noqa: F821
        seen = visible.seen(x.shape[1] // visible.rows)
        for block in stage.blocks:
            y = block.attn(block.norm1(x).flatten(1, 2), (x.shape[1], x.shape[2]), seen.flatten(1))
            x = x + y.view(x.shape)
            x = x + block.mlp(block.norm2(x))
        maps.append(x)
    return maps


def test_gathered_tokens_are_what_masked_ones_are():
    model = autoencoder(torch.float64).eval()
    given, _ = inputs(torch.float64)
    visible = model.visible_of(given)
    found = model.encoder.forward_visible(given[:, :3], visible)
    for ours, whole in zip(found, dense(model.encoder, given[:, :3], visible), strict=True):
        torch.testing.assert_close(ours, visible.gather(whole), rtol=0, atol=1e-12)


def test_with_nothing_hidden_the_encoder_is_the_model():
    model = autoencoder(torch.float64).eval()
    model.ratio = 0.0
    given, _ = inputs(torch.float64)
    visible = model.visible_of(given[:, :3])
    maps = model.encoder.forward_intermediates(given[:, :3], output_fmt="NHWC", intermediates_only=True)
    for ours, whole in zip(model.encoder.forward_visible(given[:, :3], visible), maps, strict=True):
        torch.testing.assert_close(visible.scatter(ours), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", ["cheap", "mlp", "block"])
def test_every_parameter_learns_and_recomputing_changes_no_bit(recompute):
    model = autoencoder()
    given, _ = inputs()
    gradients = []
    for policy in ("none", recompute):
        model.set_recompute(policy)
        model.zero_grad()
        model(given).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert not [name for name, grad in gradients[0].items() if grad is None or not grad.any()]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def batch_of(ids, step=0):
    count = len(ids)
    pixels = torch.stack([torch.full((3, 32, 32), float(i)) for i in ids]) + torch.arange(32.0)
    return MicroBatch(pixels, torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.tensor(ids), step=step)


def prepare(task, steps_per_epoch=10, seed=0):
    def plain(batch, train):
        return batch.inputs, None

    return task.prepared(plain, torch.float32, seed, steps_per_epoch)


def test_the_loss_is_that_of_a_plain_computation_over_hidden_pixels():
    task = Masked({"unit": UNIT}, ())
    given, targets = prepare(task)(batch_of([4, 7]), train=False)
    outputs = torch.randn(targets.shape, generator=torch.Generator().manual_seed(3))
    total, count, place = 0.0, 0, [0, 0]
    for image in range(2):
        for row in range(4):
            for column in range(4):
                part = given[image, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].double()
                if not part[3].all():
                    assert not part[3].any()
                    continue
                pixels = part[:3].permute(1, 2, 0)
                wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                total += float((outputs[image, place[image]].double() - wanted).square().sum())
                count, place[image] = count + pixels.numel(), place[image] + 1
    assert place == [10, 10]
    assert float(task.loss(outputs, targets)) == pytest.approx(total / count, rel=1e-6)
    assert float(task.sums(outputs, batch_of([4, 7]), targets)) / 2 == pytest.approx(total / count, rel=1e-6)
    assert F.mse_loss(outputs, targets) == task.loss(outputs, targets)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_masks_do_not_depend_on_ranks_or_micro_batches(world):
    task, ids = Masked({"unit": UNIT}, ()), list(range(12))
    whole, _ = prepare(task)(batch_of(ids), train=True)
    for rank in range(world):
        place = RankInfo(rank=rank, world_size=world, local_rank=rank, local_world_size=world)
        own = ids[place.rank :: place.world_size]
        for first in range(0, len(own), 2):
            part, _ = prepare(task)(batch_of(own[first : first + 2]), train=True)
            assert torch.equal(part, whole[own[first : first + 2]])


def test_masks_change_with_epoch_and_seed_and_those_of_evaluation_do_not():
    task, ids = Masked({"unit": UNIT}, ()), list(range(8))

    def masks(step=0, seed=0, train=True):
        return prepare(task, seed=seed)(batch_of(ids, step), train=train)[0][:, 3]

    assert torch.equal(masks(0), masks(9))  # one epoch
    assert not torch.equal(masks(0), masks(10))
    assert not torch.equal(masks(0), masks(0, seed=1))
    assert torch.equal(masks(train=False), masks(step=70, seed=3, train=False))


@pytest.mark.parametrize(("rows", "columns", "ratio"), [(4, 4, 0.6), (7, 7, 0.6), (16, 32, 0.75), (1, 5, 0.5)])
def test_every_image_hides_as_many_units_and_rows_differ_by_one(rows, columns, ratio):
    hidden = hidden_units(np.arange(-500, 500, dtype=np.int64), rows, columns, ratio)
    assert set((~hidden).sum(axis=(1, 2))) == {visible_units(rows * columns, ratio)}
    by_row = (~hidden).sum(axis=2)
    assert (by_row.max(axis=1) - by_row.min(axis=1) <= 1).all()
    share = hidden.mean(axis=0)
    assert abs(share - share.mean()).max() < 0.08  # every unit as often as another


@pytest.mark.parametrize(
    ("unit", "shape", "ratio", "words"),
    [
        (12, (32, 32), 0.6, r"unit = 12 must be a multiple of the model's total stride of 8 pixels.*use 8 or 16"),
        (32, (32, 32), 0.6, r"have 1 unit of 32 x 32, and task\.args\.ratio = 0\.6 hides 1 of them"),
        (16, (40, 40), 0.6, r"not made of whole units of 16 x 16: use sides such as 32 or 48, or a task.args.uni"),
        (8, (16, 16), 0.1, r"have 4 units of 8 x 8, and task\.args\.ratio = 0\.1 hides 0 of them"),
    ],
)  # fmt: skip
def test_units_that_do_not_fit_are_refused_with_what_does(unit, shape, ratio, words):
    with pytest.raises(ConfigError, match=words):
        check_unit(unit, 8, shape, ratio)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"task\.args\.?.*ratio"):
        Masked({"ratio": ratio}, ())


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("setformer_nano", {"attention": "softmax"}, r"attention = 'softmax' has no form for some tokens"),
        ("setformer_nano", {"attention": "cast"}, r"attention = 'cast' has no form"),
        ("setformer_nano", {"attention": "soft"}, r"attention = 'soft' has no form"),
        ("vit_tiny_patch16_224", {}, r"VisionTransformer has no encoder in stages"),
    ],
)
def test_models_without_an_exact_mask_are_refused(name, args, words):
    with pytest.raises(ConfigError, match=words):
        MaskedAutoencoder(timm.create_model(name, num_classes=0, **args), 16, RATIO, 32, 1)


def test_latent_targets_are_normed_tokens_of_the_whole_image_at_hidden_places():
    torch.manual_seed(0)
    encoder = timm.create_model("setformer_nano", num_classes=0)
    model = MaskedAutoencoder(encoder, UNIT, RATIO, 32, 1, latent=True)
    task = Masked({"unit": UNIT, "target": "latent"}, ())

    def plain(batch, train):
        return batch.inputs, None

    prepared = task.prepared(plain, torch.float32, 0, 10, functools.partial(latents, encoder))
    given, targets = prepared(batch_of([4, 7]), train=False)
    tokens = encoder.norm(encoder.forward_intermediates(given[:, :3], indices=1, intermediates_only=True,
                                                        output_fmt="NHWC")[0])  # fmt: skip
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    for image in range(2):
        rows, columns = given[image, 3, ::UNIT, ::UNIT].nonzero(as_tuple=True)
        torch.testing.assert_close(targets[image, :, 0, 0], tokens[image, rows, columns], rtol=1e-4, atol=1e-5)
    assert not targets.requires_grad
    assert model(given).shape == targets.shape
    with pytest.raises(ConfigError, match="score the features with"):
        task.prepared(plain, torch.float32, 0, 10)


def simmim(name="setformer_nano", unit=UNIT, **args):
    torch.manual_seed(0)
    return SimmimModel(timm.create_model(name, num_classes=0, **args), unit, RATIO, name, 3)


@pytest.mark.parametrize(
    ("name", "args", "unit", "side"),
    [
        ("setformer_nano", {"attention": "softmax"}, 8, 32),
        ("setformer_nano", {"attention": "set"}, 8, 32),
        ("vit_tiny_patch16_224", {"img_size": 64}, 16, 64),
        ("swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 3}, 32, 96),
        ("convnext_atto", {}, 32, 64),
    ],
)
def test_simmim_hides_pixels_of_any_backbone_and_all_of_it_learns(name, args, unit, side):
    model = simmim(name, unit, **args).eval()
    units = side // unit
    hidden = torch.from_numpy(hidden_units(np.arange(2, dtype=np.int64), units, units, RATIO))
    pixels = hidden.repeat_interleave(unit, 1).repeat_interleave(unit, 2).unsqueeze(1)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    given = torch.cat([images, pixels.float()], 1)
    found = model(given)
    assert found.shape == (2, int(hidden[0].sum()), unit, unit, 3)
    changed = given.clone()
    changed[:, :3] = torch.where(pixels, torch.tensor(float("nan")), images)
    assert torch.equal(model(changed), found)
    found.square().mean().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused <= {"encoder.head.norm.weight", "encoder.head.norm.bias"}  # ConvNeXt norms what it has pooled
    assert "forward" not in model.encoder.__dict__


def test_simmim_predicts_each_hidden_unit_from_its_own_place():
    model = simmim(attention="softmax").eval()
    given, _ = inputs()
    features = model.encoder.forward_intermediates(
        torch.where(given[:, 3:] > 0, model.replacement.repeat(1, 4, 5), given[:, :3]),
        indices=1, norm=True, output_fmt="NHWC", intermediates_only=True,
    )[0]  # fmt: skip
    whole = model.pixels(features).view(3, 4, 5, 8, 8, 3)
    for image in range(3):
        rows, columns = given[image, 3, ::UNIT, ::UNIT].nonzero(as_tuple=True)
        torch.testing.assert_close(model(given)[image], whole[image, rows, columns])

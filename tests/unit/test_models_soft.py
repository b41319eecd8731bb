"""All registered SOFT and SOFT++ models: published sizes, timm's method set, positions, norms, drop path."""

from __future__ import annotations

import itertools
import re

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.models.build import build_model, check_name
from setformer_dist.models.soft import SOFT, resize

# Published sizes in millions of parameters, 1000 classes.
SIZES = {"tiny": 13.07, "small": 24.11, "medium": 45.81, "large": 64.70, "huge": 87.11}
NAMES = [f"soft_{size}{norm}" for size in SIZES for norm in ("", "_norm")]
SMALL = {
    "widths": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "num_classes": 7,
    "soft": {"landmarks": 9},
}


def on_meta(name: str, **kwargs) -> SOFT:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def small(name="soft_tiny", **kwargs) -> SOFT:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def test_names_are_registered_with_timm():
    assert sorted(timm.list_models("soft_*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
def test_published_parameter_counts_to_the_last_digit(name, conv_norm):
    count = sum(p.numel() for p in on_meta(name, conv_norm=conv_norm).parameters())
    assert round(count / 1e6, 2) == SIZES[name.split("_")[1]]


def test_pooling_instead_of_convolving_gives_the_published_size_of_the_ablation():
    count = sum(p.numel() for p in on_meta("soft_tiny", soft={"sampling": "pool"}).parameters())
    assert round(count / 1e6, 2) == 12.96


@pytest.mark.parametrize("name", NAMES)
def test_variants_differ_in_the_normalisation_alone(name):
    model = on_meta(name)
    kinds = [type(stage.blocks[0].attn).__name__ for stage in model.stages]
    assert kinds == ["SoftAttention"] * 3 + ["SoftmaxAttention"]
    assert all(stage.blocks[0].attn.normalise == name.endswith("_norm") for stage in model.stages[:3])
    assert [stage.blocks[0].attn.landmark_conv.stride[0] for stage in model.stages[:3]] == [8, 4, 2]
    assert model.config.soft.landmarks == 49


@pytest.mark.parametrize(
    ("name", "size"), [("soft_tiny", (224, 224)), *[(name, (45, 77)) for name in ("soft_tiny_norm", "soft_huge")]]
)
def test_shapes(name, size):
    model = on_meta(name, num_classes=11).eval()
    image = torch.empty(2, 3, *size, device="meta")
    features = model.forward_features(image)
    assert features.shape == (2, 1 + -(-size[0] // 32) * -(-size[1] // 32), model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model(image).shape == (2, 11)


@pytest.mark.parametrize("name", ["soft_tiny", "soft_tiny_norm"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 70), (64, 96)])
def test_any_size_trains_finitely(name, size):
    model = small(name)
    output, grads = step(model, torch.randn(2, 3, *size))
    assert output.shape == (2, 7)
    assert torch.isfinite(output).all()
    for parameter, grad in grads.items():
        assert torch.isfinite(grad).all(), parameter


def test_every_parameter_gets_a_gradient():
    for kwargs in ({}, {"soft": {"landmarks": 9, "sampling": "pool"}}, {"attention": "soft_norm"}):
        _, grads = step(small(**kwargs), torch.randn(2, 3, 96, 96))
        for name, grad in grads.items():
            assert grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["soft_tiny", "soft_small_norm"])
def test_pretrained_cfg_names_real_layers(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    _, maps = model.forward_intermediates(torch.empty(1, *cfg["input_size"], device="meta"))
    assert maps[-1].shape[-2:] == cfg["pool_size"]


@pytest.mark.parametrize("name", ["soft_tiny", "soft_medium_norm"])
@pytest.mark.parametrize("out_indices", [None, (0, 2), (-1,)])
def test_features_only(name, out_indices):
    kwargs = {} if out_indices is None else {"out_indices": out_indices}
    model = on_meta(name, features_only=True, **kwargs).eval()
    assert isinstance(model, FeatureGetterNet)
    outputs = model(torch.empty(1, 3, 97, 64, device="meta"))
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(outputs) == len(channels)
    for y, width, reduction in zip(outputs, channels, reductions, strict=True):
        assert y.shape == (1, width, -(-97 // reduction), -(-64 // reduction))


def test_features_only_drops_what_it_does_not_need_and_keeps_the_values():
    whole, pruned = small().eval(), small(features_only=True, out_indices=(0, 1)).eval()
    image = torch.randn(2, 3, 40, 40)
    _, intermediates = whole.forward_intermediates(image)
    for ours, theirs in zip(pruned(image), intermediates, strict=False):
        torch.testing.assert_close(ours, theirs)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())


def test_forward_intermediates_agrees_with_forward_features():
    model = small().eval()
    image = torch.randn(2, 3, 50, 70)
    final, intermediates = model.forward_intermediates(image, norm=True, output_fmt="NHWC")
    torch.testing.assert_close(final, model.forward_features(image))
    torch.testing.assert_close(intermediates[-1].flatten(1, 2), final[:, 1:])
    assert [y.shape[-1] for y in intermediates] == [info["num_chs"] for info in model.feature_info]
    early = model.forward_intermediates(image, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0].permute(0, 2, 3, 1), intermediates[1])


def test_reset_classifier_and_pooling():
    model = small().eval()
    image = torch.randn(2, 3, 40, 40)
    features = model.forward_features(image)
    model.reset_classifier(3)
    torch.testing.assert_close(model(image), model.get_classifier()(features[:, 0]))
    assert model(image).shape == (2, 3)
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model(image), model.get_classifier()(features[:, 1:].mean(1)))
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(image).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image), features)
    assert small(num_classes=0, global_pool="")(image).shape == features.shape
    assert small(in_chans=1)(torch.randn(2, 1, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"soft": {"landmark": 9}}, "did you mean soft.landmarks"),
        ({"soft": {"landmarks": 10}}, "10 is not a square: use 9 or 16"),
        ({"soft": {"conv_stride": (8, 4)}}, "soft.conv_stride (8, 4) must be one number, or one for each of 4 stages"),
        ({"num_heads": (3, 4, 10, 16)}, "3 heads do not divide a stage of 64 channels"),
        ({"depths": (1, 1)}, "must give one positive number per stage"),
        ({"conv_norm": "group"}, "'layer' or 'batch'"),
        ({"attention": "softmax"}, "'soft' or 'soft_norm'"),
        ({"embed_dim": 32}, "unknown key 'embed_dim'"),
    ],
)
def test_impossible_shapes_are_refused_with_the_repair(kwargs, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        timm.create_model("soft_tiny", **kwargs)


def test_built_from_the_model_table_layer_norm_runs_and_batch_norm_is_refused():
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
    del args["num_classes"]
    model = build_model(ModelConfig(name="soft_tiny_norm", args=args), 5, 32, seed=1)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ConfigError, match="running statistics"):
        build_model(ModelConfig(name="soft_tiny", args={**args, "conv_norm": "batch"}), 5, 32, seed=1)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean soft_small_norm"):
        check_name("soft_smal_norm")


# ------------------------------------------------------------------------------------------------------- positions


def test_positions_are_added_as_they_are_at_224_and_interpolated_elsewhere():
    position = torch.randn(1, 7, 7, 3)
    assert resize(position, (7, 7)) is position
    rows = torch.linspace(0, 1, 7).view(1, 7, 1, 1).expand(1, 7, 7, 1)
    resized = resize(rows, (21, 4))
    assert resized.shape == (1, 21, 4, 1)
    torch.testing.assert_close(
        resized[0, 1:-1, :, 0], ((torch.arange(21) + 0.5) / 3 - 0.5)[1:-1, None].expand(19, 4) / 6
    )


def test_positions_alone_tell_the_tokens_of_a_plain_image_apart():
    """Far from the border, where the padding of the convolutions does not reach."""
    model = small().eval()
    image = torch.ones(1, 3, 96, 96)

    def inner_tokens():
        return model.forward_intermediates(image, indices=[0], intermediates_only=True)[0][0, :, 10:14, 10:14].flatten(
            1
        )

    with torch.no_grad():
        assert inner_tokens().std(1).max() > 1e-3
        model.stages[0].position.zero_()
        assert inner_tokens().std(1).max() < 1e-5


# --------------------------------------------------------------------------------------- training: groups, recompute


def step(model: SOFT, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(image)
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_no_weight_decay_names_all_but_the_matrices():
    model = small()
    exempt = model.no_weight_decay()
    assert exempt <= {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        special = name.endswith(("position", "class_token")) or parameter.ndim == 1
        assert (name in exempt) == special, name


@pytest.mark.parametrize("name", ["soft_tiny", "soft_huge_norm"])
def test_group_matcher_covers_every_parameter_in_order_of_depth(name):
    model = on_meta(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    by_parameter = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scale = {n: by_parameter[id(p)] for n, p in model.named_parameters()}
    order = [
        scale[f"stages.{i}.blocks.{j}.mlp.fc1.weight"] for i, d in enumerate(model.config.depths) for j in range(d)
    ]
    assert all(a < b for a, b in itertools.pairwise(order))
    assert scale["stem.0.conv.weight"] < order[0]
    assert scale["stages.3.class_token"] <= order[-1]
    assert scale["norm.weight"] == order[-1] < scale["head.weight"] == 1.0


@pytest.mark.parametrize("keyed", [True, False])
def test_activation_checkpointing_changes_neither_output_nor_gradient(keyed):
    model = small(drop_path_rate=0.5).train()
    model.set_sample_keys(torch.arange(4) if keyed else None)
    image = torch.randn(4, 3, 32, 32)
    torch.manual_seed(5)
    output, grads = step(model, image)
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    again, grads_again = step(model, image)
    torch.testing.assert_close(output, again, atol=0, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], atol=1e-6, rtol=1e-5, msg=name)


def test_drop_path_is_a_function_of_the_sample_not_of_the_batch():
    model = small(drop_path_rate=0.6).train()
    images, keys = torch.randn(6, 3, 32, 32), torch.randint(-(2**62), 2**62, (6,))
    model.set_sample_keys(keys)
    whole = model(images)
    order = torch.tensor([5, 0, 2, 1, 4, 3])
    parts = []
    for index in order.split(4):
        model.set_sample_keys(keys[index])
        parts.append(model(images[index]))
    torch.testing.assert_close(torch.cat(parts), whole[order], atol=1e-5, rtol=1e-4)
    model.set_sample_keys(keys + 1)
    assert not torch.allclose(model(images), whole, atol=1e-3)


def test_layer_norm_keeps_no_statistics_and_batch_norm_is_the_published_stem():
    assert [name for name, _ in small().named_buffers()] == ["drop_path.bits"]
    image = torch.randn(4, 3, 32, 32)
    model = small(conv_norm="batch").train()
    published = model.stem(image.permute(0, 2, 3, 1))
    expected = image
    for layer in model.stem:
        convolved = layer.conv(expected)
        expected = F.relu(F.batch_norm(convolved, None, None, layer.norm.weight, layer.norm.bias, training=True))
    torch.testing.assert_close(published.permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["soft_tiny", "soft_tiny_norm"])
def test_bf16_module_and_autocast_train_finitely(name):
    model = small(name)
    image = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, grads = step(model, image)
    rounded, rounded_grads = step(model.bfloat16(), image.bfloat16())
    assert rounded.dtype == torch.bfloat16
    for y in (mixed, rounded, *grads.values(), *rounded_grads.values()):
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", ["soft_tiny", "soft_tiny_norm"])
def test_a_few_steps_learn_a_batch_by_heart(name):
    model = small(name).train()
    images, labels = torch.randn(14, 3, 32, 32), torch.arange(14) % 7
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.5

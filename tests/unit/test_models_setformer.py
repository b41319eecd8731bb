"""All registered SeTformers: shapes, timm's method set, sizes, costs, drop path, numerics of a step."""

from __future__ import annotations

import itertools
import re

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.core.errors import ConfigError
from setformer_dist.models import cost
from setformer_dist.models.build import check_name
from setformer_dist.models.layers import keyed_uniform
from setformer_dist.models.setformer import SeTformer
from setformer_dist.ops.set.attention import SetAttentionConfig

NAMES = ["setformer_nano", "setformer_mini", "setformer_tiny", "setformer_small", "setformer_base"]
# Published sizes in millions of parameters, 1000 classes (Mini, Tiny, Base; Small is the one that fits best).
SIZES = {"setformer_mini": 16.4, "setformer_tiny": 22.7, "setformer_small": 35.5, "setformer_base": 57.15}
KINDS = ["set", "soft", "soft_norm", "cast", "softmax"]
# A small model of three stages for what does not depend on size.
SMALL = {"embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 4), "num_classes": 7}


def on_meta(name: str, **kwargs) -> SeTformer:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def small(**kwargs) -> SeTformer:
    torch.manual_seed(0)
    return timm.create_model("setformer_nano", **{**SMALL, **kwargs})


def test_names_are_registered_with_timm():
    assert sorted(timm.list_models("setformer*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_even_and_odd_sizes(name):
    model = on_meta(name, num_classes=11).eval()
    reduction = model.config.reductions[-1]
    for size in [(32, 32), (45, 77)]:
        image = torch.empty(2, 3, *size, device="meta")
        features = model.forward_features(image)
        assert features.shape == (2, -(-size[0] // reduction), -(-size[1] // reduction), model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        assert model(image).shape == (2, 11)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 33), (37, 23)])
def test_any_size_runs_and_is_finite(size, attention):
    output = small(attention=attention)(torch.randn(2, 3, *size))
    assert output.shape == (2, 7)
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg_names_real_layers(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert cfg["num_classes"] == model.num_classes
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape[1:3] == cfg["pool_size"]


@pytest.mark.parametrize(
    ("name", "attention", "out_indices"),
    [*[(name, "set", None) for name in NAMES], *itertools.product(["setformer_nano"], KINDS, [(0, 2), (-1,)])],
)
def test_features_only(name, attention, out_indices):
    kwargs = {"attention": attention, **({} if out_indices is None else {"out_indices": out_indices})}
    model = on_meta(name, features_only=True, **kwargs).eval()
    assert isinstance(model, FeatureGetterNet)
    outputs = model(torch.empty(1, 3, 97, 64, device="meta"))
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(outputs) == len(channels)
    for y, width, reduction in zip(outputs, channels, reductions, strict=True):
        assert y.shape == (1, width, -(-97 // reduction), -(-64 // reduction))


def test_features_only_drops_what_it_does_not_need_and_keeps_the_values():
    whole, pruned = small().eval(), small(features_only=True, out_indices=(0, 1)).eval()
    image = torch.randn(2, 3, 20, 20)
    _, intermediates = whole.forward_intermediates(image)
    for ours, theirs in zip(pruned(image), intermediates, strict=False):
        torch.testing.assert_close(ours, theirs)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters()) / 2


@pytest.mark.parametrize("attention", KINDS)
def test_forward_intermediates_agrees_with_forward_features(attention):
    model = small(attention=attention).eval()
    image = torch.randn(2, 3, 19, 26)
    final, intermediates = model.forward_intermediates(image, norm=True, output_fmt="NHWC")
    torch.testing.assert_close(final, model.forward_features(image))
    torch.testing.assert_close(intermediates[-1], final)
    assert [y.shape[-1] for y in intermediates] == [info["num_chs"] for info in model.feature_info]
    early = model.forward_intermediates(image, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0].permute(0, 2, 3, 1), intermediates[1])
    assert len(model.forward_intermediates(image, indices=2, intermediates_only=True)) == 2


def test_reset_classifier():
    model = small().eval()
    image = torch.randn(2, 3, 16, 16)
    model.reset_classifier(3)
    assert (model.num_classes, model.get_classifier().out_features) == (3, 3)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(image).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image), model.forward_features(image))


def test_created_without_classifier_or_pooling_and_with_other_channels():
    assert small(num_classes=0)(torch.randn(2, 3, 16, 16)).shape == (2, 64)
    assert small(num_classes=0, global_pool="")(torch.randn(2, 3, 16, 16)).shape == (2, 2, 2, 64)
    assert small(in_chans=1)(torch.randn(2, 1, 16, 16)).shape == (2, 7)


def test_overrides_reach_the_layers():
    model = timm.create_model(
        "setformer_nano",
        stem_strides=[1, 2],
        attn={"epsilon": 0.2, "references": 9},
        drop_path_rate=0.1,
        num_classes=10,
        embed_dim=32,
        depths=[1, 1],
        num_heads=[2, 4],
        mlp_ratio=4,
    )
    attention = model.stages[1].blocks[0].attn
    assert (attention.config.epsilon, attention.config.references) == (0.2, 9)
    assert attention.references.shape == (4, 9, 16)
    assert model.stages[0].blocks[0].mlp.fc1.out_features == 128
    assert model.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 4, 4, 64)
    assert max(model.drop_path.rates) == 0.1


@pytest.mark.parametrize("references", [(9, 4, 1), [9, 4, 1]])
def test_references_by_stage(references):
    model = small(attn={"references": references})
    assert [stage.blocks[0].attn.references.shape[1] for stage in model.stages] == [9, 4, 1]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_attention_config_object_changes_only_what_it_sets():
    by_object = small(attn=SetAttentionConfig(epsilon=0.3)).config
    assert by_object == small(attn={"epsilon": 0.3}).config
    assert by_object.attn.references == small().config.attn.references


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_chosen_by_name_with_its_table(kind):
    tables = {"soft": {"landmarks": (9, 4, 1)}, "cast": {"clusters": (6, 3, 2), "size": 5}}
    model = small(attention=kind, **tables)
    attentions = [stage.blocks[0].attn for stage in model.stages]
    assert {type(attention).__name__.lower() for attention in attentions} == {f"{kind.removesuffix('_norm')}attention"}
    if kind in ("soft", "soft_norm"):
        assert [attention.landmarks for attention in attentions] == [9, 4, 1]
    if kind == "cast":
        assert [attention.surrogates.shape[1] for attention in attentions] == [6, 3, 2]


@pytest.mark.parametrize("name", ["setformer_mini", "setformer_tiny", "setformer_small", "setformer_base"])
def test_registered_shapes_give_cast_the_square_root_of_the_tokens_at_224(name):
    model = on_meta(name, attention="cast")
    clusters = [stage.blocks[0].attn.surrogates.shape[1] for stage in model.stages]
    assert [c * c for c in clusters] == [(224 // reduction) ** 2 for reduction in model.config.reductions]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention": "sofd"}, "'set', 'soft', 'soft_norm', 'cast' or 'softmax'"),
        ({"attention": "soft", "soft": {"landmarks": 50}}, "50 is not a square: use 49 or 64"),
        ({"attention": "cast", "cast": {"clusters": (4, 2)}}, "cast.clusters (4, 2) must be one number, or one for"),
        ({"attention": "soft", "soft": {"landmark": 9}}, "did you mean soft.landmarks"),
        ({"attn": {"reference": 9}}, "did you mean attn.references"),
        ({"attn": {"references": 10}}, "not a square: use 9 or 16"),
        ({"attn": {"references": (16, 9)}}, "must be one number, or one for each of 3 stages"),
        ({"attn": {"references": 0}}, "must be at least 1"),
        ({"attn": {"anchors": 4}}, "anchors = 4 has no use with kernel = 'similarity'"),
        ({"attn": {"kernel": "linear"}}, "attn.kernel"),
        ({"embed_dims": 32}, "did you mean embed_dim"),
        ({"num_heads": (5, 2, 4)}, "5 heads do not divide a stage of 48 channels"),
        ({"depths": (1, 1)}, "one positive number per stage"),
        ({"stem_strides": (2,)}, "must be two positive numbers"),
        ({"embed_dim": 33}, "must be even"),
    ],
)
def test_impossible_shapes_are_refused_with_the_repair(kwargs, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        timm.create_model("setformer_nano", **kwargs)


# --------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", list(SIZES))
def test_published_parameter_counts(name):
    count = sum(p.numel() for p in on_meta(name, num_classes=1000).parameters())
    assert count == pytest.approx(SIZES[name] * 1e6, rel=0.01)


def test_base_multiply_adds_at_224():
    assert cost.multiply_adds(on_meta("setformer_base").config, 224, 224) == pytest.approx(10.4e9, rel=0.05)


SHAPES = [
    {},
    {"attn": {"kernel": "nystrom", "anchors": 3, "reference_sets": 1}},
    {"attn": {"kernel": "gaussian", "position_filter": "none", "references": 10}},
    {"layer_scale": 1e-3, "stem_strides": (1, 3), "in_chans": 4, "mlp_ratio": 2.5},
    {"attention": "soft"},
    {"attention": "soft_norm", "soft": {"landmarks": (9, 4, 1), "iterations": 7, "ridge": 0.01}},
    {"attention": "soft", "soft": {"sampling": "conv", "conv_stride": (3, 2, 1), "value_conv": (5, 3, 0)}},
    {"attention": "cast"},
    {"attention": "cast", "cast": {"clusters": 5, "size": (70, 11, 9), "assignment": "top_k", "gate": False}},
    {"attention": "cast", "cast": {"assignment": "single"}},
    {"attention": "softmax"},
]


@pytest.mark.parametrize(
    "model", [*[on_meta(name) for name in NAMES], *[small(**kwargs) for kwargs in SHAPES]], ids=lambda m: ""
)
def test_parameters_equal_the_formula(model):
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        *[(name, {}, (64, 96)) for name in NAMES],
        ("setformer_base", {}, (224, 224)),
        *[("setformer_nano", kwargs, (33, 50)) for kwargs in SHAPES],
    ],
)
def test_counted_multiply_adds_equal_the_formula(name, kwargs, size):
    model = on_meta(name, **kwargs).eval()
    image = torch.empty(1, model.in_chans, *size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() / 2 == pytest.approx(cost.multiply_adds(model.config, *size), rel=0.02)


@pytest.mark.parametrize("epsilon", [0.01, 0.1])
def test_rounds_are_counted_whatever_way_epsilon_makes_them_go(epsilon):
    """With a small epsilon the rounds are sums of exponentials, not products; a term of them counts as much."""
    model = on_meta("setformer_nano", attn={"epsilon": epsilon, "iterations": 50}).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(cost.multiply_adds(model.config, 32, 32), rel=0.02)


# ----------------------------------------------------------------------------------- optimizer groups, checkpoints


@pytest.mark.parametrize("kwargs", SHAPES)
def test_no_weight_decay_names_all_but_the_matrices(kwargs):
    model = small(**kwargs)
    names = {name for name, _ in model.named_parameters()}
    exempt = model.no_weight_decay()
    assert exempt <= names
    for name, parameter in model.named_parameters():
        special = name.endswith(("references", "anchors", "surrogates")) or parameter.ndim == 1
        assert (name in exempt) == special, name


@pytest.mark.parametrize("name", NAMES)
def test_group_matcher_covers_every_parameter_in_order_of_depth(name):
    model = on_meta(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    by_parameter = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scale = {n: by_parameter[id(p)] for n, p in model.named_parameters()}
    depths = model.config.depths
    order = [scale[f"stages.{i}.blocks.{j}.attn.references"] for i, d in enumerate(depths) for j in range(d)]
    assert all(a < b for a, b in itertools.pairwise(order))
    assert scale["stem.conv1.weight"] < order[0]
    assert scale["norm.weight"] == order[-1] < scale["head.fc.weight"] == 1.0
    assert len(timm.models.group_parameters(model, model.group_matcher(coarse=True))) >= len(depths) + 1


def step(model: SeTformer, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(image)
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("attention", KINDS)
def test_activation_checkpointing_changes_neither_output_nor_gradient(keyed, attention):
    model = small(drop_path_rate=0.5, attention=attention).train()
    model.set_sample_keys(torch.arange(4) if keyed else None)
    image = torch.randn(4, 3, 16, 16)
    torch.manual_seed(5)
    output, grads = step(model, image)
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    again, grads_again = step(model, image)
    torch.testing.assert_close(output, again, atol=0, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_keeps_the_draw_of_the_first_pass_when_the_keys_change_before_backward():
    model = small(drop_path_rate=0.5).train()
    image = torch.randn(4, 3, 16, 16)
    model.set_sample_keys(torch.arange(4))
    _, grads = step(model, image)
    model.set_grad_checkpointing()
    model.zero_grad()
    output = model(image)
    model.set_sample_keys(torch.arange(4) + 1000)
    output.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_every_parameter_gets_a_gradient():
    for kwargs in SHAPES:
        model = small(**kwargs)
        _, grads = step(model, torch.randn(2, model.in_chans, 24, 24))
        for name, grad in grads.items():
            assert torch.isfinite(grad).all(), name
            assert grad.abs().max() > 0, name


def test_the_model_saves_no_buffers_and_has_no_batch_norm():
    model = small()
    assert [name for name, _ in model.named_buffers()] == ["drop_path.bits"]
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    rates = torch.tensor(model.drop_path.rates)
    assert torch.equal(model.bfloat16().drop_path.bits.view(torch.float32), rates)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_weights_are_a_function_of_the_generator_state():
    first, second = small().state_dict(), small().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------ drop path


def test_drop_path_is_a_function_of_the_sample_not_of_the_batch():
    model = small(drop_path_rate=0.6).train()
    images, keys = torch.randn(8, 3, 16, 16), torch.randint(-(2**62), 2**62, (8,))
    model.set_sample_keys(keys)
    whole = model(images)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    parts = []
    for index in order.split(3):
        model.set_sample_keys(keys[index])
        parts.append(model(images[index]))
    torch.testing.assert_close(torch.cat(parts), whole[order], atol=1e-5, rtol=1e-5)
    model.set_sample_keys(keys + 1)
    assert not torch.allclose(model(images), whole, atol=1e-3)


def test_drop_path_drops_the_given_share_and_keeps_the_mean():
    model = small(drop_path_rate=0.4).train()
    model.set_sample_keys(torch.arange(20_000))
    factors = model.drop_path(20_000, torch.device("cpu"), torch.float32)
    assert factors.shape == (8, 20_000)
    dropped = (factors == 0).float().mean(1)
    expected = torch.tensor(model.drop_path.rates)
    assert (dropped - expected).abs().max() < 0.015
    torch.testing.assert_close(factors.mean(1), torch.ones(8), atol=0.03, rtol=0)
    together = ((factors[-1] == 0) & (factors[-2] == 0)).float().mean()
    assert together == pytest.approx(0.16, abs=0.015)  # branches are independent


def test_keyed_uniform_is_uniform_and_mixes_neighbouring_keys():
    u = keyed_uniform(torch.arange(-20_000, 20_000), 2)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.histc(u, bins=20, min=0, max=1) / u.numel()
    assert (histogram - 0.05).abs().max() < 0.003
    assert torch.corrcoef(torch.stack([u[0, :-1], u[0, 1:], u[1, :-1]])).triu(1).abs().max() < 0.02


def test_drop_path_is_off_in_evaluation_and_refuses_keys_of_another_batch():
    model = small(drop_path_rate=0.5)
    model.set_sample_keys(torch.arange(3))
    image = torch.randn(2, 3, 16, 16)
    model.eval()
    torch.testing.assert_close(model(image), model(image))
    model.train()
    with pytest.raises(ConfigError, match="3 sample keys were set for a batch of 2"):
        model(image)


# --------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    "kwargs",
    [
        *[{"attn": {"kernel": kernel}} for kernel in ("similarity", "gaussian", "nystrom")],
        *[{"attention": kind} for kind in ("soft", "soft_norm", "softmax")],
    ],
)
def test_bf16_module_and_autocast_train_finitely_and_stay_close_to_fp32(kwargs):
    model = small(**kwargs, drop_path_rate=0.2)
    model.set_sample_keys(torch.arange(4))
    image = torch.randn(4, 3, 16, 16)
    exact, _ = step(model, image)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, grads = step(model, image)
    rounded, rounded_grads = step(model.bfloat16(), image.bfloat16())
    assert rounded.dtype == torch.bfloat16
    for output in (mixed, rounded):
        assert (output.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02
    assert all(torch.isfinite(g).all() for g in [*grads.values(), *rounded_grads.values()])


@pytest.mark.parametrize("attention", KINDS)
def test_a_few_steps_learn_a_batch_by_heart(attention):
    shape = {"depths": (1, 1), "num_heads": (1, 2), "stem_strides": (2, 2), "cast": {"clusters": 4}}
    model = small(**shape, attention=attention).train()
    images, labels = torch.randn(14, 3, 16, 16), torch.arange(14) % 7
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(50):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.7
    assert losses[-1] < 0.3


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no model 'setformer_tinny': did you mean setformer_tiny\?"):
        check_name("setformer_tinny")

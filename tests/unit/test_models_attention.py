"""The one interface of all attentions: images and sequences, masks, configs, gradients, ZeRO's and timm's needs."""

from __future__ import annotations

import pydantic
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.models.attention import (
    AttentionConfig,
    CastAttention,
    CastAttentionConfig,
    SetAttention,
    SoftAttention,
    SoftAttentionConfig,
    SoftmaxAttention,
    make_attention,
    split_heads,
)
from setformer_dist.models.reference_sets import watched_marginals
from setformer_dist.ops.set.attention import marginal_error

# Every kind on a grid, with each of its ways to go; sequences take those without a convolution or a 2-D filter.
GRID = {
    "set": {"kind": "set", "attn": {"references": 4}},
    "soft": {"kind": "soft", "soft": {"landmarks": 9}},
    "soft conv": {"kind": "soft", "soft": {"landmarks": 4, "sampling": "conv", "conv_stride": 2, "value_conv": 3}},
    "soft_norm": {"kind": "soft_norm", "soft": {"landmarks": 9, "ridge": 0.01}},
    "cast": {"kind": "cast", "cast": {"clusters": 4}},
    "cast single": {"kind": "cast", "cast": {"clusters": 4, "assignment": "single", "gate": False}},
    "softmax": {"kind": "softmax"},
}
SEQUENCE = {
    **{name: table for name, table in GRID.items() if name not in ("set", "soft conv")},
    "set": {"kind": "set", "attn": {"references": 5, "position_filter": "linear"}},
    "cast of a given size": {"kind": "cast", "cast": {"clusters": 3, "size": 4}},
}


def module(table: dict, dim: int = 8, heads: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return make_attention(AttentionConfig.model_validate(table), dim, heads).double()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("set", SetAttention),
        ("soft", SoftAttention),
        ("soft_norm", SoftAttention),
        ("cast", CastAttention),
        ("softmax", SoftmaxAttention),
    ],
)
def test_the_config_names_the_module(kind, expected):
    built = make_attention(AttentionConfig(kind=kind), 8, 2)
    assert type(built) is expected
    assert getattr(built, "normalise", False) == (kind == "soft_norm")


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (1, 1), (1, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_grids_of_any_size_train_every_parameter(name, grid, masked):
    attention = module(GRID[name])
    n = grid[0] * grid[1]
    x = torch.randn(2, n, 8).double().requires_grad_()
    mask = torch.rand(2, n) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    y = attention(x, grid, mask)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    for parameter, value in attention.named_parameters():
        assert value.grad is not None, parameter
        assert torch.isfinite(value.grad).all(), parameter
        if n > 9 and not masked:
            assert value.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", SEQUENCE)
def test_a_padded_sequence_gives_what_it_gives_alone(name):
    table = SEQUENCE[name]
    if table["kind"] == "cast" and not table["cast"].get("size"):
        table = {**table, "cast": {**table["cast"], "size": 5}}  # otherwise the size follows the padded length
    attention = module(table)
    x = torch.randn(3, 17, 8).double()
    lengths = torch.tensor([17, 11, 1])
    mask = torch.arange(17) < lengths.unsqueeze(1)
    poisoned = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    y = attention(poisoned, None, mask)
    for sample, length in enumerate(lengths):
        alone = attention(x[sample : sample + 1, :length])
        torch.testing.assert_close(y[sample : sample + 1, :length], alone, atol=1e-8, rtol=1e-6)
    constant = y[~mask]
    torch.testing.assert_close(constant, attention.output.bias.expand_as(constant))
    y.square().sum().backward()
    assert torch.isfinite(poisoned.grad[mask]).all()


@pytest.mark.parametrize("name", SEQUENCE)
def test_a_sequence_without_any_valid_token_is_finite(name):
    attention = module(SEQUENCE[name])
    x = torch.randn(2, 9, 8).double().requires_grad_()
    y = attention(x, None, torch.tensor([[True] * 9, [False] * 9]))
    torch.testing.assert_close(y[1], attention.output.bias.expand(9, -1))
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", GRID)
def test_samples_do_not_see_each_other(name):
    attention = module(GRID[name])
    x = torch.randn(3, 20, 8).double() * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    whole = attention(x, (4, 5))
    for sample in range(3):
        torch.testing.assert_close(attention(x[sample : sample + 1], (4, 5)), whole[sample : sample + 1])


def test_softmax_is_torchs_multi_head_attention():
    attention = module({"kind": "softmax"})
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.output.weight,
            "out_proj.bias": attention.output.bias,
        }
    )
    x, mask = torch.randn(2, 7, 8).double(), torch.arange(7) < torch.tensor([[7], [4]])
    expected, _ = theirs(x, x, x, key_padding_mask=~mask)
    torch.testing.assert_close(attention(x, None, mask)[mask], expected[mask])


def test_convolved_landmarks_are_those_of_the_published_code():
    """On a grid of stride * sqrt(m): convolution per head of divided queries, norm, GELU; then undivided as queries."""
    attention = module({"kind": "soft", "soft": {"landmarks": 9, "sampling": "conv", "conv_stride": 2}})
    q_bhnd = torch.randn(2, 2, 36, 4).double()
    landmarks, mask = attention._landmarks(q_bhnd, (6, 6), None)
    image = q_bhnd.reshape(4, 6, 6, 4).permute(0, 3, 1, 2)
    convolved = F.conv2d(image / 4**0.25, attention.landmark_conv.weight, stride=2).flatten(2).mT
    expected = F.gelu(F.layer_norm(convolved, (4,))).view(2, 2, 9, 4)
    torch.testing.assert_close(landmarks, expected * 4**0.25)
    assert mask is None


@pytest.mark.parametrize("name", GRID)
def test_compiles_into_one_graph(name):
    attention = module(GRID[name]).float()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    x = torch.randn(2, 36, 8)
    torch.testing.assert_close(compiled(x, (6, 6)), attention(x, (6, 6)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", GRID)
def test_bf16_and_autocast(name):
    attention = module(GRID[name]).float()
    x = torch.randn(2, 36, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(x, (6, 6))
    rounded = attention.bfloat16()(x.bfloat16(), (6, 6))
    assert mixed.dtype == rounded.dtype == torch.bfloat16
    rounded.float().square().sum().backward()
    for y in (mixed, rounded, *(p.grad for p in attention.parameters())):
        assert torch.isfinite(y).all()


# ---------------------------------------------------------------------------------------------------------- configs


def test_choices_by_stage():
    config = AttentionConfig(
        soft=SoftAttentionConfig(landmarks=(9, 4), sampling="conv", conv_stride=(4, 2), value_conv=(5, 0)),
        cast=CastAttentionConfig(clusters=(8, 4), size=(3, 0)),
    )
    second = make_attention(config.model_copy(update={"kind": "soft"}), 8, 2, stage=1)
    assert (second.landmarks, second.landmark_conv.stride, second.value_conv) == (4, (2, 2), None)
    cast = make_attention(config.model_copy(update={"kind": "cast"}), 8, 2, stage=1)
    assert cast.surrogates.shape == (2, 4, 4)
    assert [config.cast.of_stage(i).size_for(17) for i in (0, 1)] == [3, 5]
    assert config.cast.of_stage(0).size_for(2) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"soft": {"landmarks": 0}}, "landmarks = 0 must be at least 1"),
        ({"soft": {"value_conv": 4}}, "value_conv = 4 must be odd"),
        ({"soft": {"conv_stride": [4, 0]}}, "conv_stride = 0 must be at least 1"),
        ({"soft": {"iterations": 0}}, "greater than or equal to 1"),
        ({"soft": {"ridge": -1.0}}, "greater than or equal to 0"),
        ({"cast": {"clusters": 0}}, "clusters = 0 must be at least 1"),
        ({"cast": {"size": -1}}, "size = -1 must be at least 0"),
        ({"cast": {"assignment": "greedy"}}, "'top_k' or 'single'"),
        ({"kind": "linear"}, "'set', 'soft', 'soft_norm', 'cast' or 'softmax'"),
    ],
)
def test_impossible_choices_are_refused(table, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        AttentionConfig.model_validate(table)


def test_what_does_not_suit_the_tokens_is_refused_with_the_repair():
    x = torch.randn(1, 12, 8).double()
    with pytest.raises(ConfigError, match=r"no grid was given: for sequences use soft.sampling = 'pool'"):
        module(GRID["soft conv"])(x)
    with pytest.raises(ConfigError, match="10 is not a square: use 9 or 16"):
        module({"kind": "soft", "soft": {"landmarks": 10}})(x, (3, 4))
    assert module({"kind": "soft", "soft": {"landmarks": 10}})(x).shape == x.shape
    with pytest.raises(ConfigError, match="num_heads = 3 does not divide dim = 8"):
        make_attention(AttentionConfig(), 8, 3)


def test_marginal_errors_are_collected_of_every_layer_and_set_while_watched():
    layers = [module(GRID["set"]), module(SEQUENCE["set"]), module(SEQUENCE["softmax"])]
    stack = nn.ModuleList(layers)
    x, mask = torch.randn(3, 12, 8).double(), torch.ones(3, 12, dtype=torch.bool)
    mask[1, 5:] = False

    def run() -> torch.Tensor:
        return layers[2](layers[1](layers[0](x, (3, 4)), mask_bn=mask))

    with torch.no_grad():
        before = run()
        with watched_marginals(stack) as found:
            assert torch.equal(run(), before)  # watching changes nothing
        assert torch.equal(run(), before)
    assert [e.shape for e in found] == [(3, 2), (3, 2)]  # nothing before, nothing after, nothing of softmax
    layer, inner = layers[1], layers[0](x, (3, 4))
    heads = split_heads(layer.input(inner), 2)
    by_set = [
        marginal_error(heads, references, layer.config, mask_bn=mask)
        for references in (layer.references, layer.return_references)
    ]
    assert torch.equal(found[1], torch.maximum(*by_set))
    assert not torch.equal(*by_set)
    assert found[1].min() > 0

"""Encoders of texts: padding and neighbours in a batch change nothing, and hidden tokens are asked for by place."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401 — registers the encoders
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.text_ids import CLS, FIRST, PAD, SEP, most_hidden
from setformer_dist.models.text import Local, MaskedLanguageModel, TextEncoder

KINDS = ("set", "soft", "soft_norm", "cast", "softmax")
V = 60


def encoder(kind: str = "set", **fields: Any) -> TextEncoder:
    """An encoder in fp64 whose parameters are all random."""
    torch.manual_seed(0)
    attention = {"kind": kind, "attn": {"references": 6}, "soft": {"landmarks": 6}, "cast": {"clusters": 3, "size": 8}}
    shape = {"vocabulary": V, "length": 32, "dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("text_mini", **{**shape, "attention": attention, **fields}).double()
    assert isinstance(model, TextEncoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def text(length: int, seed: int = 0, pair: int = 0) -> torch.Tensor:
    """A text of so many tokens, or a pair with the end of the first at `pair`."""
    ids = torch.randint(FIRST, V, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    ids[0], ids[-1] = CLS, SEP
    if pair:
        ids[pair] = SEP
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read_out", ["mean", "first"])
@pytest.mark.parametrize("local", [0, 5])
def test_a_text_alone_padded_and_beside_a_longer_one(kind: str, read_out: str, local: int) -> None:
    model = encoder(kind, read_out=read_out, local=local).eval()
    short, long = text(11), text(29, seed=1)
    alone = model(short[None])
    for width in (12, 20, 32):
        torch.testing.assert_close(model(F.pad(short, (0, width - 11))[None]), alone, atol=1e-12, rtol=1e-12)
    beside = torch.stack([F.pad(short, (0, 18)), long])
    torch.testing.assert_close(model(beside)[:1], alone, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(model(long[None]), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = encoder(kind, local=3).train()
    batch = torch.stack([text(20, pair=8), F.pad(text(9), (0, 11), value=PAD)])
    F.cross_entropy(model(batch), torch.tensor([0, 2])).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_parts_of_a_pair_are_told_apart() -> None:
    model = encoder().eval()
    pair = text(20, pair=8)[None]
    before = model.embedding(pair, None)
    with torch.no_grad():
        model.embedding.part[1] += 1.0
    changed = (model.embedding(pair, None) - before).abs().amax(dim=2)[0] > 0
    assert changed.tolist() == [False] * 9 + [True] * 11


def test_a_softmax_encoder_is_torchs_own() -> None:
    """torch.nn.TransformerEncoder with the same weights, its norms before its branches."""
    model = encoder("softmax").eval()
    layer = nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", norm_first=True, batch_first=True, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32, dtype=torch.float64), enable_nested_tensor=False)
    names = {
        "norm1": "norm1", "norm2": "norm2", "fc1": "linear1", "fc2": "linear2", "attn.output": "self_attn.out_proj",
    }  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("norm."):
            state[name] = value
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            inner = f"self_attn.in_proj_{kind}" if module == "attn.qkv" else f"{names[module]}.{kind}"
            state[f"layers.{number}.{inner}"] = value
    theirs.load_state_dict(state)
    ids = torch.stack([text(17), F.pad(text(12, seed=3), (0, 5))])
    found, valid = model.forward_tokens(ids)
    assert valid is not None
    expected = theirs.eval()(model.embedding(ids, None), src_key_padding_mask=~valid)
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_local_is_torchs_depthwise_convolution(width: int) -> None:
    local, x = Local(16, width).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    mask = torch.arange(11) < torch.tensor([[11], [6]])
    weight = local.weight.t().unsqueeze(1)
    expected = F.conv1d((x * mask.unsqueeze(2)).transpose(1, 2), weight, padding="same", groups=16).transpose(1, 2)
    torch.testing.assert_close(local(x, mask), expected, atol=1e-14, rtol=1e-12)
    whole = F.conv1d(x.transpose(1, 2), weight, padding="same", groups=16).transpose(1, 2)
    torch.testing.assert_close(local(x, None), whole, atol=1e-14, rtol=1e-12)


def test_hidden_tokens_are_named_where_they_are() -> None:
    inner = encoder(num_classes=0)
    model = MaskedLanguageModel(inner, 0.3, 0.15).double()
    with torch.no_grad():
        model.decoder.bias.copy_(torch.randn(V))
    ids = torch.stack([text(20), F.pad(text(9, seed=2), (0, 11))])
    for training, ratio in ((True, 0.3), (False, 0.15)):
        model.train(training)
        inner.embedding.dropout = 0.0
        for block in inner.blocks:
            block.dropout = 0.0  # type: ignore[assignment]
        most = most_hidden(20, ratio)
        places = torch.tensor([[3, 17, 5, 1, 2, 4][:most], [2, 7, 0, 0, 0, 0][:most]])
        inputs = torch.zeros(2, 2, 20, dtype=torch.int32)
        inputs[:, 0], inputs[:, 1, :most] = ids, places
        found = model(inputs)
        assert found.shape == (2, most, V)
        tokens, _ = inner.forward_tokens(ids)
        head = model.decoder
        whole = F.linear(head.norm(F.gelu(head.transform(tokens))), inner.embedding.token.weight, head.bias)
        expected = torch.stack([whole[i][places[i]] for i in range(2)])
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(model(ids), whole[:, :most], atol=1e-12, rtol=1e-12)


def test_what_is_impossible() -> None:
    with pytest.raises(ConfigError, match="odd number"):
        encoder(local=4)
    with pytest.raises(ConfigError, match="depends on padding"):
        encoder(attention={"kind": "cast", "cast": {"size": 0}})
    with pytest.raises(ConfigError, match="do not fit an encoder of texts of 32 tokens"):
        encoder()(torch.ones(1, 33, dtype=torch.int32))
    with pytest.raises(ConfigError, match="task mlm trains encoders of texts"):
        MaskedLanguageModel(nn.Linear(2, 2), 0.15, 0.15)
    with pytest.raises(ConfigError, match="no pretrained weights"):
        timm.create_model("text_base", pretrained=True, vocabulary=9, length=8)

"""What configs of older versions mean: the scale of SOFT's queries, the places of SeT's tokens."""

from __future__ import annotations

import pytest
import torch

from setformer_dist.core import revisions
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.models.attention import SoftAttention, SoftAttentionConfig

CONVOLVES = {"attention": "soft", "soft": {"sampling": "conv"}}


@pytest.mark.parametrize(
    ("name", "args", "soft"),
    [
        ("soft_tiny", {}, {"query_scale": "before"}),
        ("soft_huge_norm", {"soft": {"ridge": 0.01}}, {"ridge": 0.01, "query_scale": "before"}),
        ("soft_tiny", {"soft": {"query_scale": "after"}}, {"query_scale": "after"}),
        ("soft_tiny", {"soft": {"sampling": "pool"}}, {"sampling": "pool"}),
        ("setformer_nano", CONVOLVES, {"sampling": "conv", "query_scale": "before"}),
        ("setformer_nano", {"attention": "soft"}, None),
        ("setformer_nano", {"soft": {"sampling": "conv"}}, {"sampling": "conv"}),
        ("vit_tiny_patch16_224", {}, None),
    ],
)
def test_a_new_config_names_the_scale_where_it_means_something(name, args, soft):
    assert ModelConfig(name=name, args=args).args.get("soft") == soft


def test_a_config_that_does_not_name_it_is_older_and_its_checkpoints_are_identified_as_they_were():
    older = {"name": "soft_tiny", "args": {"widths": [8, 16], "soft": {"ridge": 0.01}}}
    meant = revisions.as_trained(older)
    assert meant["args"]["soft"] == {"ridge": 0.01, "query_scale": "after"}
    assert revisions.unnamed(ModelConfig(**meant).args) == older["args"]
    assert revisions.unnamed(revisions.as_trained({"name": "soft_tiny", "args": {}})["args"]) == {}
    newer = ModelConfig(name="soft_tiny").model_dump()
    assert revisions.as_trained(newer)["args"] == newer["args"] == revisions.unnamed(newer["args"])
    scale, places, _ = revisions.REVISIONS
    assert (revisions.choices_of(newer), revisions.choices_of(older)) == ({scale: "before"}, {scale: "after"})
    assert revisions.choices_of({"name": "setformer_nano", "args": {}}) == {places: "edges"}
    assert revisions.choices_of({"name": "vit_tiny_patch16_224", "args": {}}) == {}
    assert revisions.as_trained({"name": 3}) == {"name": 3}


@pytest.mark.parametrize(
    ("name", "args", "attn"),
    [
        ("setformer_nano", {}, {"places": "centres"}),
        ("setformer_tiny", {"attn": {"tau": 0.5}}, {"tau": 0.5, "places": "centres"}),
        ("setformer_tiny", {"attn": 3}, 3),
        ("setformer_nano", {"attn": {"places": "edges"}}, {"places": "edges"}),
        ("setformer_nano", {"attn": {"position_filter": "none"}}, {"position_filter": "none"}),
        ("setformer_nano", {"attention": "softmax"}, None),
        ("soft_tiny", {}, None),
        ("vit_tiny_patch16_224", {}, None),
    ],
)
def test_a_new_config_names_the_places_where_they_mean_something(name, args, attn):
    assert ModelConfig(name=name, args=args).args.get("attn") == attn


def test_the_places_of_sequences_are_named_likewise():
    args = {"vocabulary": 9, "attention": {"attn": {"tau": 0.5}}}
    new = ModelConfig(name="lra_encoder", args=args).args
    assert new == {"vocabulary": 9, "attention": {"attn": {"tau": 0.5, "places": "centres"}}}
    old = revisions.as_trained({"name": "lra_encoder", "args": args})["args"]
    assert old["attention"]["attn"]["places"] == "edges"
    assert revisions.unnamed(old) == args
    soft = {"attention": {"kind": "soft"}}
    assert ModelConfig(name="lra_encoder", args=soft).args == soft


def test_a_model_of_places_at_edges_is_identified_as_it_was():
    older = {"name": "setformer_nano", "args": {"attn": {"tau": 0.5}}}
    meant = revisions.as_trained(older)
    assert meant["args"]["attn"] == {"tau": 0.5, "places": "edges"}
    assert revisions.unnamed(ModelConfig(**meant).args) == older["args"]
    assert revisions.unnamed(ModelConfig(name="setformer_nano", args={"attn": {"places": "edges"}}).args) == {}


def test_means_of_tokens_do_not_depend_on_it_so_all_that_pools_is_as_it_was():
    torch.manual_seed(0)
    layers = []
    for scale in ("before", "after"):
        torch.manual_seed(0)
        layers.append(SoftAttention(8, 2, SoftAttentionConfig(landmarks=4, query_scale=scale)))
    x = torch.randn(2, 24, 8)
    for grid in ((4, 6), None):
        assert torch.equal(layers[0](x, grid), layers[1](x, grid))


@pytest.mark.parametrize(
    "name", ["setformer_tiny", "setformer_nano", "soft_tiny", "lra_encoder", "vit_tiny_patch16_224"]
)
def test_what_a_config_gets_by_itself_is_not_what_its_user_asked_for(name):
    assert revisions.without_defaults(ModelConfig(name=name).args) == {}
    asked = ModelConfig(name=name, args={"attn": {"places": "edges"}, "depths": [1]}).args
    assert revisions.without_defaults(asked)["depths"] == [1]
    assert revisions.without_defaults({"attn": {"places": "edges"}}) == {"attn": {"places": "edges"}}

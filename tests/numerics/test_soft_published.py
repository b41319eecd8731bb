"""A whole SOFT next to its authors' equations (soft_published.py), in fp64."""

from __future__ import annotations

import pytest
import timm
import torch

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.models.soft import SOFT
from setformer_dist.ops.soft_attention import _step_size
from tests.numerics.soft_published import RIDGE, Published, StepSize, of_the_authors

HEADS = (2, 4, 10, 16)
DEPTHS = (1, 2, 3, 2)


def ours(normalise: bool, *, query_scale: str = "before") -> SOFT:
    torch.manual_seed(0)
    soft = {"ridge": 0.0 if normalise else RIDGE, "query_scale": query_scale}
    name = "soft_tiny_norm" if normalise else "soft_tiny"
    return timm.create_model(name, conv_norm="batch", soft=soft, num_classes=10).double()


def published(model: SOFT, normalise: bool, step_size: StepSize) -> Published:
    weights = model.state_dict()
    return Published(weights, DEPTHS, HEADS, step_size, normalise=normalise, batch_statistics=model.training)


def our_step_size(normalise: bool) -> StepSize:
    return lambda ridged, kernel: _step_size(ridged, halve=normalise)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize(("normalise", "side"), [(False, 64), (True, 96)])
def test_soft_tiny_in_training_mode_is_the_authors(normalise, side):
    """Batch statistics keep the landmarks apart, so the inverse has converged and no step size matters."""
    model = ours(normalise).train()
    image = torch.randn(2, 3, side, side, dtype=torch.float64)
    theirs = published(model, normalise, of_the_authors(normalise)).logits(image)
    assert relative(model(image), theirs) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize(("normalise", "apart"), [(False, 1e-6), (True, 1e-3)])
def test_soft_tiny_in_evaluation_mode_is_the_authors_but_for_unfinished_rounds(normalise, apart):
    """With running statistics that have seen nothing, tokens are all but alike and 20 rounds do not end."""
    model = ours(normalise).eval()
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    logits = model(image)
    same_start = published(model, normalise, our_step_size(normalise)).logits(image)
    assert relative(logits, same_start) < 1e-12
    theirs = published(model, normalise, of_the_authors(normalise)).logits(image)
    assert 1e-12 < relative(logits, theirs) < apart


@torch.no_grad()
@pytest.mark.parametrize("normalise", [False, True])
def test_the_scale_of_older_runs_is_another_function(normalise):
    before, after = ours(normalise).train(), ours(normalise, query_scale="after").train()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    theirs = published(before, normalise, of_the_authors(normalise)).logits(image)
    assert relative(after(image), theirs) > 0.01

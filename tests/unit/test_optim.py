"""Optimizers and schedules: what a config may say, what each schedule is, which parameters each group holds."""

from __future__ import annotations

import math
import re

import pytest
import timm.optim
import torch

from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.engine.config import OptimConfig, ScheduleConfig
from setformer_dist.engine.lamb import Lamb, Part
from setformer_dist.engine.optim import OPTIMIZERS, Schedule, optimizer_of, parameter_groups
from setformer_dist.models.build import build_model

STEPS, WARMUP = 100, 10


def rates(**table: object) -> list[float]:
    """Return the rate at every step of a run with a peak of 1 and a floor of 0.1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = {"steps": STEPS, "warmup_steps": WARMUP, "warmup_lr": 0.0, "min_lr": 0.1, **table}
    schedule = Schedule(optimizer, build(ScheduleConfig, settings, "config"), steps_per_epoch=20)
    return [schedule.apply(step) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("table", "after"),
    [
        ({"name": "cosine"}, lambda k: 0.1 + 0.45 * (1 + math.cos(math.pi * k / 90))),
        ({"name": "linear"}, lambda k: 0.1 + 0.9 * (1 - k / 90)),
        ({"name": "polynomial", "power": 3.0}, lambda k: 0.1 + 0.9 * (1 - k / 90) ** 3),
        ({"name": "step", "drop_steps": 30, "drop_factor": 0.5}, lambda k: 0.5 ** (k // 30)),
        ({"name": "step", "drop_epochs": 2.0}, lambda k: 0.1 ** (k // 40)),
        ({"name": "constant"}, lambda k: 1.0),
        ({"name": "wsd", "decay_steps": 20}, lambda k: 1.0 if k <= 70 else 0.1 + 0.9 * (1 - (k - 70) / 20)),
        ({"name": "wsd", "decay_epochs": 1.0}, lambda k: 1.0 if k <= 70 else 0.1 + 0.9 * (1 - (k - 70) / 20)),
    ],
)
def test_a_schedule_is_its_formula_after_a_linear_warm_up(table: dict[str, object], after: object) -> None:
    assert callable(after)
    found = rates(**table)
    assert found[:WARMUP] == pytest.approx([k / WARMUP for k in range(WARMUP)])
    assert found[WARMUP:] == pytest.approx([after(k) for k in range(STEPS - WARMUP)])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "cosine", "power": 3.0}, r'power belongs to schedule.name = "polynomial", but the name is "cosine"'),
        ({"drop_steps": 3}, 'drop_steps belongs to schedule.name = "step"'),
        ({"name": "step"}, 'name = "step" needs drop_epochs or drop_steps'),
        ({"name": "wsd"}, 'name = "wsd" needs decay_epochs or decay_steps'),
        ({"name": "wsd", "decay_steps": 3, "decay_epochs": 1.0}, "one of them"),
        ({"name": "wsd", "decay_steps": 91}, "a warm-up of 10 steps and a decay of 91 steps do not fit"),
        ({"name": "exponential"}, "schedule.name|name"),
    ],
)
def test_what_a_schedule_lacks_or_does_not_know_is_said(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rates(**table)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "lars"}, "lars.* is refused, because .* needs whole parameters; ZeRO splits them"),
        ({"name": "Muon"}, "orthogonalises whole matrices"),
        ({"name": "adafactor"}, "sums of rows and columns"),
        ({"name": "adagrad"}, "without parameter groups"),
        ({"name": "adan"}, "counts its steps per group"),
        ({"name": "adamw", "momentum": 0.8}, r'optim.momentum belongs to optim.name = "sgd", but the name is "adamw"'),
        ({"name": "lion", "nesterov": True}, r"optim.nesterov belongs to"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_refused_with_the_reason(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(OptimConfig, table, "config")


def test_defaults_are_those_of_an_optimizers_authors_unless_given() -> None:
    assert build(OptimConfig, {"name": "lion"}, "config").betas == (0.9, 0.99)
    assert build(OptimConfig, {"name": "lion", "betas": [0.95, 0.98]}, "config").betas == (0.95, 0.98)
    assert build(OptimConfig, {"name": "adopt"}, "config").eps == 1e-6
    assert build(OptimConfig, {}, "config").betas == (0.9, 0.999)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_the_states_that_are_said_of_it(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = optimizer_of([{"params": [weight]}], build(OptimConfig, {"name": name}, "config"))
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    kind = OPTIMIZERS[name]
    per_element = {key for key, value in optimizer.state[weight].items() if torch.is_tensor(value) and value.dim()}
    others = optimizer.state[weight].keys() - per_element
    assert per_element == set(kind.states)
    assert others == ({"step"} if kind.counts else set())
    assert {key for group in optimizer.param_groups for key in group if key == "step"} == set()


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("divided", [False, True])
def test_lamb_is_timms_whole_or_in_parts(steps: int, divided: bool) -> None:
    """Two ranks hold parts of three parameters in one flat tensor each; the last parameter does not decay."""
    torch.manual_seed(2)
    shapes, config = [(4, 3), (5,), (3, 3)], build(OptimConfig, {"name": "lamb", "weight_decay": 0.1}, "config")
    whole = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    with torch.no_grad():
        whole[1].zero_()  # no norm to scale by
    theirs = timm.optim.Lamb(
        [{"params": whole[:2]}, {"params": whole[2:], "weight_decay": 0.0}],
        lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.1, max_grad_norm=None,
    )  # fmt: skip
    if divided:
        decayed = torch.cat([p.detach().reshape(-1) for p in whole[:2]] + [torch.zeros(1, dtype=torch.float64)])
        cuts = [decayed[:9].clone(), decayed[9:].clone()]  # 12 + 5 elements and one of padding
        parts = [[Part(0, 0, 9)], [Part(0, 0, 3), Part(1, 3, 5)]]
        held = [torch.nn.Parameter(cut) for cut in cuts]
    else:
        held = [torch.nn.Parameter(p.detach().clone()) for p in whole[:2]]
    alone = torch.nn.Parameter(whole[2].detach().clone())
    # One rank here holds what two would: the sum over its own parts is theirs.
    ours = optimizer_of([{"params": held, "weight_decay": 0.1}, {"params": [alone], "weight_decay": 0.0}], config)
    assert isinstance(ours, Lamb)
    if divided:
        _add_up_over_ranks(ours, held, parts)
    for _ in range(steps):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for p, gradient in zip(whole, gradients, strict=True):
            p.grad = gradient.clone()
        flat = torch.cat([g.reshape(-1) for g in gradients[:2]] + [torch.zeros(1, dtype=torch.float64)])
        for p, gradient in zip(held, (flat[:9], flat[9:]) if divided else gradients[:2], strict=True):
            p.grad = gradient.clone()
        alone.grad = gradients[2].clone()
        theirs.step()
        ours.step()
    found = torch.cat([p.detach().reshape(-1) for p in held])
    expected = torch.cat([p.detach().reshape(-1) for p in whole[:2]])
    torch.testing.assert_close(found[:17], expected, rtol=1e-6, atol=1e-7)  # ratios are fp32
    torch.testing.assert_close(alone, whole[2], rtol=1e-12, atol=1e-12)


def _add_up_over_ranks(optimizer: Lamb, held: list[torch.nn.Parameter], parts: list[list[Part]]) -> None:
    """Have parts of one parameter in two tensors add up, as over two ranks."""
    numbered = {tensor: [Part(2 * part.parameter + i, part.start, part.count) for part in found]
                for i, (tensor, found) in enumerate(zip(held, parts, strict=True))}  # fmt: skip

    def both(squares: torch.Tensor) -> torch.Tensor:
        return squares.view(2, -1, 2).sum(2).repeat_interleave(2, dim=1)

    optimizer.divide(numbered, 4, both)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("setformer_nano", "stem.", "head."),
        ("soft_tiny", "stem.", "head."),
        ("vit_tiny_patch16_224", "patch_embed.", "head."),
        ("convnext_atto", "stem.", "head.fc."),
    ],
)
def test_layer_decay_goes_down_from_the_head_block_by_block(name: str, first: str, last: str) -> None:
    model = build_model(ModelConfig(name=name), 10, 32, 0)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {parameter: scale[id(p)] for parameter, p in model.named_parameters()}
    assert len(of) == len(scale)
    assert {value for parameter, value in of.items() if parameter.startswith(last)} == {1.0}
    assert {value for parameter, value in of.items() if parameter.startswith(first)} == {min(of.values())}
    heights: dict[str, set[float]] = {}  # of each block, in order
    for parameter, value in of.items():
        if found := re.match(r".*blocks\.\d+\.", parameter):
            heights.setdefault(found[0], set()).add(value)
    assert all(len(height) == 1 for height in heights.values())
    assert list(heights.values()) == sorted(heights.values(), key=min)
    assert max(map(max, heights.values())) < 1.0


def test_a_group_trains_at_its_share_of_the_rate() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 16, 0)
    optim = OptimConfig(layer_decay=0.5, lr=0.8)
    optimizer = optimizer_of(parameter_groups(model, optim), optim)
    schedule = Schedule(optimizer, ScheduleConfig(name="constant", steps=10), 5)
    assert schedule.apply(3) == 0.8
    assert [group["lr"] for group in optimizer.param_groups] == [0.8 * g["lr_scale"] for g in optimizer.param_groups]

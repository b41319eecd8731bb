"""Models of a user's own: what is refused before a run begins, and what is left as it is."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

from launch.run.own_model import build_own, check_unchanged, digest_of_buffers, made_own, named_own, round_buffers
from launch.testing.commands import DEMO
from setformer import load_config
from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.config import OptimConfig
from setformer_dist.engine.optim import parameter_groups
from setformer_dist.tasks.build import build_task

BATCH = torch.zeros(2, 3)


class Net(nn.Module):
    """Three numbers in, ten out."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Followed(Net):
    """A momentum encoder, which begins with the weights that it follows; by operators in place, with gradients only."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__(outputs)
        self.slow = copy.deepcopy(self.body).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.follow()
        return super().forward(x) + self.head(self.slow(x))

    def follow(self) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.body.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


class FollowedByData(Followed):
    """The same by new tensors."""

    def follow(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.body.parameters(), strict=True):
            slow.data = 0.9 * slow.data + 0.1 * fast.data


class ByFirstBatch(Net):
    """Sets a parameter by the first batch that it sees."""

    ready = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.body.bias.data = 1 - x.mean(0).repeat(4)[:4]
            self.ready = True
        return super().forward(x)


class Late(Net):
    """Has a buffer from its first batch on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.register_buffer("places", torch.arange(3))
        return super().forward(x)


class Normed(Net):
    """Keeps running statistics."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__(outputs)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


class FixedNorm(Normed):
    """Has the statistics of a finished training, with a layer that does not train and a sparse buffer."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__(outputs)
        self.norm.requires_grad_(False).eval()
        self.register_buffer("pairs", torch.eye(3).to_sparse())

    def train(self, mode: bool = True) -> FixedNorm:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Followed, r"changes its parameter slow.weight in a forward pass.*\(a momentum encoder\)"),
        (FollowedByData, "changes its parameter slow.weight in a forward pass"),
        (ByFirstBatch, "changes its parameter body.bias in a forward pass.*: set up weights where the model is made"),
        (Late, "changes its buffer places in a forward pass"),
        (Normed, r"keeps running statistics \(norm.num_batches_tracked .*keep these layers in evaluation mode"),
        (lambda: nn.Linear(4, 4), r"does not take a batch of shape \(1, 3\)"),
    ],
)
def test_state_that_a_forward_pass_changes_is_refused(model: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_unchanged(model(), "net", BATCH)


def test_a_model_in_order_is_looked_at_and_stays_as_it_is() -> None:
    model = FixedNorm()
    before = copy.deepcopy(model.state_dict())
    made = check_unchanged(model, "net", BATCH)
    assert made.shape == (1, 10)
    assert model.training
    assert not model.norm.training
    for name, value in model.state_dict().items():
        assert torch.equal(value.to_dense(), before[name].to_dense()), name


class Switched(Net):
    """Decides by itself what it computes again."""

    again = True

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.again = enable


def own(model: Any, *words: str) -> nn.Module:
    return made_own(model, load_config(DEMO, *words), 10)


def test_recomputation_is_the_models_own_unless_the_config_says() -> None:
    assert own(Switched).again
    quiet = Switched()
    quiet.again = False
    assert not own(quiet).again
    assert own(quiet, "model.recompute=block").again


def remembering() -> nn.Module:
    model = Net()
    model.last = model(BATCH)  # type: ignore[assignment]
    return model


def on_meta(outputs: int) -> nn.Module:
    with torch.device("meta"):
        return Net(outputs)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda outputs: torch.compile(Net(outputs)), "is compiled by torch.compile: pass the module itself"),
        (nn.DataParallel(Net()), "is wrapped in DataParallel: pass the module itself"),
        (remembering(), "Net cannot be copied .*: pass a function of the number of outputs"),
        (on_meta, "body.weight is on the meta device"),
    ],
)
def test_models_that_are_wrapped_or_have_no_values_are_refused(model: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        own(model)


class Sparing(Net):
    """Names what has no weight decay, as an attribute."""

    no_weight_decay: Any = ("head.weight",)


@pytest.mark.parametrize(("named", "spared"), [(("head.weight",), 3), (None, 2), (lambda: {"head.weight"}, 3)])
def test_weights_without_decay_are_named_by_a_method_or_an_attribute(named: Any, spared: int) -> None:
    model = Sparing()
    model.no_weight_decay = named
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    assert sum(len(group["params"]) for group in groups if not group["weight_decay"]) == spared


def test_buffers_of_a_loaded_model_are_those_that_its_run_computed_with() -> None:
    model = Net()
    model.register_buffer("frequencies", torch.tensor([1000.0, 999.3]))
    model.register_buffer("places", torch.tensor([999]))
    given = digest_of_buffers(model)
    round_buffers(model, torch.float32)
    assert digest_of_buffers(model) == given
    round_buffers(model, torch.bfloat16)
    assert model.frequencies.tolist() == [1000.0, 1000.0]
    assert model.places.tolist() == [999]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Conv2d(3, 3, 1), r"makes \(1, 3, 16, 16\) of .* needs \(1, 4, rows, columns\): give it 4 outputs"),
        (nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten()), r"makes \(1, 4\) of one sample"),
        (nn.Conv2d(3, 4, 1), ""),
    ],
)
def test_a_model_of_other_outputs_than_pixels_need_is_refused(model: nn.Module, said: str) -> None:
    words = ("task.name=segmentation", "~checkpoint.best_metric", "data.augment.smoothing=0", "~model.args")
    config = named_own(load_config(DEMO, *words, "~model.drop_path"), model)
    task = build_task(config.task, ("road", "sky", "tree", "car"))
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        build_own(model, config, (3, 16, 16), task)

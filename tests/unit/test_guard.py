"""The guard's judgement of losses, and updates that are left out."""

from __future__ import annotations

import math

import pytest
import torch

from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import TrainingError
from setformer_dist.engine.guard import Guard, GuardConfig, Updates


def guard(folder, **values):
    made = Guard(GuardConfig(**values), folder, Alone())
    made.load()
    return made


def test_good_losses_are_no_trouble(tmp_path):
    assert guard(tmp_path, spike=2.0).judge(0, [1.0, 0.9, 1.1] * 20) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_by_default_and_names_the_step(tmp_path, bad):
    with pytest.raises(TrainingError, match="not finite at step 12"):
        guard(tmp_path).judge(10, [1.0, 1.0, bad, 1.0])


def test_skip_goes_on_after_each_bad_step_up_to_the_limit(tmp_path):
    one = guard(tmp_path, nonfinite="skip", limit=2)
    losses = [1.0, math.nan, 1.0, math.nan, 1.0, math.nan]
    for step in (1, 3):
        trouble = one.judge(0, losses)
        assert (trouble.step, trouble.why, trouble.action) == (step, "nonfinite", "skip")
        one.remember(trouble)
    with pytest.raises(TrainingError, match="at step 5, and 2 bad steps"):
        one.judge(0, losses)


def test_a_leap_is_one_against_the_median_before_it(tmp_path):
    one = guard(tmp_path, spike=3.0)
    assert one.judge(0, [1.0] * 19 + [50.0]) is None  # too few to tell
    assert one.judge(20, [2.9]) is None
    trouble = one.judge(21, [1.0, 3.1, 9.0])
    assert (trouble.step, trouble.why, trouble.action, trouble.loss) == (22, "spike", "rollback", 3.1)


def test_what_is_passed_over_stays_so_in_every_continuation(tmp_path):
    one = guard(tmp_path, nonfinite="rollback")
    one.remember(one.judge(4, [math.nan]))
    assert one.passes_over(4)
    later = guard(tmp_path, nonfinite="rollback")
    assert later.passes_over(4)
    assert not later.passes_over(5)
    assert later.judge(4, [math.nan]) is None


def test_the_median_goes_on_after_a_resume(tmp_path):
    one = guard(tmp_path, spike=2.0, window=20)
    one.judge(0, [1.0] * 25)
    later = guard(tmp_path, spike=2.0, window=20)
    later.take_back(one.state())
    assert later.judge(25, [2.1]).step == 25


class PlainEngine:
    """What `Updates` asks of an engine at stage 0 in fp32."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_optimization_stage(self):
        return 0

    def fp16_enabled(self):
        return False

    def bfloat16_enabled(self):
        return False

    def was_step_applied(self):
        return True


def test_updates_with_bad_gradients_touch_neither_weights_nor_states():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    adam = torch.optim.AdamW(weights, lr=0.1)
    updates = Updates(PlainEngine(adam))
    for p in weights:
        p.grad = torch.ones_like(p)
    adam.step()
    before = [p.detach().clone() for p in weights], [adam.state[p]["exp_avg"].clone() for p in weights]
    for bad in (math.nan, math.inf):
        weights[0].grad = torch.tensor([1.0, bad, 1.0])
        weights[1].grad = torch.ones(2)
        adam.step()
        assert updates.left_out
        assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
        assert all(torch.equal(adam.state[p]["exp_avg"], b) for p, b in zip(weights, before[1], strict=True))
        assert all(int(adam.state[p]["step"]) == 1 for p in weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    adam.step()
    assert not updates.left_out
    assert not torch.equal(weights[0], before[0][0])


def test_with_a_scaled_loss_only_leaps_count(tmp_path):
    one = Guard(GuardConfig(spike=2.0), tmp_path, Alone(), scaled=True)
    one.load()
    assert one.judge(0, [1.0, math.nan] * 30) is None
    assert one.judge(60, [math.inf, 2.5]).step == 61

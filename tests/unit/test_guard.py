"""The guard's judgement of losses, and updates that are left out."""

from __future__ import annotations

import json
import math

import pytest
import torch

from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import TrainingError
from setformer_dist.engine.config import GuardConfig
from setformer_dist.engine.guard import GUARD_FILE, Guard, Updates


def guard(folder, **values):
    made = Guard(GuardConfig(**values), folder, Alone())
    made.load()
    return made


def test_good_losses_are_no_incident(tmp_path):
    assert guard(tmp_path, spike=2.0).judge(0, [1.0, 0.9, 1.1] * 20) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_by_default_and_names_the_step(tmp_path, bad):
    with pytest.raises(TrainingError, match="not finite at step 12"):
        guard(tmp_path).judge(10, [1.0, 1.0, bad, 1.0])


def test_skip_continues_after_each_bad_step_up_to_the_limit(tmp_path):
    one = guard(tmp_path, nonfinite="skip", limit=2)
    losses = [1.0, math.nan, 1.0, math.nan, 1.0, math.nan]
    for step in (1, 3):
        incident = one.judge(0, losses)
        assert (incident.step, incident.why, incident.action) == (step, "nonfinite", "skip")
        one.remember(incident)
    with pytest.raises(TrainingError, match="at step 5, after 2 tolerated bad steps"):
        one.judge(0, losses)


def test_a_spike_is_one_against_the_median_before_it(tmp_path):
    one = guard(tmp_path, spike=3.0)
    assert one.judge(0, [1.0] * 19 + [50.0]) is None  # too few to tell
    assert one.judge(20, [2.9]) is None
    incident = one.judge(21, [1.0, 3.1, 9.0])
    assert (incident.step, incident.why, incident.action, incident.loss) == (22, "spike", "rollback", 3.1)


def test_what_is_passed_over_stays_so_in_every_continuation(tmp_path):
    one = guard(tmp_path, nonfinite="rollback")
    one.remember(one.judge(4, [math.nan]))
    assert one.passes_over(4)
    later = guard(tmp_path, nonfinite="rollback")
    assert later.passes_over(4)
    assert not later.passes_over(5)
    assert later.judge(4, [math.nan]) is None


def test_the_median_continues_after_a_resume(tmp_path):
    one = guard(tmp_path, spike=2.0, window=20)
    one.judge(0, [1.0] * 25)
    later = guard(tmp_path, spike=2.0, window=20)
    later.take_back(one.state())
    assert later.judge(25, [2.1]).step == 25


def bad_step(one, step):
    incident = one.judge(step, [math.nan])
    one.remember(incident, [step, step + 1])
    return incident


def test_an_incident_soon_after_a_rollback_asks_for_a_checkpoint_before_that_of_the_rollback(tmp_path):
    one = guard(tmp_path, nonfinite="rollback", window=20)
    assert bad_step(one, 105).below is None
    one.went_back(100)
    assert bad_step(one, 103).below == 100  # before the step that was passed over is soon as well
    one.went_back(90)
    assert bad_step(one, 122).below == 90
    one.went_back(80)
    assert bad_step(one, 142).below is None  # 20 steps after the last one
    assert one.last["sample_ids"] == [142, 143]


def test_where_a_rollback_was_cut_short_its_goal_is_known_until_it_is_reached(tmp_path):
    one = guard(tmp_path, nonfinite="rollback")
    bad_step(one, 105)
    one.went_back(100)
    bad_step(one, 106)
    later = guard(tmp_path, nonfinite="rollback")
    assert later.below == 100
    later.went_back(90)
    assert later.below is None
    again = guard(tmp_path, nonfinite="rollback")
    assert again.below is None
    assert again.judge(107, [math.nan]).below == 90


def test_steps_left_out_are_no_rollbacks(tmp_path):
    one = guard(tmp_path, nonfinite="skip", spike=2.0, window=20)
    one.judge(0, [1.0] * 20)
    bad_step(one, 20)
    one.went_back(15)  # a resume
    assert one.judge(21, [9.0]).below is None
    assert json.loads((tmp_path / GUARD_FILE).read_text())["troubles"][0]["back_to"] is None


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


def test_with_a_scaled_loss_only_spikes_count(tmp_path):
    one = Guard(GuardConfig(spike=2.0), tmp_path, Alone(), scaled=True)
    one.load()
    assert one.judge(0, [1.0, math.nan] * 30) is None
    assert one.judge(60, [math.inf, 2.5]).step == 61

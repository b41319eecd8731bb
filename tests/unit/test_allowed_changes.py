"""What `checkpoint.allow_changes` lets differ: another global batch loses and repeats no sample, or is refused."""

import numpy as np
import pytest

from dataloaders.order.mixture import MixturePlan
from dataloaders.order.order import BlockOrder, FullOrder, SetPlan, counts_samples, cursor_at, step_of_cursor
from dataloaders.order.resolution import BucketPlan
from launch.run.store import continued_cursor
from setformer_dist.core.errors import CheckpointError, DataError

N, SEED = 100, 3
CHANGED = ("global_batch",)


def plan_of(kind, batch):
    if kind == "block":
        return SetPlan(BlockOrder(np.repeat(np.arange(10, dtype=np.int32), 10), 3, SEED), batch)
    if kind == "mixture":
        return MixturePlan([FullOrder(60, SEED, 0), FullOrder(40, SEED, 1)], (0.5, 0.5), batch, SEED)
    if kind.startswith("buckets"):
        return BucketPlan([np.arange(50), np.arange(50, 100)], (1.0, 2.0), batch, SEED, kind.endswith("wrap"))
    return SetPlan(FullOrder(N, SEED), batch, kind == "wrap")


def cursor(plan, step, fingerprint="data"):
    return cursor_at(plan, SEED, fingerprint, step).to_json()


@pytest.mark.parametrize("kind", ["full", "block"])
def test_another_global_batch_loses_and_repeats_nothing_of_the_epoch(kind):
    old, new = plan_of(kind, 10), plan_of(kind, 5)
    saved = cursor(old, old.steps_per_epoch + 4)  # 40 samples into epoch 1
    first = step_of_cursor(continued_cursor(saved, cursor(new, 0), CHANGED), new, SEED, "data")
    seen = [old.pick(step, np.arange(10))[0] for step in range(10, 14)]
    seen += [new.pick(step, np.arange(5))[0] for step in range(first, 2 * new.steps_per_epoch)]
    assert sorted(np.concatenate(seen).tolist()) == list(range(N))


@pytest.mark.parametrize("kind", ["wrap", "mixture", "buckets", "buckets wrap"])
def test_plans_that_deal_out_by_the_batch_refuse_another_one(kind):
    saved, here = cursor(plan_of(kind, 10), 4), cursor(plan_of(kind, 5), 0)
    assert not counts_samples(here["order"])
    with pytest.raises(CheckpointError, match=r"global_batch = 10, this run has 5, .*repeated: restore the old value"):
        continued_cursor(saved, here, CHANGED)
    assert continued_cursor(cursor(plan_of(kind, 5), 4), here, CHANGED) == cursor(plan_of(kind, 5), 4)


@pytest.mark.parametrize(("step", "batch"), [(3, 20), (9, 30), (9, 90)])
def test_where_no_step_of_the_new_batch_begins_it_is_refused(step, batch):
    saved, here = cursor(plan_of("full", 10), step), cursor(plan_of("full", batch), 0)
    with pytest.raises(
        CheckpointError, match=rf"after {step * 10} samples .* no step of global_batch = {batch} begins"
    ):
        continued_cursor(saved, here, CHANGED)


def test_what_is_not_allowed_is_refused_by_name():
    saved, here = cursor(plan_of("full", 10), 3), cursor(plan_of("full", 5), 0, "other data")
    with pytest.raises(CheckpointError, match=r"global_batch = 10, this run has 5: .*\['global_batch'\]"):
        continued_cursor(saved, here, ())
    with pytest.raises(CheckpointError, match=r"fingerprint = 'data', this run has 'other data': .*\['data'\]"):
        continued_cursor(saved, here, CHANGED)


def test_other_data_continue_at_the_same_place_of_the_same_epoch():
    saved = cursor(plan_of("full", 10), 24)  # epoch 2, step 4 of 10
    larger, smaller = SetPlan(FullOrder(150, SEED), 10), SetPlan(FullOrder(30, SEED), 10)
    assert step_of_cursor(continued_cursor(saved, cursor(larger, 0), ("data",)), larger, SEED, "data") == 2 * 15 + 4
    with pytest.raises(DataError, match="or the data were larger"):
        step_of_cursor(continued_cursor(saved, cursor(smaller, 0), ("data",)), smaller, SEED, "data")

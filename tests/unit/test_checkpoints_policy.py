"""Which checkpoints stay, without a disk."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.config import CheckpointConfig, check_url
from checkpoints.policy import KEEP_TAG, Candidate, best_first, steps_to_delete
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError


def having(*values: float, metric: str = "top1") -> list[Candidate]:
    return [Candidate(step, metrics={metric: value}) for step, value in enumerate(values, start=1)]


def test_the_newest_and_the_best_stay():
    config = CheckpointConfig(keep_last=2, keep_best=1)
    assert steps_to_delete(having(0.1, 0.9, 0.2, 0.3, 0.4), 5, config) == [1, 3]


def test_a_smaller_loss_is_better():
    config = CheckpointConfig(keep_last=1, keep_best=1, best_metric="loss")
    assert steps_to_delete(having(0.5, 0.1, 0.2, 0.3, metric="loss"), 4, config) == [1, 3]


def test_a_value_that_is_not_finite_is_never_the_best():
    assert [c.step for c in best_first(having(0.1, math.nan, math.inf, 0.3), CheckpointConfig())] == [4, 1]


def test_among_equals_the_later_is_better():
    assert [c.step for c in best_first(having(0.5, 0.5), CheckpointConfig())] == [2, 1]


def test_a_tagged_checkpoint_stays():
    candidates = [Candidate(1, tags=(KEEP_TAG,)), Candidate(2), Candidate(3)]
    assert steps_to_delete(candidates, 3, CheckpointConfig(keep_last=1, keep_best=0)) == [2]


def test_every_nth_stays():
    config = CheckpointConfig(keep_last=1, keep_best=0, keep_every=20)
    assert steps_to_delete([Candidate(step) for step in (10, 20, 30, 40, 50)], 50, config) == [10, 30]


def test_what_lies_beyond_the_saved_step_is_neither_counted_nor_touched():
    # A run that fell back from 120 (damaged) and 110 to 100 and has just saved 105.
    candidates = [Candidate(100), Candidate(105), Candidate(110), Candidate(120, "damaged")]
    assert steps_to_delete(candidates, 105, CheckpointConfig(keep_last=1, keep_best=0)) == [100]


def test_unsound_folders_count_for_nothing_and_go_when_old():
    candidates = [Candidate(1), Candidate(2, "damaged"), Candidate(3), Candidate(4, "damaged"), Candidate(5)]
    assert steps_to_delete(candidates, 5, CheckpointConfig(keep_last=2, keep_best=0)) == [1, 2]


@given(
    flags=st.lists(
        st.tuples(st.sampled_from(("sound", "damaged", "unknown")), st.floats(0, 1), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    saved=st.integers(0, 11),
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
)
def test_the_saved_the_best_and_enough_sound_ones_always_stay(flags, saved, keep_last, keep_best):
    saved = min(saved, len(flags) - 1)
    candidates = [
        Candidate(step, "sound" if step == saved else state, {"top1": top1}, (KEEP_TAG,) if tagged else ())
        for step, (state, top1, tagged) in enumerate(flags)
    ]
    config = CheckpointConfig(keep_last=keep_last, keep_best=keep_best)
    gone = set(steps_to_delete(candidates, saved, config))
    left = [c for c in candidates if c.step not in gone]
    within = [c for c in candidates if c.state == "sound" and c.step <= saved]
    assert saved not in gone
    assert all(step < saved for step in gone)
    assert sum(c.state == "sound" and c.step <= saved for c in left) >= min(keep_last, len(within))
    assert not any(c.step in gone for c in best_first(within, config)[:keep_best])
    assert not any(c.step in gone for c in candidates if c.tags or c.state == "unknown")
    # A second application finds nothing more to do.
    assert steps_to_delete(left, saved, config) == []


def test_due():
    config = CheckpointConfig(every_steps=10)
    assert [step for step in range(31) if config.due(step)] == [10, 20, 30]


def test_a_run_must_keep_at_least_one():
    with pytest.raises(ConfigError, match="keep_last = 0"):
        build(CheckpointConfig, {"keep_last": 0}, "run.toml")


@pytest.mark.parametrize("url", ["s3://KEY:hunter2@bucket/runs", "s3://KEY@bucket/runs", "s3:///runs", "gs://a:b@c/d"])
def test_a_mirror_with_credentials_in_its_url_is_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ValueError, match="names no bucket, or has credentials in it") as caught:
        check_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://my.bucket-1/runs/a", "gs://bucket_2/x", "file:///mnt/copies", "memory://copies",
            "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name"],
)  # fmt: skip
def test_urls_of_mirrors(url: str) -> None:
    check_url(url)

"""Runs whose data change on the way or fail on one rank, through the command line."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from dataloaders.order.order import Cut, FullOrder, SetPlan
from dataloaders.sources.shards import open_split
from launch.testing.commands import (
    Ended,
    assert_gone,
    children,
    kill_ranks,
    losses,
    setformer,
    start,
    train_words,
    wait_for,
)

_B, _MICRO = 64, 32  # of the demo's config on two ranks

RESIZED = (
    "data.augment.crop=resized",
    "data.augment.pad=1",
    "data.resolutions=[{step=0,image_size=8,ramp_to=16,multiple=4},{step=7,image_size=12},"
    "{step=14,image_size=16,random_to=8,multiple=4}]",
    "data.threads=2",
)
WITHIN = "batch.micro_pixels=2048"  # 32 images of 8 x 8 pixels, 8 of 12 x 12 or 16 x 16


def train_rows(folder: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in lines if row["kind"] == "train"}


@pytest.mark.drill
def test_a_run_that_changes_its_image_size_resumes_bit_by_bit(digits: Path, tmp_path: Path) -> None:
    fixed = setformer(*train_words(digits, tmp_path / "fixed", *RESIZED))
    assert fixed.code == 0, fixed.err
    whole = setformer(*train_words(digits, tmp_path / "whole", *RESIZED, WITHIN))
    assert whole.code == 0, whole.err
    # Other micro batches add in another order, and nothing else.
    of_fixed, of_whole = (
        {key: loss for key, (loss, _) in losses(tmp_path / name / "demo").items()} for name in ("fixed", "whole")
    )
    assert of_whole == pytest.approx(of_fixed, rel=1e-4)
    assert of_whole != of_fixed
    assert set(train_rows(tmp_path / "whole" / "demo")) == set(range(1, 23))
    process = start(*train_words(digits, tmp_path / "killed", *RESIZED, WITHIN))
    wait_for(tmp_path / "killed" / "demo" / "checkpoints" / "step-00000005" / "manifest.json", process)
    kill_ranks(process)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert "resumed at step" in err
    assert losses(tmp_path / "killed" / "demo") == losses(tmp_path / "whole" / "demo")


def damage_what_rank_1_sees(data: Path, step: int, count: int, seed: int) -> None:
    """Flip a byte in samples that only rank 1 of 2 meets, all in one step."""
    dataset = open_split(data / "train")
    plan = SetPlan(FullOrder(dataset.num_samples, seed), _B)
    samples, _ = plan.pick(step, Cut(_B, _MICRO, 1, 2).places().ravel())
    columns = dataset.index.columns
    for sample in samples[:count].tolist():
        shard = data / "train" / dataset.index.shards[int(columns["shard"][sample])].name
        with shard.open("r+b") as file:
            file.seek(int(columns["offset"][sample]) + 30)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 255]))
    dataset.close()


def test_a_loader_that_fails_on_one_rank_ends_all_with_its_sentence(digits: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(digits / split, tmp_path / "data" / split)
    damage_what_rank_1_sees(tmp_path / "data", step=4, count=8, seed=0)
    process = start(*train_words(tmp_path / "data", tmp_path / "out", "data.threads=1", "run.seed=0"))
    pids: set[int] = set()
    begin = time.monotonic()
    while process.poll() is None:
        pids |= set(children(process.pid))
        assert time.monotonic() - begin < 200, "the other rank waits for ever"
        time.sleep(0.1)
    out, err = process.communicate()
    ended = Ended(process.returncode, out, err)
    assert ended.code == 3, err
    assert "Traceback" not in err
    (line,) = ended.error_lines
    assert "damaged, more than 5 + data.max_bad_share" in line
    assert "(rank 1, log " in line
    assert max(train_rows(tmp_path / "out" / "demo")) == 4
    assert len(pids) >= 2
    assert_gone(sorted(pids))

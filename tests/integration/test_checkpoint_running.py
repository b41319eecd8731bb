"""A run whose saves fail while it trains: all ranks learn of it at the same step, and end or continue as configured."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import layout
from checkpoints.reader import open_checkpoint
from launch.testing.commands import setformer, train_words

# All checkpoints stay, so that the first fills the disk and a second finds no room.
STEPS = ("checkpoint.every_steps=5", "checkpoint.keep_last=9")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; making one needs rights that not every machine gives."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave that many bytes free."""
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize
    (disk / "other").write_bytes(bytes(free - left))


def checkpoint_bytes(digits: Path, out: Path) -> int:
    """Return the size of one checkpoint of the run, from a run of one step."""
    one = ("~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=1", "schedule.warmup_steps=0")
    ended = setformer(*train_words(digits, out, *one, ranks=1))
    assert ended.code == 0, ended.err
    return open_checkpoint(out / "demo").manifest.size


@pytest.mark.drill
def test_a_disk_that_fills_up_ends_the_run_on_all_ranks_or_is_borne(digits: Path, tmp_path: Path, disk: Path) -> None:
    size = checkpoint_bytes(digits, tmp_path / "out")
    fill(disk, int(1.6 * size) + (1 << 20))
    stopped = setformer(*train_words(digits, disk, *STEPS, "run.name=stop"))
    assert stopped.code == 4, stopped.err
    assert stopped.err.count("No space left on device") >= 1
    assert "step 10" in stopped.err
    root = disk / "stop" / "checkpoints"
    assert [layout.step_of(folder) for folder in layout.step_folders(root)] == [5]
    assert open_checkpoint(root).step == 5
    # The same command with another choice continues over the full disk; only the last checkpoint must find room.
    tolerated = setformer(*train_words(digits, disk, *STEPS, "run.name=stop", 'checkpoint.on_disk_full="continue"'))
    assert tolerated.code == 4, tolerated.err
    assert (
        "training continues with the checkpoint before it"
        in tolerated.err + (disk / "stop" / "logs" / "rank-00000.log").read_text()
    )
    steps = [json.loads(line) for line in (disk / "stop" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in steps if row["kind"] == "train") == 22
    assert open_checkpoint(root).step == 5
    (disk / "other").unlink()
    ended = setformer(*train_words(digits, disk, *STEPS, "run.name=stop"))
    assert ended.code == 0, ended.err
    assert open_checkpoint(root).step == 22

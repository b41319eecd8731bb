"""Checkpoints over real processes and gloo: what one rank's death in the middle of a save does to the other."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from launch.testing.ranks import RanksFailedError, run_ranks
from setformer_dist.core.comm import Alone
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect

NUMEL = 1000
IDENTITY = Identity(model="m")


def share(rank: int, world: int, step: int) -> list[Fragment]:
    a, b = NUMEL * rank // world, NUMEL * (rank + 1) // world
    return [Fragment("w", "param", a, (NUMEL,), torch.arange(NUMEL, dtype=torch.float32)[a:b] + step)]


def joined(root: str) -> CheckpointManager:
    ranks = RankInfo.from_env()
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    return CheckpointManager(Path(root), TorchCollectives(ranks), CheckpointConfig())


def save_and_load(root: str) -> list[float]:
    manager = joined(root)
    rank = RankInfo.from_env().rank
    manager.save(Snapshot(1, share(rank, 2, 1), {"step": 1}, {}), IDENTITY)
    mine = [Fragment("w", "param", 0, (NUMEL,), torch.zeros(NUMEL))]
    checkpoint = manager.newest()
    assert checkpoint is not None
    manager.load(checkpoint, mine)
    disconnect()
    return [checkpoint.step, mine[0].tensor.sum().item()]


def die_in_the_middle(root: str) -> None:
    """Rank 1 is killed while its fragments are being collected for the second checkpoint."""
    manager = joined(root)
    rank = RankInfo.from_env().rank
    manager.save(Snapshot(1, share(rank, 2, 1), {"step": 1}, {}), IDENTITY)

    def fragments():
        yield from share(rank, 2, 2)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    try:
        manager.save(Snapshot(2, fragments(), {"step": 2}, {}), IDENTITY)
    finally:
        (Path(root).parent / f"waited-{rank}").write_text(str(time.monotonic() - began))


def test_two_processes_save_and_read_each_others_parts(tmp_path):
    answers = run_ranks(save_and_load, 2, str(tmp_path / "checkpoints"))
    assert answers == [[1, float(sum(range(NUMEL)) + NUMEL)]] * 2


def test_a_rank_killed_in_the_middle_of_a_save_neither_hangs_the_other_nor_harms_the_last_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    with pytest.raises(RanksFailedError, match=r"rank 1, exit code -9"):
        run_ranks(die_in_the_middle, 2, str(root))
    assert float((tmp_path / "waited-0").read_text()) < 20
    checkpoint = CheckpointManager(root, Alone(), CheckpointConfig()).newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert torch.equal(checkpoint.read_full()["w"], torch.arange(NUMEL, dtype=torch.float32) + 1)
    assert [p.name for p in root.iterdir()] == ["step-00000001"]

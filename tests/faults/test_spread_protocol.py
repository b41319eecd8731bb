"""A fault at every step of a save on hosts with a disk each leaves the old checkpoint or the new one, never a mixture.

Two real gloo ranks, each with a folder of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints.identity import Identity
from checkpoints.testing.disk_faults import Fault, FaultyDisk
from checkpoints.testing.spread_faults import DEAD, Case, cases
from launch.testing.ranks import RanksFailedError, run_ranks
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot
from setformer_dist.engine.comm import disconnect
from tests.faults.test_checkpoint_replicas import joined, root_of, share

IDENTITY = Identity(model="m")


def save_with_fault(base: str, rank: int, fault: list[str]) -> str:
    """Save 1, then 2 with a fault on one rank; write down how it went."""
    mine = RankInfo.from_env().rank
    disk = FaultyDisk()
    manager = joined(base, [0, 1], 1, 1, disk, keep_last=1)
    root = root_of(base, mine)
    manager.save(Snapshot(1, share(mine, 2, 1), {"step": 1}, {}), IDENTITY)
    (root / DEAD).mkdir()
    disk.fault = Fault(*fault) if mine == rank else None
    manager.begin(Snapshot(2, share(mine, 2, 2), {"step": 2}, {}), IDENTITY)
    told = "saved"
    try:
        manager.finish(last=True)
    except CheckpointError as error:
        told = f"{type(error).__name__}: {error}"
        manager.close()
    if mine == rank and not disk.hits:
        told = "the fault did not happen"
    disconnect()
    return told


def go_on(base: str) -> list[object]:
    """Go on from what is found, and save 3."""
    mine = RankInfo.from_env().rank
    manager = joined(base, [0, 1], 1, 1, keep_last=1)
    found = manager.newest()
    assert found is not None
    filled = [Fragment(f.name, f.state, f.start, f.shape, torch.zeros_like(f.tensor)) for f in share(mine, 2, 0)]
    manager.load(found, filled)
    right = torch.equal(filled[0].tensor, share(mine, 2, found.step)[0].tensor)
    right = right and found.trainer == {"step": found.step}
    manager.save(Snapshot(3, share(mine, 2, 3), {"step": 3}, {}), IDENTITY)
    disconnect()
    return [found.step, right]


def name(case: Case) -> str:
    return f"{case.number}-rank{case.rank}-{case.what}-{case.fault.kind}".replace(" ", "_")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.drill] if at % 24 != 17 else []) for at, case in enumerate(cases())],
    ids=name,
)
def test_a_fault_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, case: Case) -> None:
    fault = [case.fault.operation, case.fault.pattern, case.fault.kind]
    if case.fault.kind == "killed":
        with pytest.raises(RanksFailedError):
            run_ranks(save_with_fault, 2, str(tmp_path), case.rank, fault)
    else:
        told = run_ranks(save_with_fault, 2, str(tmp_path), case.rank, fault)
        assert "the fault did not happen" not in told
        if case.fault.kind == "slow" or case.number == 6:
            assert told == ["saved", "saved"]
        else:
            assert all("could not write the checkpoint of step 2" in text for text in told), told
            assert all(f"rank {case.rank}" in text or "replica" in text for text in told), told
    answers = run_ranks(go_on, 2, str(tmp_path))
    assert answers[0] == answers[1]
    step, right = answers[0]
    assert step in case.found
    assert right
    for host in (0, 1):
        root = root_of(str(tmp_path), host)
        folders = sorted(path.name for path in root.glob("*step-*"))
        assert folders[-1] == "step-00000003"
        assert not [folder for folder in folders if folder.startswith(".")]
        assert len(folders) == 1  # retention, whatever the fault had left

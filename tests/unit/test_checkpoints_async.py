"""Saving in the background: what is saved is the state at the call, one copy at a time; failures reach all ranks."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.disk import Disk
from checkpoints.errors import StorageError
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.reader import list_checkpoints, open_checkpoint
from checkpoints.testing.disk_faults import Fault, FaultyDisk
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot
from setformer_dist.testing.threads import run_on_threads

IDENTITY = Identity(model="m")
NUMEL = 1000


class HeldDisk(Disk):
    """Creates no rank file before it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def create(self, path: Path) -> BinaryIO:
        if path.suffix == ".safetensors":
            assert self.go.wait(30)
        return super().create(path)


def manager_of(root: Path, disk: Disk | None = None, **config) -> CheckpointManager:
    return CheckpointManager(root, Alone(), CheckpointConfig(keep_last=9, **config), disk)


def begin(manager: CheckpointManager, step: int, tensor: torch.Tensor) -> None:
    manager.begin(Snapshot(step, [Fragment("w", "param", 0, (NUMEL,), tensor)], {"step": step}, {}), IDENTITY)


def test_training_may_change_the_tensors_at_once(tmp_path):
    disk = HeldDisk()
    manager = manager_of(tmp_path, disk)
    tensor = torch.arange(NUMEL, dtype=torch.float32)
    begin(manager, 1, tensor)
    tensor.mul_(-1)  # the writer has not even created its file
    assert list_checkpoints(tmp_path) == []
    disk.go.set()
    manager.finish()
    assert torch.equal(open_checkpoint(tmp_path).read_full()["w"], torch.arange(NUMEL, dtype=torch.float32))


def test_host_memory_is_used_again(tmp_path):
    manager = manager_of(tmp_path)
    places = set()
    for step in (1, 2, 3):
        begin(manager, step, torch.full((NUMEL,), float(step)))
        manager.finish()
        (image,) = manager._images
        places.add(image.data_ptr())
    assert len(places) == 1
    for step in (1, 2, 3):
        values = open_checkpoint(layout.step_folder(tmp_path, step)).read_full()["w"]
        assert torch.equal(values, torch.full((NUMEL,), float(step)))


@pytest.mark.parametrize(("most", "waits"), [(1, True), (2, False)])
def test_a_second_copy_waits_for_the_first_unless_allowed(tmp_path, most, waits):
    disk = HeldDisk()
    manager = manager_of(tmp_path, disk, max_in_flight=most)
    begin(manager, 1, torch.zeros(NUMEL))
    second = threading.Thread(target=begin, args=(manager, 2, torch.ones(NUMEL)))
    second.start()
    second.join(0.5)
    assert second.is_alive() is waits
    disk.go.set()
    second.join()
    manager.finish()
    assert [entry.manifest.step for entry in list_checkpoints(tmp_path)] == [2, 1]


def test_saves_are_committed_in_order_even_if_several_may_wait(tmp_path):
    disk = HeldDisk()
    manager = manager_of(tmp_path, disk, max_in_flight=3)
    for step in (1, 2, 3):
        begin(manager, step, torch.full((NUMEL,), float(step)))
    disk.go.set()
    manager.finish()
    written = {e.manifest.step: e.path.stat().st_ctime_ns for e in list_checkpoints(tmp_path)}
    assert written[1] <= written[2] <= written[3]


def test_newest_waits_for_what_was_begun(tmp_path):
    manager = manager_of(tmp_path)
    begin(manager, 5, torch.ones(NUMEL))
    assert manager.newest().step == 5


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_failure_in_a_thread_is_noticed_there_and_raised_on_all(tmp_path, bad_rank):
    def work(comm):
        rank = comm.ranks.rank
        fault = Fault("sync", "rank-*", "exception") if rank == bad_rank else None
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig(), FaultyDisk(fault))
        mine = [Fragment("w", "param", rank * 5, (10,), torch.ones(5))]
        manager.begin(Snapshot(1, mine, {}, {}), IDENTITY)
        manager._saves[0].wait()
        noticed = manager.failed()
        with pytest.raises(StorageError, match=rf"step 1 .*rank {bad_rank}: OSError: .*Input/output error"):
            manager.finish()
        assert not manager.failed()
        manager._disk = Disk()
        manager.begin(Snapshot(2, mine, {}, {}), IDENTITY)
        manager.finish()
        return noticed

    noticed = run_on_threads(2, work)
    assert noticed[bad_rank]
    assert noticed[0]  # rank 0 hears of every failure by itself
    assert [path.name for path in layout.step_folders(tmp_path)] == ["step-00000002"]
    assert layout.leftovers(tmp_path) == []


@pytest.mark.parametrize("operation", ["make_folder", "create", "write", "sync"])
def test_a_full_disk_is_borne_where_the_config_says_so_but_not_at_the_end(tmp_path, operation, caplog):
    disk = FaultyDisk()
    manager = manager_of(tmp_path, disk, on_disk_full="continue")
    begin(manager, 1, torch.ones(NUMEL))
    manager.finish()
    disk.fault = Fault(operation, ".tmp-*" if operation == "make_folder" else "rank-*", "disk full")
    begin(manager, 2, torch.ones(NUMEL))
    manager.finish()
    assert "training continues with the checkpoint before it" in caplog.text
    begin(manager, 3, torch.ones(NUMEL))
    with pytest.raises(CheckpointError, match="No space left"):
        manager.finish(last=True)
    assert manager.newest().step == 1


def test_a_failure_borne_before_does_not_fail_a_run_whose_last_checkpoint_is_there(tmp_path, caplog):
    disk = FaultyDisk()
    manager = manager_of(tmp_path, disk, on_disk_full="continue")
    disk.fault = Fault("write", "rank-*", "disk full")
    begin(manager, 1, torch.ones(NUMEL))
    manager._saves[0].wait()
    disk.fault = None
    begin(manager, 2, torch.ones(NUMEL))
    manager.finish(last=True)
    assert "the last checkpoint, of step 2, exists" in caplog.text
    assert manager.newest().step == 2


def test_by_default_a_full_disk_stops(tmp_path):
    manager = manager_of(tmp_path, FaultyDisk(Fault("write", "rank-*", "disk full")))
    begin(manager, 1, torch.ones(NUMEL))
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        manager.finish()


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    manager = manager_of(tmp_path)
    begin(manager, 1, torch.ones(NUMEL))
    manager.close()
    assert threading.active_count() == before
    assert open_checkpoint(tmp_path).step == 1


def test_each_rank_reads_the_bytes_of_its_ranges_and_headers_alone(tmp_path, monkeypatch):
    numel = 300_000
    whole = torch.randn(numel)

    def write(comm):
        a, b = numel * comm.ranks.rank // 3, numel * (comm.ranks.rank + 1) // 3
        mine = [Fragment("w", state, a, (numel,), whole[a:b]) for state in ("param", "exp_avg")]
        CheckpointManager(tmp_path, comm, CheckpointConfig()).save(Snapshot(1, mine, {}, {}), IDENTITY)

    run_on_threads(3, write)
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in tmp_path.glob("step-*/*.safetensors"))
    checkpoint = open_checkpoint(tmp_path)
    read = 0
    preadv, pread = os.preadv, os.pread

    def counted(count: int) -> int:
        nonlocal read
        read += count
        return count

    monkeypatch.setattr(os, "preadv", lambda *args: counted(preadv(*args)))
    monkeypatch.setattr(os, "pread", lambda *args: (data := pread(*args), counted(len(data)))[0])
    out = torch.zeros(numel // 2)
    checkpoint.load_into([Fragment("w", "param", numel // 4, (numel,), out)])
    assert torch.equal(out, whole[numel // 4 : numel // 4 + numel // 2])
    assert read == headers + 4 * (numel // 2)

"""Checkpoints under damage: flipped, cut and deleted files, killed writers, full disks, split storage.

Nothing here is simulated where the real thing can be had: writers are processes and die by SIGKILL, disks are
full by the kernel's own limit.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import layout
from checkpoints.commit import delete_checkpoint
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.reader import list_checkpoints, open_checkpoint, verify
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot
from setformer_dist.testing.threads import run_on_threads

IDENTITY = Identity(model="setformer_tiny")
KEEP_TWO = CheckpointConfig(keep_last=2, keep_best=0)
FILES = [layout.rank_file(0, 2), layout.rank_file(1, 2), layout.TRAINER, layout.MANIFEST]


def weights(step: int, numel: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32) + 1000.0 * step


def save(root: Path, step: int, world: int = 2, numel: int = 64, config: CheckpointConfig = KEEP_TWO) -> None:
    def work(comm):
        rank = comm.ranks.rank
        a, b = numel * rank // world, numel * (rank + 1) // world
        mine = [Fragment("w", "param", a, (numel,), weights(step, numel)[a:b])]
        CheckpointManager(root, comm, config).save(Snapshot(step, mine, {"step": step}, {}), IDENTITY)

    run_on_threads(world, work)


def manager(root: Path) -> CheckpointManager:
    return CheckpointManager(root, Alone(), KEEP_TWO)


def assert_holds(checkpoint, numel: int = 64) -> None:
    assert checkpoint.trainer == {"step": checkpoint.step}
    assert torch.equal(checkpoint.read_full()["w"], weights(checkpoint.step, numel))


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer by one byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first byte flipped": lambda path: flip(path, 0, 0),
    "last byte flipped": lambda path: flip(path, path.stat().st_size - 1, 7),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_makes_the_run_fall_back(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    DAMAGES[damage](layout.step_folder(tmp_path, 2) / name)
    found = manager(tmp_path)
    checkpoint = found.newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert_holds(checkpoint)
    assert [s.path.name for s in found.skipped] == ["step-00000002"]
    assert (name in found.skipped[0].reason) or name == layout.MANIFEST
    with pytest.raises(CheckpointError):
        open_checkpoint(layout.step_folder(tmp_path, 2))
    assert open_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("name", FILES)
def test_a_flip_of_any_byte_is_noticed(tmp_path, name):
    save(tmp_path, 1)
    path = layout.step_folder(tmp_path, 1) / name
    good = path.read_bytes()
    bits = random.Random(name)
    for position in range(len(good)):
        flip(path, position, bits.randrange(8))
        with pytest.raises(CheckpointError):
            verify(path.parent)
        path.write_bytes(good)
    assert_holds(open_checkpoint(path.parent))


def test_with_everything_damaged_there_is_no_checkpoint_and_every_reason_is_reported(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step)
        flip(layout.step_folder(tmp_path, step) / FILES[1], 200, 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies: .*step-00000002.*step-00000001"):
        open_checkpoint(tmp_path)
    found = manager(tmp_path)
    assert found.newest() is None
    assert [s.path.name for s in found.skipped] == ["step-00000002", "step-00000001"]
    assert caplog.text.count(f"moved to {tmp_path / 'aside'}: rank-00001-of-00002.safetensors is damaged") == 2
    assert "none of the 2 checkpoints" in caplog.text
    assert [p.name.rpartition("-")[0] for p in layout.put_aside(tmp_path)] == ["step-00000001", "step-00000002"]
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: .* 2 that did not verify are in .*aside"):
        open_checkpoint(tmp_path)


def test_a_run_that_fell_back_continues_saving_and_replaces_the_damaged(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, config=CheckpointConfig(keep_last=3))
    for step in (20, 30):
        flip(layout.step_folder(tmp_path, step) / FILES[0], 200, 1)
    save(tmp_path, 15)  # with two later folders about: its own new checkpoint must not be let go for them
    assert manager(tmp_path).newest().step == 15
    save(tmp_path, 20)
    assert manager(tmp_path).newest().step == 20
    save(tmp_path, 30)
    checkpoint = manager(tmp_path).newest()
    assert checkpoint.step == 30
    assert_holds(checkpoint)


def test_a_torn_deletion_is_no_checkpoint_and_is_finished_later(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    layout.step_folder(tmp_path, 1).joinpath(layout.MANIFEST).unlink()
    assert manager(tmp_path).newest().step == 2
    save(tmp_path, 3)
    assert [e.path.name for e in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]


def test_the_manifest_goes_first(tmp_path):
    save(tmp_path, 1)
    folder = layout.step_folder(tmp_path, 1)
    child = in_child(lambda: delete_until_stopped(folder))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not folder.exists()


def delete_until_stopped(folder: Path) -> None:
    """Delete while watching: once any file is gone, the manifest must be gone."""
    seen = []

    def watch(event: str, args: tuple) -> None:
        if event in ("os.remove", "os.rmdir"):
            seen.append(Path(args[0]).name)

    sys.addaudithook(watch)
    delete_checkpoint(folder)
    assert seen[0] == layout.MANIFEST, seen


def in_child(work: Callable[[], object]) -> int:
    """Fork a process that does the work and exits; torch is loaded already, so it starts in a millisecond."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not there after a fork, and would be waited for
            work()
            code = 0
        except BaseException:  # noqa: BLE001  (no handler above us: print it here)
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def write_for_ever(root: Path, first: int, announce: int, numel: int) -> None:
    for step in range(first, 10**6):
        save(root, step, world=2, numel=numel)
        os.write(announce, step.to_bytes(8, "little"))


def read_steps(pipe: int, count: int) -> int:
    """Wait for that many announcements, the writer being alive, and return the last, or 0 for none."""
    data = b""
    while len(data) < 8 * count:
        more = os.read(pipe, 8 * count - len(data))
        assert more, "the writer died by itself"
        data += more
    return int.from_bytes(data[-8:], "little")


@pytest.mark.parametrize(("numel", "rounds"), [(64, 60), (300_000, 30)])
def test_a_writer_killed_at_any_instant_loses_nothing(tmp_path, numel, rounds):
    chance = random.Random(numel)
    began = time.monotonic()
    save(tmp_path, 1, numel=numel)
    one_save_s = time.monotonic() - began  # instants are drawn from the time that saving takes on this machine
    newest_seen = announced = 1
    torn = 0
    for _ in range(rounds):
        read, write = os.pipe()
        child = in_child(lambda first=newest_seen + 1, end=write: write_for_ever(tmp_path, first, end, numel))
        os.close(write)
        announced = max(announced, read_steps(read, chance.randrange(3)))
        time.sleep(chance.uniform(0, 1.5 * one_save_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        with os.fdopen(read, "rb") as pipe:
            rest = pipe.read()
        announced = max(announced, int.from_bytes(rest[-8:], "little"))
        torn += bool(layout.leftovers(tmp_path))
        found = manager(tmp_path)
        checkpoint = found.newest()
        assert found.skipped == []  # nothing half-written ever shows under a checkpoint's name
        # What a finished save announced is there; at most the one that was being written is there besides.
        assert announced <= checkpoint.step <= max(announced, newest_seen) + 1
        assert checkpoint.step >= newest_seen
        assert_holds(checkpoint, numel)
        newest_seen = checkpoint.step
    assert newest_seen > rounds // 2  # the writers did write
    assert torn > rounds // 10  # and many died in the middle


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KiB; making one needs rights that not every machine gives."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_keeps_what_it_has_and_is_used_again_after_making_room(small_disk):
    save(small_disk, 1, numel=10_000, config=CheckpointConfig())
    (small_disk / "other").write_bytes(bytes(130_000))
    with pytest.raises(
        CheckpointError, match=r"No space left on device .*make room there, or lower checkpoint\.keep_last"
    ):
        save(small_disk, 2, numel=10_000, config=CheckpointConfig())
    assert layout.leftovers(small_disk) == []
    found = manager(small_disk)
    assert_holds(found.newest(), 10_000)
    (small_disk / "other").unlink()
    save(small_disk, 3, numel=10_000, config=CheckpointConfig())
    assert_holds(found.newest(), 10_000)


def test_a_write_that_the_system_refuses_on_one_rank_reaches_all_and_the_last_checkpoint_stays(tmp_path):
    save(tmp_path, 1)
    before = sorted(p.name for p in tmp_path.iterdir())

    def work(comm):
        big = comm.ranks.rank * 100_000 + 10  # only rank 1 goes over the limit
        mine = [Fragment(f"w{comm.ranks.rank}", "param", 0, (big,), torch.zeros(big))]
        with pytest.raises(CheckpointError, match=r"rank 1: OSError: \[Errno 27\] File too large"):
            CheckpointManager(tmp_path, comm, KEEP_TWO).save(Snapshot(2, mine, {}, {}), IDENTITY)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run_on_threads(2, work)

    _, status = os.waitpid(in_child(limited), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert_holds(manager(tmp_path).newest())


def test_storage_that_is_not_shared_is_noticed_and_leaves_nothing(tmp_path):
    def work(comm):
        root = tmp_path / f"host-{comm.ranks.rank}"
        mine = [Fragment("w", "param", 2 * comm.ranks.rank, (4,), torch.zeros(2))]
        with pytest.raises(CheckpointError, match=r"rank 1 does not see .*all hosts share"):
            CheckpointManager(root, comm, KEEP_TWO).save(Snapshot(1, mine, {}, {}), IDENTITY)

    run_on_threads(2, work)
    assert [list((tmp_path / f"host-{rank}").glob("*")) for rank in range(2)] == [[], []]


def test_a_root_that_is_a_file_is_an_error_on_all_ranks(tmp_path):
    root = tmp_path / "checkpoints"
    root.write_text("")

    def work(comm):
        with pytest.raises(CheckpointError, match="NotADirectoryError"):
            CheckpointManager(root, comm, KEEP_TWO).save(Snapshot(1, [], {}, {}), IDENTITY)

    run_on_threads(2, work)


def test_the_parts_of_two_checkpoints_in_one_folder_are_refused(tmp_path):
    save(tmp_path / "two", 1, world=2)
    save(tmp_path / "one", 1, world=1)
    mixed = tmp_path / "mixed" / "step-00000001"
    shutil.copytree(layout.step_folder(tmp_path / "two", 1), mixed)
    shutil.copy(layout.step_folder(tmp_path / "one", 1) / layout.MANIFEST, mixed)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00001\.safetensors is missing"):
        verify(mixed)

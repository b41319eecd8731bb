"""Storage that fails for a while: nothing is lost, moved or deleted for it, and the run's end says that it may pass."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import digest, layout
from checkpoints.config import CheckpointConfig
from checkpoints.disk import Disk
from checkpoints.errors import StorageError
from checkpoints.identity import Identity, digest_json
from checkpoints.manager import CheckpointManager
from checkpoints.policy import KEEP_TAG
from checkpoints.reader import list_checkpoints, open_checkpoint, verified
from checkpoints.testing.disk_faults import Fault, FaultyDisk
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError, TransientError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot
from setformer_dist.testing.threads import run_on_threads

IDENTITY = Identity(model="m")
RANK_FILE = layout.rank_file(0, 1)


def manager_of(root: Path, disk: Disk | None = None, comm: Any = None, **config: Any) -> CheckpointManager:
    return CheckpointManager(root, comm or Alone(), CheckpointConfig(**{"keep_last": 9, **config}), disk)


def fragment(value: float) -> list[Fragment]:
    return [Fragment("w", "param", 0, (10,), torch.full((10,), value))]


def save(root: Path, step: int, tags: tuple[str, ...] = (), disk: Disk | None = None, **config: Any) -> Path:
    return manager_of(root, disk, **config).save(Snapshot(step, fragment(step), {"step": step}, {}, tags), IDENTITY)


def steps(root: Path) -> list[int | None]:
    return [layout.step_of(folder) for folder in layout.step_folders(root)]


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Let each read of one file fail as a broken link to the storage does; the file itself stays as it is."""
    inode = path.stat().st_ino
    preadv, fdopen = os.preadv, os.fdopen

    def fail_on(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest.os, "preadv", lambda fd, *rest: (fail_on(fd), preadv(fd, *rest))[1])
        patch.setattr(digest.os, "fdopen", lambda fd, *rest: (fail_on(fd), fdopen(fd, *rest))[1])
        yield


@pytest.mark.parametrize("name", [RANK_FILE, layout.TRAINER, layout.MANIFEST])
def test_what_cannot_be_read_for_a_while_is_not_damaged(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest = layout.step_folder(tmp_path, 2)
    with unreadable(newest / name):
        found = manager_of(tmp_path)
        assert found.newest().step == 1
        assert "Input/output error" in found.skipped[0].reason
        with pytest.raises(StorageError, match="Input/output error"):
            verified(newest)
    assert manager_of(tmp_path).newest().step == 2
    assert layout.put_aside(tmp_path) == []


def test_a_run_does_not_begin_again_because_its_only_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with unreadable(folder / RANK_FILE), pytest.raises(TransientError, match="not all could be read") as caught:
        manager_of(tmp_path).newest()
    assert caught.value.exit_code == TransientError.exit_code
    assert manager_of(tmp_path).newest().step == 1


def test_a_host_that_does_not_see_the_files_moves_nothing_aside(tmp_path: Path) -> None:
    def write(comm: Any) -> None:
        manager_of(tmp_path / "host-0", comm=comm).save(Snapshot(1, fragment(1), {}, {}), IDENTITY)

    run_on_threads(2, write)

    def work(comm: Any) -> None:
        with pytest.raises(CheckpointError, match=r"rank 1 does not see .*, which rank 0 sees: .*all hosts share"):
            manager_of(tmp_path / f"host-{comm.ranks.rank}", comm=comm).newest()

    run_on_threads(2, work)
    assert steps(tmp_path / "host-0") == [1]


@pytest.mark.parametrize(
    ("number", "passes"),
    [(errno.EIO, True), (errno.ESTALE, True), (errno.ETIMEDOUT, True), (errno.EROFS, False), (errno.EACCES, False)],
)
def test_a_failed_save_says_whether_it_may_pass(tmp_path: Path, number: int, passes: bool) -> None:
    class Failing(Disk):
        def sync(self, file: Any) -> None:
            raise OSError(number, os.strerror(number))

    def work(comm: Any) -> None:
        disk = Failing() if comm.ranks.rank == 1 else Disk()
        manager = manager_of(tmp_path, disk, comm)
        with pytest.raises(CheckpointError, match="rank 1: ") as caught:
            manager.save(Snapshot(1, fragment(1), {}, {}), IDENTITY)
        assert isinstance(caught.value, TransientError) is passes
        assert caught.value.exit_code == (9 if passes else 4)

    run_on_threads(2, work)


def test_a_rank_that_is_too_slow_is_worth_another_start(tmp_path: Path) -> None:
    def work(comm: Any) -> None:
        fault = Fault("create", layout.rank_file(1, 2), "silent") if comm.ranks.rank == 1 else None
        manager = manager_of(tmp_path, FaultyDisk(fault), comm, write_timeout_minutes=0.005)
        with pytest.raises(TransientError, match="rank 1 did not finish its file in time"):
            manager.save(Snapshot(1, fragment(1), {}, {}), IDENTITY)

    run_on_threads(2, work)


def test_a_load_that_fails_may_pass_but_another_model_does_not(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manager = manager_of(tmp_path)
    checkpoint = manager.newest()
    with unreadable(folder / RANK_FILE), pytest.raises(TransientError, match="could not load"):
        manager.load(checkpoint, fragment(0))
    with pytest.raises(CheckpointError, match="another model") as caught:
        manager.load(checkpoint, [Fragment("x", "param", 0, (1,), torch.zeros(1))])
    assert not isinstance(caught.value, TransientError)


def test_retention_leaves_what_it_cannot_judge(tmp_path: Path) -> None:
    folders = [save(tmp_path, step, tags=(KEEP_TAG,) if step == 3 else ()) for step in (1, 2, 3, 4, 5)]
    body = {k: v for k, v in json.loads((folders[0] / layout.MANIFEST).read_text()).items() if k != "sha256"}
    body["version"] = 9
    (folders[0] / layout.MANIFEST).write_text(json.dumps(body | {"sha256": digest_json(body)}))
    os.truncate(folders[2] / RANK_FILE, 5)
    elsewhere = tmp_path / "elsewhere"
    folders[3].rename(elsewhere)
    folders[3].symlink_to(elsewhere)
    with unreadable(folders[1] / layout.MANIFEST):
        save(tmp_path, 6, keep_last=1, keep_best=0)
    assert steps(tmp_path) == [6, 4, 3, 2, 1]
    assert (elsewhere / layout.MANIFEST).exists()
    save(tmp_path, 7, keep_last=1, keep_best=0)  # now that it can be read it may go
    assert steps(tmp_path) == [7, 4, 3, 1]


def test_a_prune_at_the_same_time_does_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = manager_of(tmp_path)

    def gone() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "step-00000001")

    monkeypatch.setattr(manager, "list", gone)
    manager.save(Snapshot(1, fragment(1), {}, {}), IDENTITY)
    assert "could not all be deleted" in caplog.text
    assert open_checkpoint(tmp_path).step == 1


def replace(root: Path, disk: Disk | None = None) -> None:
    manager = manager_of(root, disk)
    manager.begin(Snapshot(1, fragment(1), {}, {"top1": 0.5}), IDENTITY, replace=True)
    manager.finish(last=True)


def test_a_checkpoint_is_replaced_on_request(tmp_path: Path) -> None:
    save(tmp_path, 1)
    replace(tmp_path)
    assert open_checkpoint(tmp_path).metrics == {"top1": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("kind", ["exception", "killed"])
@pytest.mark.parametrize(
    ("operation", "pattern", "metrics"),
    [
        ("sync", layout.MANIFEST, {}),
        ("rename", ".replaced-*", {}),
        ("rename", "step-00000001", {}),
        ("sync_folder", "checkpoints", {"top1": 0.5}),
        ("remove_tree", ".replaced-*", {"top1": 0.5}),
    ],
)
def test_a_fault_while_one_is_replaced_leaves_the_old_or_the_new_one(
    tmp_path: Path, kind: str, operation: str, pattern: str, metrics: dict[str, float]
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    disk = FaultyDisk(Fault(operation, pattern, kind))
    ended = in_child(lambda: replace(root, disk))
    assert (ended == -signal.SIGKILL) is (kind == "killed")
    assert manager_of(root).newest().metrics == metrics
    replace(root)
    assert manager_of(root).newest().metrics == {"top1": 0.5}
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


def in_child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork, and would be waited for
        try:
            work()
        except CheckpointError:
            os._exit(4)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_another_process_has_written_meanwhile_is_not_moved_if_it_verifies(tmp_path: Path) -> None:
    class Interrupted(Disk):
        def sync_folder(self, folder: Path) -> None:
            if folder.name.startswith(".tmp-"):
                other = manager_of(tmp_path / "other")
                other.save(Snapshot(1, fragment(7), {}, {}), IDENTITY).rename(tmp_path / "step-00000001")
            super().sync_folder(folder)

    save(tmp_path, 1, disk=Interrupted())
    assert open_checkpoint(tmp_path / "step-00000001").read_full()["w"][0] == 7
    assert layout.put_aside(tmp_path) == []
    assert layout.leftovers(tmp_path) == []


def test_folders_of_an_old_count_of_steps_are_kept_but_never_found_again(tmp_path: Path) -> None:
    for step in (4, 5, 8, 10):
        save(tmp_path, step)
    manager = manager_of(tmp_path)
    manager.save_renumbered(Snapshot(5, fragment(-5), {}, {}), IDENTITY)
    assert steps(tmp_path) == [5, 4]
    assert manager.newest().read_full()["w"][0] == -5
    kept = sorted(path.name for path in (tmp_path / layout.ASIDE).iterdir() if path.is_dir())
    assert [name.rpartition("-")[0] for name in kept] == [f"superseded-step-{step:08d}" for step in (5, 8, 10)]
    for step in (6, 7, 8, 10):  # names that the old count had used are free, and retention leaves what was kept
        save(tmp_path, step, keep_last=1)
        assert open_checkpoint(tmp_path).step == step
    assert sorted(path.name for path in (tmp_path / layout.ASIDE).iterdir() if path.is_dir()) == kept


def test_what_is_gone_back_behind_is_kept_but_never_found_again(tmp_path: Path) -> None:
    for step in (4, 5, 8, 10):
        save(tmp_path, step)
    manager = manager_of(tmp_path)
    assert manager.newest_before(4, "another incident") is None
    assert steps(tmp_path) == [10, 8, 5, 4]  # with nothing to go back to, all stay
    assert manager.newest_before(8, "another incident").step == 5
    assert steps(tmp_path) == [5, 4]
    kept = sorted(path for path in (tmp_path / layout.ASIDE).iterdir() if path.is_dir())
    assert [path.name.rpartition("-")[0] for path in kept] == ["superseded-step-00000008", "superseded-step-00000010"]
    assert layout.reason_file(kept[0]).read_text() == "another incident\n"
    assert manager.newest().step == 5


def test_a_kill_while_they_are_put_aside_leaves_one_to_continue_from(tmp_path: Path) -> None:
    for step in (4, 8, 10):
        save(tmp_path, step)
    disk = FaultyDisk(Fault("rename", "superseded-step-00000008-*", "killed"))
    assert in_child(lambda: manager_of(tmp_path, disk).newest_before(8, "another incident")) == -signal.SIGKILL
    assert steps(tmp_path) == [8, 4]  # which is why the guard keeps how far it goes back until it has
    assert manager_of(tmp_path).newest_before(8, "another incident").step == 4
    assert steps(tmp_path) == [4]


def test_without_room_for_the_first_of_a_new_count_the_old_one_stays(tmp_path: Path) -> None:
    save(tmp_path, 10)
    disk = FaultyDisk(Fault("write", RANK_FILE, "disk full"))
    with pytest.raises(CheckpointError, match="No space left"):
        manager_of(tmp_path, disk, on_disk_full="continue").save_renumbered(Snapshot(5, fragment(5), {}, {}), IDENTITY)
    assert [entry.manifest.step for entry in list_checkpoints(tmp_path) if entry.manifest] == [10]

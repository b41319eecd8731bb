"""A run folder in use: who holds it is named, and a holder that is gone is recognised, here and from another host.

The other host is a process with its own host name and its own process ids (namespaces), so nothing of it can be asked.
Storage on which its locks are not seen is a lock that its holder does not take: it keeps the note and the time alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.layout import step_folders
from checkpoints.manager import CheckpointManager
from launch.ckpt.prune import prune
from launch.history.show import state_of
from launch.ranks import holder
from launch.ranks.holder import LOCK_FILE, look, this_process, why_held
from launch.ranks.lock import check_free, held, supervising
from launch.testing.commands import ROOT
from setformer_dist.core import ledger
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import LaunchError, TransientError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot

# Holds the folder as a supervisor does. "unseen": on storage whose locks do not reach this host.
HOLD = """
import fcntl, sys, time
from pathlib import Path
from launch.ranks import lock
if sys.argv[2] == "unseen":
    fcntl.lockf = lambda *words: None
with lock.supervising(Path(sys.argv[1]), timeout_s=0.3, stale_s=2.0) as folder:
    print("held", flush=True)
    while folder.fault() is None:
        folder.show_life()
        time.sleep(0.1)
    print(folder.fault(), flush=True)
"""
OTHER_HOST = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
              'hostname elsewhere && exec "$@"', "sh"]  # fmt: skip


def _can_be_another_host() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*OTHER_HOST, "true"], capture_output=True, check=False).returncode == 0


other_host = pytest.mark.skipif(not _can_be_another_host(), reason="namespaces take root and unshare")


@contextlib.contextmanager
def holding(folder: Path, *prefix: str, how: str = "seen") -> Iterator[subprocess.Popen[str]]:
    """Have a process hold a folder; kill it at the end."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLD, str(folder), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["seen", "unseen"])
def test_a_live_holder_of_this_host_is_named(tmp_path: Path, how: str) -> None:
    with holding(tmp_path, how=how) as process:
        time.sleep(0.5)
        says = rf"host {this_process().host}, process {process.pid}, running for \d.* s, last sign of life 0\.\d s ago"
        with pytest.raises(LaunchError, match=says), supervising(tmp_path, timeout_s=0.5):
            pass
        with pytest.raises(LaunchError, match=f"process {process.pid}"), held(tmp_path, Alone(), timeout_s=0.3):
            pass
    with supervising(tmp_path, timeout_s=0.0):  # killed, and known at once
        pass
    assert look(tmp_path)[0] is None, "who ends well takes its note along"


@other_host
@pytest.mark.parametrize("how", ["seen", "unseen"])
def test_a_live_holder_of_another_host_is_named(tmp_path: Path, how: str) -> None:
    with holding(tmp_path, *OTHER_HOST, how=how):
        with pytest.raises(LaunchError, match=r"host elsewhere, process \d+, .* last sign of life 0\.\d s ago"):
            supervising(tmp_path, timeout_s=0.5, stale_s=5.0).__enter__()
        ledger.record(tmp_path, "attempt", number=1, ranks=1)
        assert state_of(tmp_path) == "running on elsewhere, or killed"


@other_host
def test_a_dead_holder_of_another_host_is_recognised_by_its_silence(tmp_path: Path) -> None:
    with holding(tmp_path, *OTHER_HOST):
        pass
    note, _ = look(tmp_path)
    assert note is not None
    assert note.host == "elsewhere"
    assert note.lives() is None
    begun = time.monotonic()
    with supervising(tmp_path, timeout_s=0.0, stale_s=1.5):
        assert time.monotonic() - begun == pytest.approx(1.5, abs=1.0)


@other_host
@pytest.mark.parametrize("hours", [-9, 9])
def test_clocks_need_not_agree(tmp_path: Path, hours: int) -> None:
    """The time of the file is the other host's, hours away, and it is its change alone that counts."""
    with holding(tmp_path, *OTHER_HOST):
        pass
    path, over = tmp_path / LOCK_FILE, threading.Event()
    os.utime(path, (time.time() + 3600 * hours,) * 2)

    def beat() -> None:
        while not over.wait(0.2):
            os.utime(path, (time.time() + 3600 * hours,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "elsewhere" in str(why_held(tmp_path, 0.5, 1.0))
    finally:
        over.set()
        thread.join()
    assert why_held(tmp_path, 0.5, 1.0) is None


@other_host
def test_who_was_taken_for_dead_ends_when_it_comes_back(tmp_path: Path) -> None:
    with holding(tmp_path, *OTHER_HOST, how="unseen") as process:
        inside = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        os.kill(inside, signal.SIGSTOP)
        with supervising(tmp_path, timeout_s=0.0, stale_s=1.0) as folder:
            os.kill(inside, signal.SIGCONT)
            assert process.stdout is not None
            said = process.stdout.readline()
            assert f"was taken over by host {this_process().host}, process {os.getpid()}" in said
            assert folder.fault() is None
            assert look_without_closing(tmp_path) == os.getpid(), "the note is still the new holder's"


def look_without_closing(folder: Path) -> int:
    """Return the process in the note; a process that holds the lock must not open and close the file."""
    text = subprocess.check_output(["cat", str(folder / LOCK_FILE)])
    return int(json.loads(text)["pid"])


def test_a_process_id_that_was_given_again_is_no_holder(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        note, _ = look(tmp_path)
        assert note is not None
        assert note.lives() is True
        changed = json.loads((tmp_path / LOCK_FILE).read_text())
    changed |= {"pid": os.getpid()}  # a process of that number lives, and was not started then
    (tmp_path / LOCK_FILE).write_text(json.dumps(changed))
    note, _ = look(tmp_path)
    assert note is not None
    assert note.lives() is False
    with supervising(tmp_path, timeout_s=0.0):
        pass
    assert process.returncode is not None


def note_of_elsewhere(**values: object) -> str:
    return json.dumps({**dataclasses.asdict(this_process()), "boot": "another", **values})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"host": 3}', "x" * 100_000, "[" * 1000, "\0" * 1024, note_of_elsewhere(pid="../self")]
    + [note_of_elsewhere(since=since) for since in (float("nan"), float("inf"), -1.0, 1e300)],
)
def test_a_damaged_note_holds_nobody_up(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with supervising(tmp_path, timeout_s=0.0):
        assert look_without_closing(tmp_path) == os.getpid()


def test_a_note_that_nothing_equals_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """A time that is not a number differs from itself, so that the note seemed to change with each look."""
    (tmp_path / LOCK_FILE).write_text(note_of_elsewhere(since=float("nan")))
    assert why_held(tmp_path, 0.0, 0.5) is None


def test_a_note_cannot_steer_a_terminal(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(note_of_elsewhere(host="a b\x1b[31m\n", since=0.0))
    note, _ = look(tmp_path)
    assert note is not None
    assert note.told() == f"host a b\\x1b[31m\\n, process {os.getpid()}"


def test_notes_that_change_hands_are_a_sign_of_life(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    over = threading.Event()

    def take() -> None:
        number = 0
        while not over.wait(0.05):
            number += 1
            aside = path.with_name("aside")
            aside.write_text(note_of_elsewhere(token=str(number)))
            aside.replace(path)

    path.write_text(note_of_elsewhere())
    thread = threading.Thread(target=take)
    thread.start()
    try:
        assert str(why_held(tmp_path, 1.0, 0.5)).startswith("host ")
    finally:
        over.set()
        thread.join()


def test_rank_0_of_another_launcher_gives_signs_of_life_and_ends_when_it_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from launch.ranks import lock; "
        "from setformer_dist.core.comm import Alone\n"
        "lock._SIGN_EVERY_S = 0.1\n"
        "with lock.held(Path(sys.argv[1]), Alone()): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = look(tmp_path)
        time.sleep(0.5)
        assert look(tmp_path)[0] == before[0]
        assert look(tmp_path)[1] > before[1]
        other = os.open(tmp_path / LOCK_FILE, os.O_RDWR)
        holder.write_note(other, this_process())
        os.close(other)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == TransientError.exit_code
    assert "was taken over by" in said


def test_the_state_of_a_run_tells_a_killed_one_from_a_running_one(tmp_path: Path) -> None:
    with holding(tmp_path):
        ledger.record(tmp_path, "attempt", number=1, ranks=1)
        assert state_of(tmp_path) == "running"
    assert state_of(tmp_path) == "killed"


def test_a_tool_changes_no_checkpoints_of_a_run_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        fragments = [Fragment("w", "param", 0, (2,), torch.ones(2))]
        manager = CheckpointManager(tmp_path / "checkpoints", Alone(), CheckpointConfig(keep_last=9))
        manager.save(Snapshot(step, fragments, {}, {}), Identity(model="m"))
    with holding(tmp_path):
        for path in (tmp_path, tmp_path / "checkpoints", Path()):
            monkeypatch.chdir(tmp_path / "checkpoints")
            with pytest.raises(LaunchError, match="another process trains"):
                prune(path, {"keep_last": 1}, False, Console(quiet=True))
        prune(tmp_path, {"keep_last": 1}, True, Console(quiet=True))
        assert len(step_folders(tmp_path / "checkpoints")) == 2
    os.utime(tmp_path / LOCK_FILE, (1e9, 1e9))
    prune(tmp_path, {"keep_last": 1}, False, Console(quiet=True))
    assert len(step_folders(tmp_path / "checkpoints")) == 1
    assert (tmp_path / LOCK_FILE).stat().st_mtime == 1e9  # the supervisor's last sign of life, not the tool's


def test_a_dry_run_is_refused_as_the_run_would_be(tmp_path: Path) -> None:
    check_free(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    with holding(tmp_path), pytest.raises(LaunchError, match="another process trains"):
        check_free(tmp_path)
    check_free(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TransientError, match="file is no folder"):
        check_free(tmp_path / "file" / "run")
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(LaunchError, match="not a plain file"):
        check_free(tmp_path)


def test_a_dry_run_is_refused_on_a_read_only_disk(tmp_path: Path) -> None:
    words = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(TransientError, match="read-only, or another user's"):
            check_free(tmp_path / "run")
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)

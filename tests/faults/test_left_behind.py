"""What a run leaves to others: locks, ledgers, state files, temporary files, semaphores, and lost terminals."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ranks.lock import held, supervising
from launch.ranks.orphans import SCRATCH_VARIABLE, Guardian, remove_ownerless
from launch.testing.commands import ROOT
from setformer_dist.core import ledger
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError, LaunchError
from setformer_dist.core.files import read_state, write_json, write_state
from setformer_dist.core.terminal import Tolerant
from setformer_dist.engine.config import GuardConfig
from setformer_dist.engine.guard import GUARD_COPY, GUARD_FILE, Guard, Incident, read_guard

OLD_LINE = '{"event": "began", "time": 1.0, "step": 3}\n'
# Holds the lock as a supervisor does, or has a guardian watch a session with a semaphore; then waits to be killed.
HOLD = """
import sys, time
from pathlib import Path
from launch.ranks.lock import supervising
with supervising(Path(sys.argv[1])) as folder:
    print("held", flush=True)
    for _ in range(600):
        folder.show_life()
        time.sleep(0.1)
"""
WATCH = """
import os, subprocess, sys, time
from launch.ranks.orphans import Guardian
with Guardian() as guardian:
    code = '''
import multiprocessing, time
from launch.ranks.orphans import use_scratch
use_scratch()
lock = multiprocessing.get_context("forkserver").Lock()
multiprocessing.util.get_temp_dir()
print("ready", flush=True)
time.sleep(60)
'''
    rank = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **guardian.environment}, stdout=subprocess.PIPE,
        start_new_session=True,
    )
    guardian.watch(rank.pid)
    rank.stdout.readline()
    print(rank.pid, guardian.folder, flush=True)
    time.sleep(60)
"""


def started(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_second_supervisor_writes_nothing_into_the_run(tmp_path: Path) -> None:
    process = started(HOLD, str(tmp_path))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match="another process trains"), supervising(tmp_path, timeout_s=0.3):
            pass
        with pytest.raises(LaunchError, match="another process trains"), held(tmp_path, Alone(), timeout_s=0.3):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [ledger.LOCK_FILE]
        with held(tmp_path, Alone(), timeout_s=0.3, supervised=True):  # its own rank 0
            pass
    finally:
        process.kill()
        process.communicate()


def test_the_ledger_of_a_killed_supervisor_adds_up_to_the_wall_time(tmp_path: Path) -> None:
    process = started(HOLD, str(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    begun = time.time()
    ledger.record(tmp_path, "attempt", number=1, ranks=1)
    ledger.record(tmp_path, "began", step=0)
    time.sleep(2.0)
    process.kill()
    process.communicate()
    wall = time.time() - begun
    shown = ledger.account(ledger.read_events(tmp_path))  # while nobody has started it again
    assert shown.total == pytest.approx(wall, abs=0.3)
    last = (tmp_path / "run.lock").stat().st_mtime
    os.utime(tmp_path / "run.lock", (begun + 1e6, begun + 1e6))  # a clock that was wrong
    assert ledger.account(ledger.read_events(tmp_path)).total < 60
    os.utime(tmp_path / "run.lock", (last, last))
    time.sleep(1.0)  # no run's time
    with supervising(tmp_path) as folder:
        ledger.close_killed(tmp_path, folder.seen)
        folder.show_life()
    account = ledger.account(ledger.read_events(tmp_path))
    assert account.total == pytest.approx(wall, abs=0.3)
    assert [how for _, how, _ in account.failures] == ["supervisor killed"]


def test_a_ledger_line_that_was_changed_is_passed_over(tmp_path: Path) -> None:
    for step in (0, 10):
        ledger.record(tmp_path, "began", step=step)
    path = tmp_path / ledger.LEDGER
    path.write_text(
        path.read_text().replace('"step": 10', '"step": 90') + '{"event": "began", "time": 1.0, "step": 3}\n'
    )
    assert [event["step"] for event in ledger.read_events(tmp_path)] == [0, 3]  # the last as earlier versions wrote it


def test_a_removed_folder_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    with supervising(folder) as run:
        assert run.fault() is None
        (folder / "checkpoints").rename(folder / "gone")
        run.fault()
        time.sleep(0.7)
        assert "checkpoints was moved or removed" in str(run.fault())


def test_a_killed_supervisor_leaves_no_process_folder_or_semaphore() -> None:
    process = started(WATCH)
    assert process.stdout is not None
    pid, folder = process.stdout.readline().split()
    name = Path(folder).name
    assert Path(folder).is_dir()
    assert list(Path("/dev/shm").glob(f"sem.{name}-*"))
    process.kill()
    process.communicate()
    limit = time.monotonic() + 2
    while (
        Path(folder).exists() or list(Path("/dev/shm").glob(f"sem.{name}-*")) or Path(f"/proc/{pid}/cmdline").exists()
    ):
        if (
            Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        ):
            break
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_what_has_no_owner_goes_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "sf-1-dead").mkdir()
    (tmp_path / "sf-1-dead" / "owned").touch()
    (tmp_path / "sf-4194305-late" / "session").mkdir(parents=True)  # written while it was removed; no such process
    (tmp_path / f"sf-{os.getpid()}-made").mkdir()  # is being made
    with Guardian() as alive:
        assert SCRATCH_VARIABLE in alive.environment
        remove_ownerless(tmp_path)
        remove_ownerless(alive.folder.parent)
        assert alive.folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"sf-{os.getpid()}-made"]
    assert not alive.folder.exists()


INCIDENT = Incident(7, float("nan"), "nonfinite", "rollback")


@pytest.mark.parametrize(
    "damage", [b"", b'{"passed_over": [7', b"\x00\xff", b"[]", b"null", b'{"passed_over": ["7"]}', None]
)
@pytest.mark.parametrize("name", [GUARD_FILE, GUARD_COPY])
def test_one_damaged_guard_file_costs_nothing_and_two_stop_the_run(
    tmp_path: Path, name: str, damage: bytes | None
) -> None:
    Guard(GuardConfig(nonfinite="rollback"), tmp_path, Alone()).remember(INCIDENT)
    text = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(text.replace(b"7", b"6", 1) if damage is None else damage)
    again = Guard(GuardConfig(), tmp_path, Alone())
    again.load()
    assert again.passes_over(7)
    assert not again.passes_over(6)
    for both in (GUARD_FILE, GUARD_COPY):
        (tmp_path / both).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"guard\.json is damaged.*steps that this run skips are not known"):
        again.load()
    for both in (GUARD_FILE, GUARD_COPY):
        (tmp_path / both).write_bytes(b'{"passed_over": 7}')
    with pytest.raises(CheckpointError, match=r"passed_over = 7: input should be a valid list") as refused:
        again.load()
    assert "://" not in str(refused.value)


def test_a_guard_file_of_an_earlier_version_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / GUARD_FILE, {"passed_over": [3]})
    assert read_guard(tmp_path).passed_over == [3]
    assert "earlier version" in caplog.text


def test_a_state_file_has_a_digest_and_only_numbers_of_json(tmp_path: Path) -> None:
    write_state(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert read_state(tmp_path / "a.json") == ({"x": None, "y": [None, 1.5]}, True)
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("1.5", "2.5"))
    with pytest.raises(ValueError, match="own digest"):
        read_state(tmp_path / "a.json")
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_a_terminal_that_goes_away_takes_nobody_along() -> None:
    main, side = pty.openpty()
    stream = os.fdopen(side, "w", buffering=1)
    out = Tolerant(stream)
    assert out.isatty()
    print("seen", file=out)
    os.close(main)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):  # what the stream itself does
        os.write(side, b"x")
    print("not seen", file=out)
    out.flush()


def test_a_pipe_nobody_reads_and_a_full_disk_take_nobody_along() -> None:
    read, write = os.pipe()
    os.close(read)
    for stream in (os.fdopen(write, "w", buffering=1), open("/dev/full", "w", buffering=1)):  # noqa: SIM115, PTH123
        out = Tolerant(stream)
        print("not seen", file=out)
        out.flush()

"""What surrounds a run: networks, shared memory, its folder, its report, mounts of a drill, the clock of its ledger."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dataloaders import PackOptions, pack_image_folder
from launch.testing.commands import (
    ROOT,
    assert_gone,
    children,
    environment,
    losses,
    setformer,
    start,
    train_words,
    wait_for,
)
from setformer_dist.core import ledger
from setformer_dist.core.shared_memory import NO_SHARED_MEMORY

LONG = "schedule.epochs=50"


def listening(pids: list[int]) -> set[str]:
    """Return the addresses on which processes listen."""
    found = set()
    for pid in pids:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip)
    return found


@pytest.mark.drill
def test_a_run_listens_on_the_loopback_alone_and_ends_when_its_folder_is_removed(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    process = start(*train_words(digits, tmp_path, LONG, "data.workers=1"))
    wait_for(run / "checkpoints" / "step-00000005" / "manifest.json", process)
    ranks = children(process.pid)
    assert listening([process.pid, *ranks]) <= {"127.0.0.1", "::1"}
    assert listening(ranks)  # the ranks' meeting place, and gloo's
    run.rename(tmp_path / "away")  # at one instant: a removal races with what is being written
    shutil.rmtree(tmp_path / "away")
    gone = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 9, err
    assert time.monotonic() - gone < 10
    assert f"error: {run} was moved or removed while the run was at work in it" in err
    assert "Traceback" not in err
    assert_gone(ranks)
    assert not run.exists()  # nothing writes another folder of its name


@pytest.fixture
def tiny_shared_memory() -> Iterator[Path]:
    """64 KiB in the place of /dev/shm, in this process's own namespace of mounts and in those that it starts."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield Path("/dev/shm")
    finally:
        subprocess.run(["umount", "--lazy", "/dev/shm"], check=True)


@pytest.mark.parametrize("filled", [0, 64 << 10], ids=["too small", "full"])
def test_shared_memory_that_is_full_is_one_sentence(
    digits: Path, tmp_path: Path, tiny_shared_memory: Path, filled: int
) -> None:
    (tiny_shared_memory / "others").write_bytes(b"x" * filled)
    ended = setformer(*train_words(digits, tmp_path, "data.workers=1", ranks=1), "--restarts", "0")
    assert ended.code == 9, ended.err
    assert ended.error_lines[0] == f"error: {NO_SHARED_MEMORY}"
    assert all(NO_SHARED_MEMORY in line for line in ended.error_lines)  # the supervisor quotes it
    assert "Traceback" not in ended.err


@pytest.mark.drill
def test_a_name_that_is_no_text_reaches_the_report_and_a_report_that_fails_costs_nothing(
    digits: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for split in ("train", "val"):
        shutil.copytree(digits / "images" / split, images / split)
        (images / split / "3").rename(images / split / os.fsdecode(b"dr\xe9i"))
        pack_image_folder(images / split, tmp_path / "data" / split, PackOptions())
    words = train_words(tmp_path / "data", tmp_path, "eval.every_epochs=1", ranks=1)
    run = tmp_path / "demo"
    first = setformer(*words)
    assert first.code == 0, first.err
    assert "warning" not in first.err
    page = (run / "report.html").read_text(encoding="utf-8")  # strictly
    assert "dr\\xe9i" in page or "dr\\udce9i" in page
    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # a report cannot be written there
    again = setformer(*words)
    assert again.code == 0, again.err
    warnings = [line for line in again.err.splitlines() if "report" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: the run is done and saved, but its report could not be written (")
    assert "Traceback" not in again.err


MOUNTED = """
import sys, time
from pathlib import Path
from launch.drill.drill import small_disk
with small_disk(Path(sys.argv[1])) as mounted:
    print(mounted, flush=True)
    time.sleep(60)
"""


def test_a_drill_that_is_killed_leaves_no_mount(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MOUNTED, str(tmp_path / "disk")],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    mounted = process.stdout.readline().strip()
    seen = [str(tmp_path) in Path(f"/proc/{at}/mounts").read_text() for at in (process.pid, "self")]
    process.kill()
    process.communicate()
    if mounted != "True":
        pytest.skip("no file system can be mounted here")
    assert seen == [True, False]
    for mounts in Path("/proc").glob("[0-9]*/mounts"):
        try:
            assert str(tmp_path) not in mounts.read_text()
        except OSError:  # it ended
            continue
    shutil.rmtree(tmp_path / "disk")  # it would be busy


@pytest.mark.drill
def test_the_ledger_of_a_long_run_adds_up_where_its_supervisor_was_killed(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    words = train_words(digits, tmp_path, "schedule.epochs=8", "checkpoint.every_steps=20")
    process = start(*words)
    wall = -time.time()  # it exists now; what it is forked from may have had to start first
    while not (run / "metrics.jsonl").exists() or max((step for _, step in losses(run)), default=0) < 70:
        assert process.poll() is None
        time.sleep(0.1)
    ranks = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    wall += time.time()
    assert_gone(ranks)
    killed = ledger.account(ledger.read_events(run)).total
    assert killed == pytest.approx(wall, abs=1.0)  # the supervisor shows life twice a second
    time.sleep(5.0)  # no run's time
    wall -= time.time()
    again = setformer(*words)
    wall += time.time()
    assert again.code == 0, again.err
    account = ledger.account(ledger.read_events(run))
    # 1 %, and half a second at most that could not be observed: a supervisor shows life twice a second.
    assert account.total == pytest.approx(wall, abs=0.5 + 0.01 * wall)
    assert [how for _, how, _ in account.failures] == ["supervisor killed"]
    assert account.steps_lost < 20 + 10  # since the last checkpoint, which may have been in the making

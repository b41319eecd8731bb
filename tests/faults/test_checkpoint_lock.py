"""One run folder, one run: a second one is refused by name, and the lock goes with the process that held it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launch.ranks.lock import LOCK_FILE, held
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import LaunchError
from setformer_dist.testing.threads import run_on_threads


def holder(folder: Path) -> int:
    """Fork a process that holds the folder's lock until it is killed; return when it has it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with held(folder, Alone()):
                os.write(write, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as reader:
        assert reader.read(1) == b"x"
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_run_in_the_folder_is_refused_on_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    pid = holder(folder)

    def work(comm):
        with pytest.raises(LaunchError, match=rf"another process trains in run folder {folder}"):
            held(folder, comm, timeout_s=0.3).__enter__()

    try:
        run_on_threads(2, work)
    finally:
        kill(pid)
    with held(folder, Alone(), timeout_s=0):  # the kernel has let go of it
        assert (folder / LOCK_FILE).exists()


def test_a_predecessor_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    pid = holder(tmp_path)
    ender = os.fork()
    if ender == 0:
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    with held(tmp_path, Alone(), timeout_s=30):
        pass
    for child in (ender, pid):
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"file/demo cannot be written"), held(tmp_path / "file" / "demo", Alone()):
        pass

"""launch.testing.commands: what a command finds that a test or a benchmark starts, and what it has started in turn."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, children, environment


def test_commands_find_what_this_process_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages on the path alone, too (docs/gpu.md)."""
    monkeypatch.setenv("PYTHONPATH", "/site")
    assert environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/site"
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"] == str(ROOT)


@pytest.mark.parametrize("listed", [True, False])
def test_children_are_found_by_any_kernel(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/PID/task/PID/children is an option of Linux."""
    words = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        if not listed:
            read = Path.read_text

            def refused(path: Path) -> str:
                if path.name == "children":
                    raise FileNotFoundError(path)
                return read(path)

            monkeypatch.setattr(Path, "read_text", refused)
        assert children(process.pid) == [child]
        os.kill(child, signal.SIGKILL)
    assert not children(process.pid)

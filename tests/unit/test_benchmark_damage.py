"""The damage benchmark distinguishes a loader that hangs from one that is slow."""

import selectors
import subprocess
import sys

import pytest

from benchmarks import damage


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(60)", "hangs"),
        ("while True: pass", "timed"),
        ("import time; s = time.monotonic()\nwhile time.monotonic() < s + 0.5: pass\nprint(1)", ""),
    ],
)
def test_a_loader_that_hangs_is_distinguished_from_one_that_computes(monkeypatch, program, said):
    monkeypatch.setattr(damage, "_PATIENCE", 4)
    command = [sys.executable, "-S", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        lines = selectors.DefaultSelector()
        lines.register(process.stdout, selectors.EVENT_READ)
        lines.select(0.4)  # its own start
        assert damage._silence(process.pid, lines, 0.5).partition(" ")[0] == said
        process.kill()

"""Forked commands are processes like others: exit codes, signals, descriptors, environment; none outlives the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.ranks.forkserver import start_server
from launch.testing.commands import alive, assert_gone, environment
from launch.testing.warm import Warm, possible

pytestmark = pytest.mark.skipif(not possible(), reason="commands start cold here")

PROGRAM = """
import os, signal, sys, time
what = sys.argv[1]
if what == "facts":
    fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1]  # without that of the listing
    handlers = {signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)}
    print(__name__, fds, handlers, os.environ["FLAVOUR"], os.environ.get("TASTE"), os.getcwd())
    print("to stderr", file=sys.stderr)
elif what == "code":
    sys.exit(3)
elif what == "sentence":
    sys.exit("that went wrong")
elif what == "error":
    raise ValueError("unforeseen")
else:
    print("running", flush=True)
    time.sleep(100)
"""


def run(folder: Path, what: str, **variables: str) -> tuple[Warm, str, str]:
    (folder / "warm_program.py").write_text(PROGRAM)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Warm(["warm_program", what], {"PATH": "", **variables}, folder, out, err)
        said, errors = process.communicate(60)
    return process, said, errors


def test_it_has_its_own_environment_and_nobody_elses_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASTE", "of the tests")
    process, out, err = run(tmp_path, "facts", FLAVOUR="own")
    assert process.returncode == 0
    handlers = {signal.SIG_DFL}
    assert out == f"__main__ [0, 1, 2] {handlers} own None {tmp_path}\n"
    assert err == "to stderr\n"


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [("code", 3, ""), ("sentence", 1, "that went wrong"), ("error", 1, "ValueError: unforeseen")],
)
def test_it_ends_as_python_ends(tmp_path: Path, what: str, code: int, last: str) -> None:
    process, out, err = run(tmp_path, what)
    cold = subprocess.run(
        [sys.executable, "-m", "warm_program", what], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == cold.returncode == code
    assert out == cold.stdout
    assert err.strip().splitlines()[-1:] == cold.stderr.strip().splitlines()[-1:] == ([last] if last else [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "warm_program.py").write_text(PROGRAM)
    with (tmp_path / "out").open("w+b") as out:
        process = Warm(["warm_program", "wait"], environment(), tmp_path, out)
        while not (tmp_path / "out").read_text().startswith("running"):
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(30) == -number


def test_a_signal_to_a_process_that_was_just_forked_is_not_lost() -> None:
    """The forking one has handlers of its own, as a supervisor; what they take must not be taken in the fork."""
    code = (
        "import os, signal, time; from launch.ranks.forkserver import fork\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: None)\n"
        "for _ in range(20):\n"
        "    pid = fork(lambda: time.sleep(5), {0: os.open(os.devnull, os.O_RDONLY)})\n"
        "    os.kill(pid, signal.SIGTERM)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_none_outlives_the_tests(tmp_path: Path) -> None:
    (tmp_path / "warm_program.py").write_text(PROGRAM)
    code = (
        "from pathlib import Path; import os, time; from launch.testing.warm import Warm\n"
        f"folder = Path({str(tmp_path)!r}); out = (folder / 'out').open('w+b')\n"
        "print(Warm(['warm_program', 'wait'], os.environ, folder, out).pid, flush=True)\n"
        "while not (folder / 'out').read_text(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)"
    )
    tests = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert tests.returncode == -signal.SIGKILL, tests.stderr
    assert_gone([int(tests.stdout)])
    assert not alive(int(tests.stdout))


def test_pyarrow_starts_no_thread_in_a_server(tmp_path: Path) -> None:
    """DeepSpeed imports it by way of mlflow and pandas, where they are installed; with a thread there is no fork."""
    pytest.importorskip("pyarrow")
    (tmp_path / "counts.py").write_text(
        "import pathlib, pyarrow\n"
        "from launch.ranks.forkserver import threads\n"
        f"pathlib.Path({str(tmp_path / 'threads')!r}).write_text(str(threads()))\n"
    )
    requests, server = start_server("counts", {**os.environ, "PYTHONPATH": str(tmp_path)})
    with requests:
        assert server.wait(60) == 0
    assert (tmp_path / "threads").read_text() == "1"

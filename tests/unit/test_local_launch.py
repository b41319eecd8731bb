"""Ranks of one host: real processes, real signals, real kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch.ranks.environment import choose_port, rank_environment, usable_cores
from launch.ranks.local import run_local
from launch.ranks.logs import last_error_line, log_file
from setformer_dist.core.errors import LaunchError, RankFailedError

REPOSITORY = Path(__file__).resolve().parents[2]

# What a rank does in these tests. It leaves its pid, so that a test can see whether it is still there.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank, folder, what = int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2]

def say(name, text):
    (folder / f"{name}-{rank}.part").write_text(str(text))
    (folder / f"{name}-{rank}.part").rename(folder / f"{name}-{rank}")

def checkpoint(number, frame):
    say("signalled", time.monotonic())
    time.sleep(0.3 if what != "deaf" else 60)
    say("saved", "yes")
    sys.exit(0)

if what in ("train", "deaf", "worker"):
    signal.signal(signal.SIGTERM, checkpoint)
if what in ("early", "lost") and rank == 1:  # it waits for rank 0 in a collective, and says that it lost it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(6))
if what == "lost" and rank == 0:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
if what == "worker":
    say("worker", subprocess.Popen(["sleep", "60"]).pid)
say("pid", os.getpid())
if what == "env":
    names = ("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS "
             "SETFORMER_LOG_DIR LOCAL_SIZE").split()
    say("env", " ".join(f"{n}={os.environ.get(n)}" for n in names))
    print("out of rank", rank, flush=True)
elif what == "boom":
    if rank == 1:
        while not (folder / "pid-0").exists(): time.sleep(0.01)
        raise RuntimeError("the third shard is wet")
    time.sleep(60)
elif what == "echo":  # rank 1 fails, rank 0 notices a moment later, as over a broken connection
    if rank == 1:
        say("failing", "")
        os._exit(3)
    while not (folder / "failing-1").exists(): time.sleep(0.001)
    time.sleep(0.2)
    raise ConnectionError("peer closed")
elif what == "killed":
    if rank == 0:
        while not (folder / "pid-1").exists(): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
elif what in ("train", "deaf", "worker", "early", "lost"):
    for _ in range(600): time.sleep(0.1)  # a signal just before one long sleep would be heeded after it
"""

SUPERVISOR = """
import signal, sys
from pathlib import Path
from launch.ranks.local import run_local
from setformer_dist.core.errors import RankFailedError
folder, what, grace = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
# Whoever runs the tests in the background has these ignored, and run_local would leave them so.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
try:
    sys.exit(run_local([str(folder), what], 2, folder / "logs", module="rank_program", grace_s=grace))
except RankFailedError as error:
    sys.exit(error.exit_code)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rank_program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    return tmp_path


def run(folder, what, ranks=2, **options):
    return run_local([str(folder), what], ranks, folder / "logs", module="rank_program", **options)


def supervise(folder, what, grace=20.0, *more):
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(folder), what, str(grace), *more], start_new_session=True
    )


def wait_for(condition, seconds=20.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.01)


def pids(folder, name="pid", ranks=2):
    paths = [folder / f"{name}-{rank}" for rank in range(ranks)]
    wait_for(lambda: all(p.exists() for p in paths))
    return [int(p.read_text()) for p in paths]


def alive(pid: int) -> bool:
    try:
        # A zombie that its new parent has not reaped yet is dead for all purposes.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_ranks_get_their_place_and_their_log(folder, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert run(folder, "env") == 0
    seen = [dict(p.split("=", 1) for p in (folder / f"env-{r}").read_text().split()) for r in range(2)]
    assert [s["RANK"] for s in seen] == ["0", "1"]
    assert [s["LOCAL_RANK"] for s in seen] == ["0", "1"]
    assert {s["WORLD_SIZE"] + s["LOCAL_WORLD_SIZE"] for s in seen} == {"22"}
    assert {s["MASTER_ADDR"] for s in seen} == {"127.0.0.1"}
    assert len({s["MASTER_PORT"] for s in seen}) == 1
    assert {s["OMP_NUM_THREADS"] for s in seen} == {str(max(1, usable_cores() // 2))}
    assert {s["SETFORMER_LOG_DIR"] for s in seen} == {str(folder / "logs")}
    assert {s["LOCAL_SIZE"] for s in seen} == {"None"}
    assert capfd.readouterr().out == "out of rank 0\n"
    assert "out of rank 1" in log_file(folder / "logs", 1).read_text()


def test_logs_are_appended_to_with_a_header_per_start(folder):
    run(folder, "env")
    run(folder, "env")
    text = log_file(folder / "logs", 1).read_text()
    assert text.count("=== rank 1 of 2") == 2
    assert text.count("out of rank 1") == 2
    assert log_file(folder / "logs", 0).read_text().count("=== rank 0 of 2") == 2


def test_the_failing_rank_is_named_and_the_others_end(folder):
    with pytest.raises(RankFailedError, match="rank 1 ended with exit code 1") as caught:
        run(folder, "boom")
    assert str(log_file(folder / "logs", 1)) in str(caught.value)
    assert str(caught.value).endswith("RuntimeError: the third shard is wet")
    assert not any(alive(pid) for pid in pids(folder))


def test_the_first_to_fail_is_named_not_its_echo(folder):
    with pytest.raises(RankFailedError, match=r"^rank 1 ended with exit code 3.*\(then rank 0 failed too\)"):
        run(folder, "echo")


def test_a_killed_rank_is_reported_by_its_signal(folder):
    with pytest.raises(RankFailedError, match=r"rank 0 was ended by SIGKILL .*dmesg"):
        run(folder, "killed")
    assert not alive(pids(folder)[1])


def test_a_module_that_does_not_exist_is_an_error_of_the_rank(tmp_path):
    with pytest.raises(RankFailedError, match=r"ended with exit code 1.*No module named no_such_module"):
        run_local([], 2, tmp_path, module="no_such_module")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stop_signal_reaches_all_ranks_at_once_and_leaves_time(folder, number, code):
    process = supervise(folder, "train")
    members = pids(folder)
    process.send_signal(number)
    assert process.wait(20) == code
    times = [float((folder / f"signalled-{rank}").read_text()) for rank in range(2)]
    assert abs(times[0] - times[1]) < 0.5
    assert all((folder / f"saved-{rank}").exists() for rank in range(2))
    assert not any(alive(pid) for pid in members)


@pytest.mark.parametrize(("what", "code"), [("early", 143), ("lost", 6)])
def test_a_stop_before_training_is_no_failure_and_a_lost_checkpoint_is(folder, what, code):
    process = supervise(folder, what)
    pids(folder)
    process.terminate()
    assert process.wait(20) == code


def test_a_signal_that_is_ignored_stays_ignored(folder):
    process = supervise(folder, "train", 20.0, "nohup")
    pids(folder)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(20) == 143


def test_a_second_ctrl_c_kills_at_once(folder):
    process = supervise(folder, "deaf", grace=60)
    members = pids(folder)
    process.send_signal(signal.SIGINT)
    pids_signalled = [folder / f"signalled-{rank}" for rank in range(2)]
    wait_for(lambda: all(p.exists() for p in pids_signalled))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert time.monotonic() - began < 5
    assert not any(alive(pid) for pid in members)


def test_the_grace_period_ends(folder):
    process = supervise(folder, "deaf", grace=1)
    members = pids(folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 6  # stopped, but without a checkpoint: a scheduler must be able to tell
    assert not any(alive(pid) for pid in members)
    assert not (folder / "saved-0").exists()


def test_no_rank_outlives_a_killed_supervisor(folder):
    process = supervise(folder, "train")
    members = pids(folder)
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in members), 5)


def test_worker_processes_go_with_their_rank(folder):
    process = supervise(folder, "worker")
    workers = pids(folder, "worker")
    pids(folder)
    process.terminate()
    assert process.wait(20) == 143
    wait_for(lambda: not any(alive(pid) for pid in workers), 5)


def test_a_port_in_use_is_refused_with_the_repair():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} cannot be used .*give another port"):
            choose_port(port)
    assert choose_port(port) == port
    with pytest.raises(LaunchError, match="70000 is not a TCP port"):
        choose_port(70000)


def test_what_the_user_has_set_stays():
    made = rank_environment(2, 1234, None, {"OMP_NUM_THREADS": "7", "DS_ACCELERATOR": "xpu"})
    assert made["OMP_NUM_THREADS"] == "7"
    assert made["DS_ACCELERATOR"] == "xpu"
    assert rank_environment(2, 1234, 3, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "3"
    assert rank_environment(2, 1234, None, {"CUDA_VISIBLE_DEVICES": ""})["DS_ACCELERATOR"] == "cpu"
    assert int(rank_environment(2, 1234, None, {})["GOMP_SPINCOUNT"]) < 300_000
    assert rank_environment(2, 1234, None, {"GOMP_SPINCOUNT": "5"})["GOMP_SPINCOUNT"] == "5"
    assert "GOMP_SPINCOUNT" not in rank_environment(2, 1234, None, {"OMP_WAIT_POLICY": "active"})


def test_zero_ranks_are_refused(tmp_path):
    with pytest.raises(LaunchError, match="0 ranks cannot be started"):
        run_local([], 0, tmp_path)


def test_the_last_error_line_is_found_among_others(tmp_path):
    log = tmp_path / "log"
    log.write_text("ValueError: of an earlier start\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("step 1\ntorch.OutOfMemoryError: no room\nterminating\n\n")
    assert last_error_line(log, start) == "torch.OutOfMemoryError: no room"
    log.write_text("just this\n")
    assert last_error_line(log) == "just this"
    assert last_error_line(log, 10) == ""
    assert last_error_line(tmp_path / "nothing") == ""


def test_the_supervisor_starts_without_torch():
    code = "import sys, launch.ranks.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0

"""Runs on several hosts: network namespaces with an sshd in each, which is all that ssh and gloo know of a host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.drill.namespaces import Cluster, why_impossible
from launch.record import attempts as records
from launch.testing.commands import ROOT, losses, setformer, train_words
from setformer_dist.core import ledger
from setformer_dist.core.errors import LaunchError

REASON = why_impossible()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# Delays what goes through it and limits its rate: this kernel may have no netem.
RELAY = Path(__file__).with_name("slow_relay.py")
LONGER = ("schedule.epochs=3", "launch.silence_s=5", "launch.retry_s=600")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def one(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal, on this machine alone."""
    out = tmp_path_factory.mktemp("one")
    ended = setformer(*train_words(digits, out, *LONGER))
    assert ended.code == 0, ended.err
    return out / "demo"


def start(cluster: Cluster, words: list[str], hosts: str = "a:1,b:1", via: str | None = None) -> subprocess.Popen[str]:
    assert words[-2] == "--ranks"
    command = [sys.executable, "-m", "launch.cli.main", *words[:-2], "--hosts", hosts, "--via", via or cluster.via]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or max((s for _, s in losses(run)), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


def end(process: subprocess.Popen[str], cluster: Cluster) -> str:
    said, _ = process.communicate(timeout=200)
    for name in cluster.names:
        limit = time.monotonic() + 20
        while left := cluster.processes(name):
            assert time.monotonic() < limit, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
            time.sleep(0.1)
    return said


def process_of(cluster: Cluster, host: str, module: str) -> int:
    for pid in cluster.processes(host):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        forked = Path(f"/proc/{pid}/comm").read_text().startswith("rank ")
        name = "launch.entry" if forked else words[words.index("-m") + 1] if "-m" in words else ""
        if name == module:
            return pid
    raise AssertionError(f"no {module} on {host}")


def ssh_to(host: str, of: int) -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        pid = int(path.parent.name)
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            words = (path.parent / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if parent == of and words[0] == "ssh" and host in words:
            return pid
    raise AssertionError("no ssh")


FAULTS: dict[str, Callable[[Cluster, subprocess.Popen[str]], None]] = {
    "rank": lambda c, p: os.kill(process_of(c, "b", "launch.entry"), signal.SIGKILL),
    "agent": lambda c, p: os.kill(process_of(c, "b", "launch.hosts.agent"), signal.SIGKILL),
    "ssh": lambda c, p: os.kill(ssh_to("b", p.pid), signal.SIGKILL),
    "link": lambda c, p: c.cut("b"),
}
HOW = {"rank": "killed", "agent": "host", "ssh": "host", "link": "host"}


def test_two_hosts_train_like_one_and_leave_nothing(cluster: Cluster, one: Path, digits: Path, tmp_path: Path) -> None:
    process = start(cluster, train_words(digits, tmp_path, *LONGER))
    assert "step 66: top-1" in end(process, cluster)
    assert process.returncode == 0
    assert losses(tmp_path / "demo") == losses(one)
    attempts = [event for event in ledger.read_events(tmp_path / "demo") if event["event"] == "attempt"]
    assert [event["hosts"] for event in attempts] == [["a", "b"]]
    record = records.last(tmp_path / "demo")
    assert record is not None
    assert {name: (host.ranks, host.host) for name, host in record.hosts.items()} == {"a": (1, "a"), "b": (1, "b")}
    assert len(record.machines) == 1, "the hosts are alike"
    assert record.machines[0]["versions"]["torch"]
    assert not [path.name for path in (tmp_path / "demo").iterdir() if path.name.startswith(".host")]


@pytest.mark.drill
@pytest.mark.hosts
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_outlives_its_hosts(fault: str, cluster: Cluster, one: Path, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    process = start(cluster, train_words(digits, tmp_path, *LONGER))
    try:
        wait_for_step(run, 12, process)
        FAULTS[fault](cluster, process)
        said = end(process, cluster)
    finally:
        cluster.join("b")
    assert process.returncode == 0, said
    failed = [event["why"] for event in ledger.read_events(run) if event["event"] == "ended"]
    assert failed == [HOW[fault], "done"]
    hosts = [event["hosts"] for event in ledger.read_events(run) if event["event"] == "attempt"]
    assert hosts == [["a", "b"], ["a", "b"] if fault == "rank" else ["a"]]
    found, wanted = losses(run), losses(one)
    assert found.keys() == wanted.keys()
    if fault == "rank":
        assert found == wanted
    else:  # one rank adds in another order than two
        assert all(found[key][0] == pytest.approx(wanted[key][0], abs=2e-4) for key in wanted)


@pytest.mark.drill
@pytest.mark.hosts
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_and_the_supervisors_death_end_all_hosts(
    how: int, cluster: Cluster, one: Path, digits: Path, tmp_path: Path
) -> None:
    run, words = tmp_path / "demo", train_words(digits, tmp_path, *LONGER)
    process = start(cluster, words)
    wait_for_step(run, 12, process)
    process.send_signal(how)
    said = end(process, cluster)
    assert process.returncode == (143 if how == signal.SIGTERM else -9), said
    ended = setformer(*words)  # and the run resumes elsewhere
    assert ended.code == 0, ended.err
    assert losses(run) == losses(one)


@pytest.mark.drill
@pytest.mark.hosts
def test_hosts_that_cannot_train_are_named(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    words = train_words(digits, tmp_path, "launch.connect_s=8")[:-2]
    cases = {
        "a:1,c:1": ("host c is lost: its command ended with exit code 255",),
        "a:1,b:x": ("host b: 'x' is not a number of slots",),
    }
    for hosts, said in cases.items():
        ended = setformer(*words, "--hosts", hosts, "--via", cluster.via)
        assert ended.code == LaunchError.exit_code, ended.err
        assert all(part in ended.err for part in said)
        assert len(ended.error_lines) == 1
    (cluster.folder / "known").rename(cluster.folder / "known.kept")
    (cluster.folder / "known").write_text(
        (cluster.folder / "known.kept").read_text().replace("ssh-ed25519 AAAA", "ssh-ed25519 AAAB")
    )
    try:
        ended = setformer(*words, "--hosts", "a:1,b:1", "--via", cluster.via)
    finally:
        (cluster.folder / "known.kept").rename(cluster.folder / "known")
    assert ended.code == LaunchError.exit_code
    assert "Host key verification failed" in ended.err
    assert not (tmp_path / "demo").exists()
    assert all(cluster.processes(name) == [] for name in cluster.names)


@pytest.mark.drill
@pytest.mark.hosts
def test_what_a_killed_process_left_is_removed_by_the_next(cluster: Cluster) -> None:
    make = "from launch.drill.namespaces import Cluster; c = Cluster(2); c.__enter__()"
    code = f"{make}; print(c.namespace('b'), c.folder, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)  # fmt: skip
    assert process.stdout is not None
    space, folder = process.stdout.readline().split()
    process.kill()
    process.communicate()

    def daemons() -> int:
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return listed.count(f"{folder}/sshd_config")

    def spaces() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout

    assert space in spaces()
    assert daemons() == 2
    subprocess.run(["umount", f"/run/netns/{space}"], check=True)  # its name leads nowhere now
    with Cluster(1):
        assert space not in spaces()
        assert not daemons()
        assert cluster.namespace("a") in spaces(), "its process lives"


@pytest.mark.drill
@pytest.mark.hosts
def test_doctor_starts_ranks_on_all_hosts(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    options = ("--hosts", "a:1,b:1", "--via", cluster.via, "--run-folder", str(tmp_path))
    ended = setformer("doctor", "demo", f"data.root={digits}", f"run.out={tmp_path}", *options)
    assert ended.code == 0, ended.out
    for said in (
        "8 MiB over 2 hosts take",
        "sees the run config and the data of the first host",
        "GiB predicted for 1",
    ):
        assert said in ended.out
    ended = setformer("doctor", "demo", f"data.root={tmp_path}/none", f"run.out={tmp_path}", *options)
    assert ended.code == 1
    assert ended.out.count("does not exist: set data.root") == 2
    assert list(tmp_path.iterdir()) == []
    assert all(cluster.processes(name) == [] for name in cluster.names)


@pytest.mark.drill
@pytest.mark.hosts
def test_two_runs_share_the_hosts(cluster: Cluster, one: Path, digits: Path, tmp_path: Path) -> None:
    runs = [start(cluster, train_words(digits, tmp_path / name, *LONGER)) for name in ("x", "y")]
    said = [run.communicate(timeout=280)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert losses(tmp_path / "x" / "demo") == losses(tmp_path / "y" / "demo") == losses(one)
    assert "step 66: top-1" in end(runs[1], cluster) or "step 66: top-1" in said[1]


@pytest.mark.drill
@pytest.mark.hosts
def test_a_control_path_that_is_slow_and_loses_packets_loses_no_host(
    cluster: Cluster, one: Path, digits: Path, tmp_path: Path
) -> None:
    relay = f"ProxyCommand={sys.executable} {RELAY} %h %p 0.05 1000"
    process = start(
        cluster, train_words(digits, tmp_path, *LONGER), via=f"ssh -F {cluster.config} -o '{relay}' {{host}}"
    )
    for name in cluster.names:
        cluster.lose(name, 0.01)
    try:
        said = end(process, cluster)
    finally:
        for name in cluster.names:
            cluster.mend(name)
    assert process.returncode == 0, said
    assert losses(tmp_path / "demo") == losses(one)
    assert [event["why"] for event in ledger.read_events(tmp_path / "demo") if event["event"] == "ended"] == ["done"]


@pytest.mark.drill
@pytest.mark.hosts
@pytest.mark.parametrize("when", ["at_once", "checkpoint"])
def test_a_host_that_answers_again_takes_part_again(
    when: str, cluster: Cluster, one: Path, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "demo"
    words = train_words(digits, tmp_path, "schedule.epochs=9", "launch.silence_s=5", "launch.retry_s=2",
                        f"launch.take_back={when}", "checkpoint.every_steps=20")  # fmt: skip
    process = start(cluster, words)
    wait_for_step(run, 12, process)
    os.kill(process_of(cluster, "b", "launch.hosts.agent"), signal.SIGKILL)
    said = end(process, cluster)
    assert process.returncode == 0, said
    assert "host b is back; all ranks have saved and restart" in said
    events = ledger.read_events(run)
    assert [event["why"] for event in events if event["event"] == "ended"] == ["host", "regrouped", "done"]
    assert [event["hosts"] for event in events if event["event"] == "attempt"] == [["a", "b"], ["a"], ["a", "b"]]
    assert [how for _, how, _ in ledger.account(events).failures] == ["host"]
    assert [step for kind, step in losses(run) if kind == "train"] == list(range(1, 199))


@pytest.mark.drill
@pytest.mark.hosts
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8, 1.5, 3.0, 5.0])
def test_an_agent_is_killed_while_it_starts(
    delay: float, cluster: Cluster, one: Path, digits: Path, tmp_path: Path
) -> None:
    """The run is refused in one sentence that names the host, or it goes on without the host; nothing is left."""
    process = start(cluster, train_words(digits, tmp_path, *LONGER))
    limit = time.monotonic() + 60
    agent = None
    while agent is None:
        assert time.monotonic() < limit
        with contextlib.suppress(AssertionError, OSError):
            agent = process_of(cluster, "b", "launch.hosts.agent")
    time.sleep(delay)
    os.kill(agent, signal.SIGKILL)
    said = end(process, cluster)
    assert "Traceback" not in said
    if process.returncode == 0:
        found, wanted = losses(tmp_path / "demo"), losses(one)
        assert all(found[key][0] == pytest.approx(wanted[key][0], abs=2e-4) for key in wanted)
        return
    assert process.returncode == LaunchError.exit_code, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "host b" in line
    assert not (tmp_path / "demo" / "checkpoints").exists()


@pytest.mark.drill
@pytest.mark.hosts
def test_a_run_whose_hosts_are_all_lost_at_once_tries_them_again_soon(
    cluster: Cluster, one: Path, digits: Path, tmp_path: Path
) -> None:
    process = start(cluster, train_words(digits, tmp_path, *LONGER))  # launch.retry_s is 600
    wait_for_step(tmp_path / "demo", 12, process)
    for host in "ab":
        os.kill(process_of(cluster, host, "launch.hosts.agent"), signal.SIGKILL)
    said = end(process, cluster)
    assert process.returncode == 0, said
    assert losses(tmp_path / "demo").keys() == losses(one).keys()
    (line,) = [line for line in said.splitlines() if "of at least 1 hosts are there" in line]
    assert "host a" in line
    assert "host b" in line


@pytest.mark.drill
@pytest.mark.hosts
def test_two_hosts_learn_texts_as_one(cluster: Cluster, tmp_path: Path) -> None:
    """Also the tokenizer of the data lies in the run's folder, which the first host writes."""
    lines = [f"the {colour} cat eats {count} fish by the river ." for colour in ("red", "old") for count in range(64)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    made = setformer("text", "tokenizer", str(tmp_path / "train.txt"), str(tmp_path / "t.json"), "--vocabulary", "128")
    assert made.code == 0, made.err
    for split in ("train", "val"):
        packed = setformer("text", "pack", str(tmp_path / f"{split}.txt"), str(tmp_path / "data" / split),
                           "--tokenizer", str(tmp_path / "t.json"), "--length", "32")  # fmt: skip
        assert packed.code == 0, packed.err
    words = ["train", "mlm", f"data.root={tmp_path / 'data'}", "batch.global_size=8", "~schedule.epochs",
             "schedule.steps=20", "~schedule.warmup_epochs", "schedule.warmup_steps=2", "model.args.dim=32",
             "model.args.num_heads=2", "zero.stage=3", "precision.dtype=fp32", "run.threads=1", "run.log_every=1",
             "eval.every_epochs=1", "data.trim=true", "model.args.dropout=0.1"]  # fmt: skip
    alone = setformer(*words, f"run.out={tmp_path / 'one'}", "--ranks", "2")
    assert alone.code == 0, alone.err
    process = start(cluster, [*words, f"run.out={tmp_path / 'two'}", "--ranks", "2"])
    said = end(process, cluster)
    assert process.returncode == 0, said
    assert losses(tmp_path / "two" / "mlm") == losses(tmp_path / "one" / "mlm")
    assert (tmp_path / "two" / "mlm" / "tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()

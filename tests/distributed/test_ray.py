"""Runs under Ray, on a real cluster of one node: losses of the plain launch, and nothing left however a run ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.ray.cluster import Cluster, own_cluster
from launch.record import attempts as records
from launch.testing.commands import ROOT, losses, running, setformer, train_words, wait_for
from setformer_dist.core import ledger


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with own_cluster(cpus=2) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal, without Ray."""
    out = tmp_path_factory.mktemp("plain")
    ended = setformer(*train_words(digits, out))
    assert ended.code == 0, ended.err
    return out / "demo"


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """End what a test that fails leaves: a run that waits for its cluster does so for ever."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def start(words: list[str], cluster: Cluster) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli.main", *words, "--ray", cluster.address]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    wait_for(run / "metrics.jsonl", process)
    limit = time.monotonic() + 120
    while max((s for _, s in losses(run)), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


def workers() -> list[psutil.Process]:
    """Return the actors that run agents below this process: the cluster is its child."""
    return running(psutil.Process().children(recursive=True), "AgentActor")


def below(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [*processes, *(child for p in running(processes) for child in p.children(recursive=True))]


def assert_gone(processes: list[psutil.Process], limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while left := running(processes):
        assert time.monotonic() < limit, left
        time.sleep(0.1)


def test_losses_are_those_of_the_plain_launch_whatever_dies(
    cluster: Cluster, plain: Path, digits: Path, tmp_path: Path
) -> None:
    """A worker is killed, then the driver; the same command goes on, and every loss is that of a run undisturbed."""
    words, run = train_words(digits, tmp_path), tmp_path / "demo"
    process = start(words, cluster)
    wait_for_step(run, 6, process)
    [worker] = workers()
    ranks = below([worker])
    assert len(named := running(ranks, "rank ")) >= 2
    # Ray gives its workers a low priority; the ranks have that of the node.
    assert {p.nice() for p in named} == {0}
    killed_at = time.time()
    worker.kill()
    limit = time.monotonic() + 120
    while len([e for e in ledger.read_events(run) if e["event"] == "began"]) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert_gone(ranks, 1)
    ended = [event for event in ledger.read_events(run) if event["event"] == "ended"]
    assert [event["why"] for event in ended] == ["host"]
    assert float(str(ended[0]["time"])) - killed_at < 30
    attempts = [event for event in ledger.read_events(run) if event["event"] == "attempt"]
    assert float(str(attempts[1]["time"])) - killed_at < 60, "all bundles are lost: they are tried again at once"
    left = below(workers())
    process.kill()
    said = STARTED.pop().communicate()[0]
    assert "host bundle-0 is lost: its agent has ended (its node 127.0.0.1, or its Ray worker there, is gone)" in said
    assert_gone(left, 15)  # no orphan
    again = setformer(*words, "--ray", cluster.address)
    assert again.code == 0, again.err
    assert losses(run) == losses(plain)
    record = records.last(run)
    assert record is not None
    assert record.via == f"ray {cluster.address}"
    assert list(record.hosts) == ["bundle-0"]
    assert_gone(workers(), 5)


@pytest.mark.drill
def test_a_stop_saves_and_gives_everything_back(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    process = start(train_words(digits, tmp_path, "schedule.epochs=50"), cluster)
    wait_for_step(tmp_path / "demo", 3, process)
    left = below(workers()) + psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = STARTED.pop().communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "setformer train" in said or "resumes" in said
    assert_gone(left, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "4"], r"4 ranks do not fit on this Ray cluster, which has room for 2 \(node 127.0.0.1: 2\): give "
                           r"--ranks 2, or add nodes"),
        (["--ranks", "2", "--ranks-per-node", "1"], r"2 ranks at 1 to a node take 2 nodes, and 1 of this Ray cluster "
                                                    r"has room for 1 \(node 127.0.0.1: 2\): give --ranks 1"),
        (["--ranks", "2", "--hosts", "a:2"], "--ray and --hosts, --hostfile or --via both say where to train"),
        (["--ranks", "2", "--include", "a:0"], "--ray and --hosts, --hostfile or --via both say where to train"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_would(
    cluster: Cluster, digits: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    ended = setformer(*train_words(digits, tmp_path)[:-2], *options, "--ray", cluster.address)
    assert ended.code == 5
    [line] = ended.error_lines
    assert re.search(said, line), line
    assert not (tmp_path / "demo").exists()


def test_nobody_waits_for_room_without_a_cluster(digits: Path, tmp_path: Path) -> None:
    ended = setformer(*train_words(digits, tmp_path), "--wait")
    assert ended.code == 5
    assert ended.error_lines == ["error: --wait waits for room on a Ray cluster: give --ray as well"]


@pytest.mark.drill
def test_who_waits_gets_room_when_there_is_some(cluster: Cluster, plain: Path, digits: Path, tmp_path: Path) -> None:
    """With --wait, a run begins once another has ended; a stop while it waits ends it at once."""
    first = start(train_words(digits, tmp_path / "first", "schedule.epochs=50"), cluster)
    wait_for_step(tmp_path / "first" / "demo", 3, first)
    never = start([*train_words(digits, tmp_path / "never")[:-2], "--ranks", "4", "--wait"], cluster)
    second = start([*train_words(digits, tmp_path / "second"), "--wait"], cluster)
    assert never.stdout is not None
    assert second.stdout is not None
    said = next(line for line in second.stdout if "waiting" in line)
    assert "waiting for room (--wait): 2 ranks do not fit on this Ray cluster, which has room for 0" in said
    assert any("waiting for room (--wait): 4 ranks do not fit" in line for line in never.stdout)
    children = psutil.Process(never.pid).children(recursive=True)
    asked = time.monotonic()
    never.terminate()
    assert never.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 15
    assert_gone(children, 1)
    assert not (tmp_path / "second" / "demo" / "metrics.jsonl").exists()
    first.terminate()
    assert first.wait(60) == 128 + signal.SIGTERM
    assert second.wait(120) == 0, second.stdout.read()
    assert losses(tmp_path / "second" / "demo") == losses(plain)


@pytest.mark.drill
def test_a_run_on_ray_is_repeated_there(cluster: Cluster, plain: Path, digits: Path, tmp_path: Path) -> None:
    """`--from` trains on the cluster that the record names, if the user trusts it, or where the user says."""
    ended = setformer(*train_words(digits, tmp_path), "--ray", cluster.address)
    assert ended.code == 0, ended.err
    refused = setformer("train", "--from", str(tmp_path / "demo"))
    assert refused.code == 2, refused.err
    assert f"--via ray {cluster.address}" in refused.err or f'"ray {cluster.address}"' in refused.err
    trusted = setformer("train", "--from", str(tmp_path / "demo"), "--trust")
    assert trusted.code == 0, trusted.err
    assert losses(tmp_path / "demo-2") == losses(plain)
    record = records.last(tmp_path / "demo-2")
    assert record is not None
    assert record.via == f"ray {cluster.address}"
    elsewhere = setformer("train", "--from", str(tmp_path / "demo"), "--ranks", "2")
    assert (elsewhere.code, losses(tmp_path / "demo-3")) == (0, losses(plain)), elsewhere.err


def test_no_cluster_and_a_wrong_token(
    cluster: Cluster, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = setformer(*train_words(digits, tmp_path), "--ray", "127.0.0.1:1")
    assert (ended.code, len(ended.error_lines)) == (5, 1)
    assert "no Ray cluster answers at 127.0.0.1:1" in ended.err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    ended = setformer(*train_words(digits, tmp_path), "--ray", cluster.address)
    assert (ended.code, len(ended.error_lines)) == (5, 1)
    assert "does not accept this process's token" in ended.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.drill
def test_doctor(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = setformer("doctor", "--ray", cluster.address, "--run-folder", str(tmp_path / "runs"))
    assert found.code == 0, found.out + found.err
    for part in (
        f"answers at {cluster.address}; Ray 2.60.0", "by token", "room for 2 ranks, 2 free now", "answers; ",
        "rank 0 is met at 127.0.0.1", "computes on",
    ):  # fmt: skip
        assert part in found.out, found.out
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    found = setformer("doctor", "--ray", cluster.address, "--run-folder", str(tmp_path / "runs"))
    assert found.code != 0
    assert "does not accept this process's token" in " ".join(found.out.split())


# A program of a user of Ray Train; its arguments are the cluster, a folder, the run config and the overrides.
TRAINER = """
import sys, ray, ray.train
from ray.train.torch import TorchTrainer
from launch.ray import train_loop
from launch.ray.cluster import connected
if __name__ == "__main__":
    address, folder, config, *overrides = sys.argv[1:]
    with connected(address):
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"config": config, "overrides": overrides},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(name="demo", storage_path=folder),
        )
        trainer.fit()
"""


@pytest.mark.drill
def test_the_loop_of_a_torch_trainer_has_the_same_losses(
    cluster: Cluster, plain: Path, digits: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(TRAINER)
    _, config, *overrides = train_words(digits, tmp_path)[:-2]
    done = subprocess.run(
        [sys.executable, str(program), cluster.address, str(tmp_path / "ray"), config, *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert max(step for _, step in losses(plain)) == 22
    assert losses(tmp_path / "demo") == losses(plain)

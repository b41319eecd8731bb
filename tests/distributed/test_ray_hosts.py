"""A run under Ray on two nodes, network namespaces with a raylet in each: nodes that die, folders that differ."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.drill.namespaces import Cluster, why_impossible
from launch.sweep.journal import read_events
from launch.testing.commands import DEMO, losses, setformer, train_words
from launch.testing.ray_nodes import RayNodes
from setformer_dist.core import ledger

REASON = why_impossible()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.drill,
    pytest.mark.hosts,
]


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with Cluster(2) as cluster:
        made = RayNodes(cluster)
        try:
            made.boot("a")
            made.boot("b")
            yield made
        finally:
            made.close()


def began(run: Path) -> list[float]:
    if not (run / "ledger.jsonl").exists():
        return []
    return [float(str(event["time"])) for event in ledger.read_events(run) if event["event"] == "began"]


def until(condition, process: subprocess.Popen[str], log: Path, limit_s: float = 180.0) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.1)


def step_of(run: Path) -> int:
    return max((step for _, step in losses(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def command_of(pid: int) -> str:
    """Return the command line of a process, nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def start(nodes: RayNodes, digits: Path, out: Path, *overrides: str) -> tuple[subprocess.Popen[str], Path]:
    words = [*train_words(digits, out, "schedule.epochs=4", *overrides), "--ranks-per-node", "1"]
    log = out / "said.log"
    command = [sys.executable, "-m", "launch.cli.main", *words, "--ray", nodes.address]
    return nodes.on("a", command, log), log


def test_a_node_is_killed(nodes: RayNodes, digits: Path, tmp_path: Path, record_property) -> None:
    """It is noticed, and training goes on with the other one, within 20 s; then the node comes back."""
    run = tmp_path / "demo"
    process, log = start(nodes, digits, tmp_path, "launch.retry_s=25", "launch.silence_s=5")
    until(lambda: step_of(run) >= 7, process, log)
    killed_at = time.time()
    nodes.cluster.kill("b")
    until(lambda: len(began(run)) > 1, process, log)
    seconds = began(run)[1] - killed_at
    print(f"a node killed: training again after {seconds:.1f} s")
    record_property("seconds", seconds)
    assert seconds < 20
    attempts = [event for event in ledger.read_events(run) if event["event"] == "attempt"]
    assert [event["ranks"] for event in attempts] == [2, 1]
    assert f"is lost: its agent has ended (its node {nodes.cluster.address('b')}," in log.read_text()
    nodes.cluster.boot("b")
    nodes.boot("b")
    process.wait(timeout=300)
    assert process.returncode == 0, log.read_text()
    found = losses(run)
    assert {step for kind, step in found if kind == "train"} == set(range(1, 89))
    assert not [pid for pid in nodes.cluster.processes("b") if "launch" in command_of(pid)]


@pytest.mark.parametrize("kind", ["raylet", "link"])
def test_a_node_that_ray_loses_alone(nodes: RayNodes, digits: Path, tmp_path: Path, kind: str) -> None:
    """Its raylet is killed, or its link cut: the run goes on elsewhere, and nothing trains on in the node."""
    run = tmp_path / "demo"
    process, log = start(nodes, digits, tmp_path, "launch.retry_s=600", "launch.silence_s=5")
    until(lambda: step_of(run) >= 7, process, log)
    killed_at = time.time()
    if kind == "raylet":
        [raylet] = [pid for pid in nodes.cluster.processes("b") if command_of(pid).split(" ")[0].endswith("/raylet")]
        os.kill(raylet, signal.SIGKILL)
    else:
        nodes.cluster.cut("b")
    until(lambda: len(began(run)) > 1, process, log)
    assert began(run)[1] - killed_at < 30
    until(lambda: not [pid for pid in nodes.cluster.processes("b") if "launch" in command_of(pid)], process, log, 60)
    process.wait(timeout=300)
    assert process.returncode == 0, log.read_text()
    attempts = [event for event in ledger.read_events(run) if event["event"] == "attempt"]
    assert [event["ranks"] for event in attempts] == [2, 1]
    assert {step for kind, step in losses(run) if kind == "train"} == set(range(1, 89))


SWEEP = """
[sweep]
name = "s"
out = "{out}"
base = "{base}"
[set]
data = {{ root = "{data}" }}
schedule = {{ epochs = 2, warmup_epochs = 0.2 }}
eval = {{ every_steps = 11, every_epochs = 0 }}
checkpoint = {{ every_steps = 5 }}
run = {{ log_every = 1 }}
{more}
[space]
"optim.lr" = {{ loguniform = [1e-4, 1e-2] }}
[budget]
trials = 3
[search]
name = "random"
"""


def sweep_page(out: Path, data: Path, more: str = "") -> Path:
    page = out / "page.toml"
    page.write_text(SWEEP.format(out=out, base=DEMO, data=data, more=more))
    return page


def test_a_sweep_on_two_nodes_loses_one(nodes: RayNodes, digits: Path, tmp_path: Path) -> None:
    """The trial of the node that is killed resumes on the other one, and has the losses of a plain run."""
    page, folder, log = sweep_page(tmp_path, digits), tmp_path / "s", tmp_path / "said.log"
    command = [sys.executable, "-m", "launch.cli.main", "sweep", str(page), "--ray", nodes.address]
    process = nodes.on("a", command, log)

    def trials_on(host: str) -> set[str]:
        found = (re.search(r"trial-\d{4}", command_of(pid)) for pid in nodes.cluster.processes(host))
        return {word.group() for word in found if word}

    until(lambda: trials_on("a") and trials_on("b"), process, log)
    [lost] = trials_on("b") - trials_on("a")
    until(lambda: step_of(folder / "trials" / lost) >= 7, process, log)
    nodes.cluster.kill("b")
    process.wait(timeout=500)
    assert process.returncode == 0, log.read_text()
    events = read_events(folder)
    assert [event["state"] for event in events if event["event"] == "ended"] == ["done"] * 3
    number = int(lost.rpartition("-")[2])
    assert len([e for e in events if e["event"] == "started" and e["trial"] == number]) == 2
    plain = setformer("train", str(folder / "trials" / lost / "trial.json"), f"run.out={tmp_path}", "run.name=plain")
    assert plain.code == 0, plain.err
    assert losses(folder / "trials" / lost) == losses(tmp_path / "plain")


def test_trials_share_a_refresh_service(nodes: RayNodes, digits: Path, tmp_path: Path) -> None:
    """Trials whose reference sets are refreshed by Ray use the sweep's cluster, and have the losses of plain runs."""
    more = 'refresh = { every = 8, delay = 3, samples = 256, by = "ray", wait_s = 60.0 }'
    page, folder, log = sweep_page(tmp_path, digits, more), tmp_path / "s", tmp_path / "said.log"
    command = [sys.executable, "-m", "launch.cli.main", "sweep", str(page), "--ray", nodes.address, "budget.trials=2"]
    process = nodes.on("a", command, log)
    process.wait(timeout=500)
    assert process.returncode == 0, log.read_text()
    for number in range(2):
        trial = folder / "trials" / f"trial-{number:04d}"
        rows = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert [row["by"] for row in rows if row["kind"] == "refresh"] == ["ray"] * 5
        words = [f"run.out={tmp_path}", f"run.name=plain{number}", "refresh.by=job"]
        plain = setformer("train", str(trial / "trial.json"), *words)
        assert plain.code == 0, plain.err
        assert losses(trial) == losses(tmp_path / f"plain{number}")


def test_the_head_is_lost(nodes: RayNodes, digits: Path, tmp_path: Path) -> None:
    """Nothing is left on the other node, and the same command goes on once there is a head again."""
    run = tmp_path / "demo"
    process, log = start(nodes, digits, tmp_path)
    until(lambda: step_of(run) >= 7, process, log)
    nodes.cluster.kill("a")  # and with it the driver
    process.wait(timeout=30)
    limit = time.monotonic() + 90
    while [pid for pid in nodes.cluster.processes("b") if "launch" in command_of(pid)]:
        assert time.monotonic() < limit
        time.sleep(0.2)
    nodes.cluster.kill("b")
    for host in ("a", "b"):
        nodes.cluster.boot(host)
        nodes.boot(host)
    process, log = start(nodes, digits, tmp_path)
    process.wait(timeout=300)
    assert process.returncode == 0, log.read_text()
    assert {step for kind, step in losses(run) if kind == "train"} == set(range(1, 89))


def test_storage_that_nodes_do_not_share(digits: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    with Cluster(2, own) as cluster:
        nodes = RayNodes(cluster)
        try:
            nodes.boot("a")
            nodes.boot("b")
            words = [*train_words(digits, own), "--ranks-per-node", "1"]
            log = tmp_path / "said.log"
            command = [sys.executable, "-m", "launch.cli.main", *words, "--ray", nodes.address]
            process = nodes.on("a", command, log)
            process.wait(timeout=120)
            assert process.returncode == 5, log.read_text()
            said = " ".join(log.read_text().split())
            assert "is not that of the others: put it on a file system that all hosts share" in said
        finally:
            nodes.close()

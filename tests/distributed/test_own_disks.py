"""Runs on hosts that have a disk each below one path: namespaces with an sshd and a mount of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.drill.namespaces import Cluster, why_impossible
from launch.testing.commands import ROOT, losses, setformer, train_words

REASON = why_impossible()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.drill, pytest.mark.hosts]


def start(cluster: Cluster, words: list[str], hosts: str = "a:1,b:1") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli.main", *words[:-2], "--hosts", hosts, "--via", cluster.via]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_host_loses_its_disk_between_two_starts(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    out.mkdir()
    whole = setformer(*train_words(digits, tmp_path / "whole"))
    assert whole.code == 0, whole.err
    words = train_words(digits, out, "checkpoint.replicas=1")
    with Cluster(2, own=out) as cluster:
        process = start(cluster, words)
        limit = time.monotonic() + 240
        while not (cluster.disk("a") / "demo" / "checkpoints" / "step-00000010").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, said
        last = max(step for _, step in losses(cluster.disk("a") / "demo"))
        for name in cluster.names:
            assert (cluster.disk(name) / "demo" / "checkpoints" / f"step-{last:08d}").is_dir()
        assert not (out / "demo" / "checkpoints").exists()

        shutil.rmtree(cluster.disk("a") / "demo")
        process = start(cluster, words)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert f"resumed at step {last}" in said
        there = losses(tmp_path / "whole" / "demo")
        for name in cluster.names:  # what lay on the lost disk was on the other one, up to the checkpoint
            mine = losses(cluster.disk(name) / "demo")
            assert mine == {key: value for key, value in there.items() if name == "a" or key in mine}
            assert {step for kind, step in mine if kind == "train"} >= set(range(1, 22))

        without = train_words(digits, out, "run.name=other")
        process = start(cluster, without)
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 5, said
        assert "set checkpoint.replicas" in said


def test_a_host_is_lost_with_its_disk_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    out.mkdir()
    words = train_words(digits, out, "checkpoint.replicas=1", "launch.silence_s=5", "launch.retry_s=600")
    with Cluster(2, own=out) as cluster:
        process = start(cluster, words)
        limit = time.monotonic() + 240
        while not (cluster.disk("a") / "demo" / "checkpoints" / "step-00000010").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.05)
        cluster.kill("b")
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        resumed = int(said.rpartition("resumed at step ")[2].split()[0])
        assert resumed >= 10
        assert max(step for _, step in losses(cluster.disk("a") / "demo")) == 22


def test_rank_0s_host_is_lost_with_its_disk_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    out.mkdir()
    words = train_words(digits, out, "checkpoint.replicas=1", "launch.silence_s=5", "launch.retry_s=600")
    with Cluster(2, own=out) as cluster:
        process = start(cluster, words)
        limit = time.monotonic() + 240
        while not (cluster.disk("b") / "demo" / "checkpoints" / "step-00000010").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.05)
        cluster.kill("a")
        shutil.rmtree(cluster.disk("a") / "demo")
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert int(said.rpartition("resumed at step ")[2].split()[0]) >= 10
        mine = losses(cluster.disk("b") / "demo")
        assert {step for kind, step in mine if kind == "train"} == set(range(1, 23))
        assert (cluster.disk("b") / "demo" / "report.html").exists()

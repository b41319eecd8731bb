"""New reference sets from a service on a real Ray cluster: the bits of the ranks' own, whatever dies or is late.

The ranks advance to a step, rank 0 does something to the service or to its courier, and they go on. The service is a
process of the cluster of this test; what happens to it is by real signals.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launch.ray.cluster import Cluster, own_cluster
from launch.run.refit_by_ray import Courier
from launch.testing.commands import DEMO, running, setformer
from launch.testing.ranks import run_ranks
from setformer_dist.core import ledger
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import connect, disconnect
from setformer_dist.ops.refit_bytes import problem_bytes, solved
from tests.distributed.test_refresh import copy_checkpoint, held_by, lines_of, state_of, trainer_of, words_of
from tests.distributed.test_resume_everywhere import few_digits
from tests.unit.test_refresh import PLAIN, problem_of

__all__ = ["few_digits"]  # a fixture

SAMPLED, APPLIED, LAST = 4, 6, 8  # optimizer steps
DELAYED = (f"refresh.at_steps=[{SAMPLED}]", f"refresh.delay={APPLIED - SAMPLED}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with own_cluster(cpus=1) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in {**made.environment, "RAY_ADDRESS": made.address}.items():
            patch.setenv(name, value)
        yield made


def of_the_cluster(name: str, owner: int) -> list[psutil.Process]:
    return running(psutil.Process(owner).children(recursive=True), name)


def wait_for_service(owner: int) -> psutil.Process:
    """Return the service, one for all runs, once it has imported what it computes with and those of before are gone."""
    limit = time.monotonic() + 120
    while True:
        found = of_the_cluster("RefitService", owner)
        with contextlib.suppress(psutil.Error):
            if len(found) == 1 and any("libtorch" in m.path for m in found[0].memory_maps()):
                return found[0]
        assert time.monotonic() < limit, found
        time.sleep(0.05)


def wait_for_none(owner: int) -> None:
    """Wait until the service of a run before is gone: the first courier would take it for one that stays."""
    limit = time.monotonic() + 60
    while found := of_the_cluster("RefitService", owner):
        assert time.monotonic() < limit, found
        time.sleep(0.05)


def act(what: str, trainer: Any, owner: int) -> None:
    """Do something on rank 0."""
    courier = trainer._c.refresh._refitter._courier
    if what == "service is there":
        wait_for_service(owner)
    elif what in ("SIGSTOP", "SIGKILL"):
        wait_for_service(owner).send_signal(getattr(signal, what))
    elif what == "answered":
        assert select.select([courier._control], [], [], 120)[0]
    elif what in ("courier SIGKILL", "courier SIGSTOP"):
        os.kill(courier._process.pid, getattr(signal, what.split()[1]))
    else:
        raise AssertionError(what)


def trained(data: str, out: str, runs: list[dict[str, Any]], owner: int) -> list[dict[str, Any]]:
    """Train runs one after the other; return what each held of a sample when it was begun."""
    torch.set_num_threads(1)
    connect(RankInfo.from_env(), os.environ["SETFORMER_RENDEZVOUS"])
    found = []
    for run in runs:
        if "from" in run:
            copy_checkpoint(Path(out), *run["from"])
        trainer = trainer_of([*words_of(data, out, run["name"], 2, "none"), *DELAYED, *run["words"]])
        found.append({"sample": held_by(trainer)})
        for step, what in run.get("acts", ()):
            trainer.advance(step)
            if RankInfo.from_env().is_main:
                act(what, trainer, owner)
            torch.distributed.barrier()
        trainer.run()
    disconnect()
    return found


JOB = {"name": "job", "words": []}
RAY = ["refresh.by=ray", "refresh.wait_s=240"]
LATE = ["refresh.by=ray", "refresh.wait_s=0.5"]
RUNS = [
    JOB,
    {"name": "ray", "words": RAY, "acts": [(1, "service is there")]},
    {"name": "during", "words": RAY, "acts": [(SAMPLED - 1, "SIGSTOP"), (SAMPLED + 1, "SIGKILL")]},
    {"name": "keep", "words": [*LATE, "refresh.late=keep", "refresh.address=127.0.0.1:1"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(cluster: Cluster, few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs beside another one of the cluster, which has begun the service that they use."""
    out = tmp_path_factory.mktemp("runs")
    with contextlib.closing(Courier(cluster.address)):
        run_ranks(trained, 2, str(few_digits), str(out), RUNS, os.getpid(), timeout=400)
    limit = time.monotonic() + 20
    while of_the_cluster("RefitService", os.getpid()):  # it does not outlive the runs
        assert time.monotonic() < limit
        time.sleep(0.1)
    return out


def row_of(out: Path, name: str) -> dict[str, Any]:
    [row] = lines_of(out, name)
    return row


def refreshed(out: Path, name: str) -> dict[str, Any]:
    [event] = [event for event in ledger.read_events(out / name) if event["event"] == "refreshed"]
    return {key: event[key] for key in ("step", "skipped", "by", "late")}


@pytest.mark.parametrize("name", ["ray", "during"])
def test_the_service_finds_the_bits_of_the_job(runs: Path, name: str) -> None:
    assert state_of(runs, name, LAST) == state_of(runs, "job", LAST)
    theirs, ours = row_of(runs, "job"), row_of(runs, name)
    assert (theirs["sampled"], theirs["step"]) == (SAMPLED, APPLIED)
    assert theirs.pop("by") == "job"
    assert ours.pop("by") == "ray"
    assert ours == theirs
    assert refreshed(runs, name) == {"step": APPLIED, "skipped": "", "by": "ray", "late": ""}


def test_a_late_service_is_not_waited_for_longer_than_it_may(runs: Path) -> None:
    row, event = row_of(runs, "keep"), refreshed(runs, "keep")
    assert (row["step"], row["sampled"], row["by"]) == (APPLIED, SAMPLED, "ray")
    assert row["skipped"] == row["late"] == event["skipped"] == event["late"]
    assert row["skipped"].startswith("no answer of the refresh service within 0.5 s")
    assert state_of(runs, "keep", LAST) != state_of(runs, "job", LAST)
    assert state_of(runs, "keep", APPLIED - 1) == state_of(runs, "job", APPLIED - 1)


def test_the_pending_sample_is_in_the_checkpoints_between(runs: Path) -> None:
    for step in range(1, LAST + 1):
        kept = state_of(runs, "ray", step)[1][2]
        assert ("rows" in kept) is (SAMPLED - 3 < step < SAMPLED + 1 and step != SAMPLED), step
        assert ("pending" in kept) is (SAMPLED <= step < APPLIED), step
    assert kept == {}


def test_a_new_run_that_reaches_no_cluster_does_not_begin(few_digits: Path, tmp_path: Path) -> None:
    words = words_of(str(few_digits), str(tmp_path), "none", 2, "none")
    ended = setformer("train", DEMO, *words, "refresh.by=ray", "refresh.address=127.0.0.1:1", "--ranks", "1")
    assert (ended.code, len(ended.error_lines)) == (5, 1), ended.err
    assert "no Ray cluster answers at 127.0.0.1:1" in ended.err
    assert not (tmp_path / "none").exists()


# Everything else that may happen to it.

HAPPENS = [
    {"name": "before", "words": RAY, "acts": [(1, "service is there"), (SAMPLED - 1, "SIGKILL")]},
    {"name": "after", "words": RAY, "acts": [(1, "service is there"), (SAMPLED, "answered"), (SAMPLED + 1, "SIGKILL")]},
    {"name": "courier-killed", "words": RAY, "acts": [(1, "service is there"), (SAMPLED, "courier SIGKILL")]},
    {"name": "courier-stopped", "words": LATE, "acts": [(1, "service is there"), (SAMPLED - 1, "courier SIGSTOP")]},
    {"name": "compute", "words": LATE, "acts": [(SAMPLED - 1, "SIGSTOP")]},
    {"name": "after-compute", "words": RAY},
    {"name": "no-cluster", "words": [*LATE, "refresh.wait_s=6", "refresh.address=127.0.0.1:1"]},
    {"name": "again", "words": RAY},
    {"name": "resumed", "words": RAY, "from": ["job", "resumed", SAMPLED + 1]},
]  # fmt: skip


@pytest.mark.drill
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_bits_are_the_same_whatever_happens(cluster: Cluster, few_digits: Path, tmp_path: Path, world: int) -> None:
    run_ranks(trained, world, str(few_digits), str(tmp_path), [JOB, *HAPPENS], os.getpid(), timeout=900)
    late = {"compute": "no answer of", "courier-stopped": "no answer of", "no-cluster": "no answer of"}
    for run in HAPPENS:
        name = run["name"]
        assert state_of(tmp_path, name, LAST) == state_of(tmp_path, "job", LAST), name
        event = refreshed(tmp_path, name)
        assert event["by"] == ("job" if name in late else "ray"), event
        assert event["late"].startswith(late.get(name, "")), event
        assert bool(event["late"]) is (name in late), event
    assert "no Ray cluster answers at 127.0.0.1:1" in refreshed(tmp_path, "no-cluster")["late"]


@pytest.mark.drill
@pytest.mark.parametrize("world", [1, 3])
def test_other_ranks_take_over_what_is_pending(runs: Path, cluster: Cluster, few_digits: Path, world: int) -> None:
    """The new sets are those that the run would have got: the same problem is solved."""
    names = {by: f"{by}-on-{world}" for by in ("job", "ray")}
    asked = [{"name": name, "words": RAY if by == "ray" else [], "from": ["ray", name, SAMPLED + 1]}
             for by, name in names.items()]  # fmt: skip
    by_rank = run_ranks(trained, world, str(few_digits), str(runs), asked, os.getpid(), timeout=600)
    assert by_rank[0][0]["sample"]
    for found in by_rank:
        assert all(one["sample"] == by_rank[0][0]["sample"] for one in found)
    theirs = row_of(runs, "ray")
    for name in names.values():
        row = row_of(runs, name)
        assert {k: v for k, v in row.items() if k != "by"} == {k: v for k, v in theirs.items() if k != "by"}
    assert state_of(runs, names["job"], LAST) == state_of(runs, names["ray"], LAST)


def answer_of(courier: Courier, problem: bytes, limit_s: float = 120.0) -> bytes:
    courier.send(problem)
    limit = time.monotonic() + limit_s
    while not isinstance(found := courier.look(0.2), bytes):
        assert found is None, found
        assert time.monotonic() < limit, courier.said
    return found


@pytest.mark.drill
def test_runs_share_a_service_and_go_on_without_the_one_that_began_it(cluster: Cluster) -> None:
    problems = [problem_bytes(problem_of(PLAIN, iterations=n), 1) for n in range(1, 5)]
    expected = [solved(problem) for problem in problems]
    wait_for_none(os.getpid())
    with contextlib.closing(Courier(cluster.address)) as first:
        service = wait_for_service(os.getpid())
        with contextlib.closing(Courier(cluster.address)) as second:
            assert [answer_of(one, problems[0]) for one in (first, second)] == [expected[0]] * 2
            assert of_the_cluster("RefitService", os.getpid()) == [service]
            assert first._process is not None
            first._process.kill()
            service.wait(60)  # it may answer until then, and two services would be begun
            assert answer_of(second, problems[1]) == expected[1]
            assert answer_of(first, problems[2]) == expected[2]  # by a courier of its own again
            [other] = of_the_cluster("RefitService", os.getpid())
            other.send_signal(signal.SIGSTOP)
            second.send(problems[3])
            second.give_up()
            assert answer_of(second, problems[3]) == expected[3]
            other.wait(60)  # what gave no sign of life is ended
            assert answer_of(first, problems[3]) == expected[3]


@pytest.mark.drill
def test_a_service_that_a_run_never_reached_is_replaced_and_ended(cluster: Cluster) -> None:
    problem = problem_bytes(problem_of(PLAIN, iterations=1), 1)
    wait_for_none(os.getpid())
    with contextlib.closing(Courier(cluster.address)):
        service = wait_for_service(os.getpid())
        service.send_signal(signal.SIGSTOP)
        with contextlib.closing(Courier(cluster.address)) as second:
            assert answer_of(second, problem) == solved(problem)
            service.wait(60)


@pytest.mark.drill
def test_a_run_on_ray_uses_the_service_of_its_cluster(
    cluster: Cluster, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    for name, more in (("plain", []), ("on-ray", [*RAY, "--ray", cluster.address])):
        words = words_of(str(few_digits), str(tmp_path), name, 2, "none")
        ended = setformer("train", DEMO, *words, *DELAYED, *more, "--ranks", "1")
        assert ended.code == 0, ended.err
    assert state_of(tmp_path, "on-ray", LAST) == state_of(tmp_path, "plain", LAST)
    assert refreshed(tmp_path, "on-ray")["by"] == "ray"

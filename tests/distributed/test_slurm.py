"""A run in a real Slurm: tasks of srun, a batch script that is warned, requeued, and continues."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.testing.commands import DEMO, ROOT, SHORT, losses, setformer, train_words
from launch.testing.slurm import Slurm, why_impossible
from setformer_dist.core import ledger

REASON = why_impossible()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.drill, pytest.mark.hosts]

# As docs/hosts.md has it.
SCRIPT = """#!/bin/bash
#SBATCH --ntasks=2 --requeue --open-mode=append --signal=B:USR1@120 --output={folder}/out
cd {root}
{train} &
trap "kill -USR1 $!" USR1
wait $!; code=$?
[ $code -gt 128 ] && {{ wait $!; code=$?; }}
[ $code -eq 138 ] && scontrol requeue $SLURM_JOB_ID
exit $code
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as made:
        yield made


def test_tasks_of_srun_are_ranks(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    entry = [sys.executable, "-m", "launch.entry", DEMO, f"data.root={digits}", *SHORT]
    done = slurm.run("srun", "-n", "2", "-D", str(ROOT), *entry, f"run.out={tmp_path / 'srun'}", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = setformer(*train_words(digits, tmp_path / "plain"))
    assert ended.code == 0, ended.err
    assert losses(tmp_path / "srun" / "demo") == losses(tmp_path / "plain" / "demo")
    words = [sys.executable, "-m", "launch.cli.main", *train_words(digits, tmp_path / "twice")]
    twice = slurm.run("srun", "-n", "2", "-D", str(ROOT), *words, timeout=100)
    assert twice.returncode != 0
    assert "a launcher has started 2 processes of it" in twice.stderr


def test_a_batch_job_is_warned_requeued_and_resumes(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    words = train_words(digits, tmp_path, "schedule.epochs=6")
    train = shlex.join([sys.executable, "-m", "launch.cli.main", *words[:-2]])  # the ranks are those of the allocation
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT.format(folder=tmp_path, root=ROOT, train=train))
    submitted = slurm.run("sbatch", "--parsable", str(script))
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def said() -> str:
        return (tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""

    def wait_until(condition: Callable[[], bool], limit_s: float = 150.0) -> None:
        limit = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < limit, said() + slurm.run("scontrol", "show", "job", job).stdout
            time.sleep(0.2)

    def ends() -> list[str]:
        return [event["why"] for event in ledger.read_events(run) if event["event"] == "ended"]

    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 12)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does two minutes before the end
    wait_until(lambda: ends() == ["stopped"])
    wait_until(lambda: ends() == ["stopped", "done"])
    assert "stopped and saved at step" in said()
    events = ledger.read_events(run)
    assert [event["ranks"] for event in events if event["event"] == "attempt"] == [2, 2]
    assert [step for kind, step in losses(run) if kind == "train"] == list(range(1, 133))

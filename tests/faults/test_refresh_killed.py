"""A rank dies by SIGKILL before, within and after a refresh: the run is started again, and is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.ray.cluster import own_cluster
from launch.testing.commands import losses, setformer, train_words

# Kills a rank once at each moment, in the order of the run. `_write` is where masters, states and average are changed.
MINE = """
import os, signal
from pathlib import Path
import torch
from setformer_dist.engine import refitter, refresh
from setformer_dist.ops import kmeans

RANK = int(os.environ["RANK"])
DONE = {path.name for path in Path(MARKS).iterdir()}  # one death an attempt
NEXT = next((moment for moment in MOMENTS if moment not in DONE), None)

def die(moment, rank):
    if moment == NEXT and RANK == rank:
        (Path(MARKS) / moment).touch()
        os.kill(os.getpid(), signal.SIGKILL)

def around(kind, name, before=None, after=None):
    real = getattr(kind, name)
    def call(self, *args, **kwargs):
        if before:
            before(self, *args)
        found = real(self, *args, **kwargs)
        if after:
            after(self, *args)
        return found
    setattr(kind, name, call)

R = refresh.Refresh
around(R, "after_update", after=lambda self, step: die("sampled", 1) if step == 6 else None)
around(R, "after_update", before=lambda self, step: die("within-sampling", 0) if step == 7 else None)
around(refitter.InJob, "finish", before=lambda self, step: die("before-kmeans", 1))
around(refitter.InJob, "finish", after=lambda self, step: die("computed", 0))
around(R, "apply", after=lambda self, step: die("applied-unsaved", 0))
around(R, "acts", before=lambda self, step: die("pending", 1) if step == 9 else None)

real_put = refresh._put
puts = []
def put(*args):
    real_put(*args)
    puts.append(1)
    if len(puts) == 3:
        die("half-written", 1)
refresh._put = put
"""
ALL = ("sampled", "within-sampling", "before-kmeans", "computed", "half-written", "applied-unsaved")
FEW = ("within-sampling", "half-written")
ON_RAY = ("within-sampling", "pending", "half-written", "applied-unsaved")
DELAYED = ("within-sampling", "pending", "computed", "half-written", "applied-unsaved")
# ZeRO stage, offload, steps between checkpoints.
DRILLED = ((2, "none", 5), (0, "none", 1), (3, "none", 1), (3, "all", 1), (1, "optimizer", 1))


def words(digits: Path, out: Path, *more: str) -> list[str]:
    return train_words(
        digits, out, "refresh.every=8", "refresh.sample_steps=3", "refresh.samples=128", "~schedule.epochs",
        "~schedule.warmup_epochs", "schedule.steps=12", "restart.backoff_s=0.05", "restart.limit=20",
        "restart.same_step=20", *more,
    )  # fmt: skip


def last_checkpoint(run: Path) -> tuple[Any, Any]:
    folder = run / "checkpoints" / "step-00000012"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return [f for f in files if f["name"].endswith(".safetensors")], json.loads((folder / "trainer.json").read_text())[
        "refresh"
    ]


def refreshes(run: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {k: v for k, v in row.items() if k not in ("seconds", "by")}
        for row in rows
        if row["kind"] == "refresh"
    }


@pytest.mark.drill
@pytest.mark.parametrize(
    ("moments", "stage", "offload", "every", "delay"),
    [
        (ALL, 2, "none", 1, 0),
        *((FEW, *layout, 0) for layout in DRILLED),
        (DELAYED, 2, "none", 1, 2),
        (DELAYED, 0, "none", 1, 2),
        (DELAYED, 3, "all", 1, 2),
    ],
)
def test_killed_at_each_moment_of_a_refresh_the_run_is_the_same(
    digits: Path, tmp_path: Path, moments: tuple[str, ...], stage: int, offload: str, every: int, delay: int
) -> None:
    layout = [f"zero.stage={stage}", f"zero.offload={offload}", f"checkpoint.every_steps={every}"]
    killed_is_whole(digits, tmp_path, moments, [*layout, f"refresh.delay={delay}"])


@pytest.mark.drill
def test_so_it_is_where_a_service_on_ray_computes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the service's owner, the courier of rank 0, the service dies too."""
    with own_cluster(cpus=1) as cluster:
        for name, value in {**cluster.environment, "RAY_ADDRESS": cluster.address}.items():
            monkeypatch.setenv(name, value)
        ray = ("refresh.by=ray", "refresh.wait_s=90")
        killed_is_whole(digits, tmp_path, ON_RAY, ["checkpoint.every_steps=1", "refresh.delay=2"], ray)
    rows = (tmp_path / "killed" / "demo" / "metrics.jsonl").read_text().splitlines()
    assert {row["by"] for row in map(json.loads, rows) if row["kind"] == "refresh"} == {"ray"}


def killed_is_whole(
    digits: Path, tmp_path: Path, moments: tuple[str, ...], layout: Sequence[str], more: Sequence[str] = ()
) -> None:
    """Train a run whole, and another one, with some words `more`, that dies at each moment; compare all they leave."""
    whole = setformer(*words(digits, tmp_path / "whole", *layout))
    assert whole.code == 0, whole.err
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "mine_deaths.py").write_text(MINE.replace("MARKS", repr(str(marks))).replace("MOMENTS", repr(moments)))
    killed = setformer(
        *words(digits, tmp_path / "killed", *layout, *more, 'run.imports=["mine_deaths"]'), cwd=tmp_path, timeout=400
    )
    assert killed.code == 0, killed.err
    assert sorted(path.name for path in marks.iterdir()) == sorted(moments)
    assert killed.err.count("was ended by SIGKILL") == len(moments)
    one, other = tmp_path / "whole" / "demo", tmp_path / "killed" / "demo"
    assert last_checkpoint(one) == last_checkpoint(other)
    assert losses(one) == losses(other)
    assert len(refreshes(one)) == 1
    assert refreshes(one) == refreshes(other)

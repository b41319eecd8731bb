"""A run folder that an older version wrote continues: `tests/golden/run-<commit>` holds one, stopped at step 3 of 6.

Each was made in a checkout of its commit, on the demo's digits: `WORDS` of configs/runs/demo.toml.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, losses, setformer

WORDS = [
    "run.name=old-run", "run.threads=1", "schedule.steps=6", "~schedule.epochs", "~schedule.warmup_epochs",
    "run.log_every=1", "eval.every_epochs=0", "eval.every_steps=6", "checkpoint.every_steps=3",
    "checkpoint.keep_last=2", "run.record_samples=true", "model.args.depths=[1,1,1]", "model.args.embed_dim=8",
    "model.args.num_heads=[1,2,4]", "precision.dtype=fp32", "zero.stage=1", "data.workers=0", "batch.global_size=32",
    "ema.decay=0.9",
]  # fmt: skip
OLD = sorted((ROOT / "tests" / "golden").glob("run-*"))


@pytest.mark.parametrize("old", OLD, ids=lambda path: path.name)
def test_a_run_of_an_older_version_resumes(old: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "old-run"
    shutil.copytree(old, folder)
    there = losses(folder)
    (folder / "metrics.jsonl").write_text("")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (folder / "samples.jsonl").write_text("")
    path = str(ROOT / "configs" / "runs" / "demo.toml")
    ended = setformer("train", path, f"data.root={digits}", f"run.out={tmp_path / 'runs'}", *WORDS)
    assert ended.code == 0, ended.err
    assert "resumed at step 3" in ended.err
    again = losses(folder)
    assert {step for kind, step in again if kind == "train"} == {4, 5, 6}
    for key, (loss, averaged) in again.items():  # bits are a CPU's own
        assert loss == pytest.approx(there[key][0], rel=1e-5), key
        assert averaged == pytest.approx(there[key][1], rel=1e-5) if averaged is not None else there[key][1] is None
    taken = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert taken == samples[3:]

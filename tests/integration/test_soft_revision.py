"""Runs of SOFT from before 2026-11-28 keep the function that they were trained with (core/revisions.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import layout
from checkpoints.digest import digest_of
from checkpoints.identity import digest_json
from launch.run.trained import load_trained
from launch.testing.commands import setformer, train_words
from setformer_dist.models.attention import SoftAttention

MODEL = [
    "model.name=soft_tiny", "~model.args", "model.args.widths=[8,16]", "model.args.depths=[1,1]", "model.drop_path=0.0",
    "model.args.num_heads=[1,2]", "model.args.soft.landmarks=4",
    "model.args.soft.conv_stride=[2,1]", "model.args.soft.value_conv=[3,0]", "schedule.warmup_epochs=0",
    "~schedule.epochs",
]  # fmt: skip


def words_of(digits: Path, out: Path, steps: int) -> list[str]:
    return train_words(digits, out, *MODEL, f"schedule.steps={steps}", "checkpoint.every_steps=1", ranks=1)


def grow_older(run: Path) -> None:
    """Leave a run's folder as a version before 2026-11-28 would have: nothing names the scale."""
    config = json.loads((run / "config.json").read_text())
    del config["model"]["args"]["soft"]["query_scale"]
    del config["sha256"]  # which those versions did not write either
    (run / "config.json").write_text(json.dumps(config))
    for folder in layout.step_folders(run / "checkpoints"):
        trainer, manifest = folder / "trainer.json", folder / layout.MANIFEST
        state, body = json.loads(trainer.read_text()), json.loads(manifest.read_text())
        del state["config"]["model"]["args"]["soft"]["query_scale"]
        trainer.write_text(json.dumps(state))
        record = next(r for r in body["files"] if r["name"] == "trainer.json")
        record["digest"], record["size"] = digest_of(trainer.read_bytes()), trainer.stat().st_size
        args = json.loads(body["identity"]["model_args"])
        del args["soft"]["query_scale"]
        body["identity"]["model_args"] = json.dumps(args, sort_keys=True)
        del body["sha256"]
        manifest.write_text(json.dumps({**body, "sha256": digest_json(body)}))


def scales(run: Path) -> set[str]:
    model = load_trained(run, "plain").model
    return {m.config.query_scale for m in model.modules() if isinstance(m, SoftAttention)}


@pytest.fixture
def older(digits: Path, tmp_path: Path) -> Path:
    ended = setformer(*words_of(digits, tmp_path / "runs", 1))
    assert ended.code == 0, ended.err
    run = tmp_path / "runs" / "demo"
    assert scales(run) == {"before"}
    grow_older(run)
    return run


def test_an_older_run_continues_as_it_was_and_says_so(older: Path, digits: Path, tmp_path: Path) -> None:
    assert scales(older) == {"after"}
    dry = setformer(*words_of(digits, tmp_path / "runs", 1), "checkpoint.keep_last=3", "--dry-run")
    assert dry.code == 0, dry.err
    ended = setformer(*words_of(digits, tmp_path / "runs", 1), "checkpoint.keep_last=3")
    assert ended.code == 0, ended.err
    assert "model.args.soft.query_scale = 'after'" in ended.err
    assert json.loads((older / "config.json").read_text())["model"]["args"]["soft"]["query_scale"] == "after"
    assert scales(older) == {"after"}
    card = tmp_path / "exported"
    assert setformer("ckpt", "export", str(older), str(card)).code == 0
    config = json.loads((card / "config.json").read_text())
    assert config["model_args"]["soft"]["query_scale"] == "after"


@pytest.mark.drill
def test_a_new_run_does_not_begin_with_older_weights_unless_it_takes_their_scale(
    older: Path, digits: Path, tmp_path: Path
) -> None:
    words = [*words_of(digits, tmp_path / "new", 1), f"model.weights={older}"]
    ended = setformer(*words)
    assert ended.code == 4
    assert 'set model.args.soft.query_scale = "after"' in ended.error_lines[-1]
    ended = setformer(*words, "model.args.soft.query_scale=after")
    assert ended.code == 0, ended.err
    assert scales(tmp_path / "new" / "demo") == {"after"}

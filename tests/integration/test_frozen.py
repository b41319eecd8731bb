"""`model.freeze`: parameters that do not train keep their weights, and everything else is as ever."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoints.reader import open_checkpoint
from launch.run.trained import load_trained
from launch.testing.commands import DEMO, losses, setformer, train_words
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.engine.config import OptimConfig
from setformer_dist.engine.optim import parameter_groups
from setformer_dist.models.build import build_model, freeze

FROZEN = ("stem.", "stages.0.")


def test_what_is_frozen_stays_on_any_ranks_under_any_stage_and_after_a_resume(digits: Path, tmp_path: Path) -> None:
    words = ('model.freeze=["stem.", "stages.0."]', "checkpoint.keep_last=99")
    for name, ranks, stage in (("two", 2, 2), ("one", 1, 3)):
        ended = setformer(*train_words(digits, tmp_path / name, *words, f"zero.stage={stage}", ranks=ranks))
        assert ended.code == 0, ended.err
    one, two = tmp_path / "one" / "demo", tmp_path / "two" / "demo"
    found, other = losses(one), losses(two)
    assert found.keys() == other.keys()
    for key, (loss, _) in found.items():
        assert loss == pytest.approx(other[key][0], abs=1e-4), key
    first, last = (open_checkpoint(two / "checkpoints" / f"step-{step:08d}") for step in (5, 22))
    before, after, average = first.read_full("param"), last.read_full("param"), last.read_full("ema")
    for name, tensor in after.items():
        assert tensor.equal(before[name]) == name.startswith(FROZEN), name
        assert tensor.equal(average[name]) == name.startswith(FROZEN), name
    refused = setformer(*train_words(digits, tmp_path / "two"))
    assert refused.code == 2
    assert "model.freeze is ['stem.', 'stages.0.'] there and [] here" in refused.err
    assert all(parameter.isfinite().all() for parameter in load_trained(two).model.parameters())


def test_names_that_begin_no_parameters_name() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 16, 0)
    with pytest.raises(ConfigError, match=r"begins with 'head\.out'; names begin with stem, stages, norm, head$"):
        freeze(model, ["stem.", "head.out"])
    with pytest.raises(ConfigError, match="leaves no parameter that trains"):
        freeze(model, [""])


def test_groups_have_what_trains_alone() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 16, 0)
    freeze(model, FROZEN)
    trained = {id(p) for name, p in model.named_parameters() if not name.startswith(FROZEN)}
    for decay in (1.0, 0.8):
        groups = parameter_groups(model, OptimConfig(layer_decay=decay))
        assert {id(p) for group in groups for p in group["params"]} == trained


def test_a_dry_run_counts_what_trains(digits: Path) -> None:
    words = ["train", DEMO, f"data.root={digits}", "--dry-run"]
    whole, part = setformer(*words), setformer(*words, 'model.freeze=["stem.", "stages."]')
    assert whole.code == part.code == 0, part.err
    shown = [next(line for line in ended.out.splitlines() if "parameters" in line) for ended in (whole, part)]
    assert shown[0] != shown[1]
    assert "that do not train" in shown[1]
    for asked in (words, ["train", DEMO, "data.root=nowhere", "--dry-run"]):  # without data as well
        refused = setformer(*asked, "model.freeze=['body.']")
        assert "no parameter's name begins with 'body.'" in refused.err


def test_a_predicted_checkpoint_has_what_does_not_train(digits: Path, tmp_path: Path) -> None:
    words = train_words(digits, tmp_path, 'model.freeze=["stem.", "stages."]', ranks=1)
    dry = setformer(*words, "--dry-run")
    predicted = re.search(r"checkpoints +([\d.]+) MiB each", dry.out)
    assert predicted is not None, dry.out + dry.err
    assert setformer(*words).code == 0
    folder = open_checkpoint(tmp_path / "demo").path
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix not in (".json", ".md"))
    assert float(predicted[1]) == pytest.approx(written / 2**20, rel=0.02, abs=0.05)


def test_refreshed_sets_must_train(digits: Path, tmp_path: Path) -> None:
    words = ("model.freeze=['stages.0.']", "refresh.every=5")
    refused = setformer(*train_words(digits, tmp_path, *words, ranks=1))
    assert refused.code == 2
    assert "which does not train (model.freeze" in refused.err

"""Every key of a run config is documented with type, default, unit and meaning, and docs/keys.md says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch.run.config import RunConfig
from launch.run.keys import UNITS, all_run_keys, as_markdown, keys_named
from launch.testing.commands import setformer
from setformer_dist.core.config import all_keys
from setformer_dist.core.errors import ConfigError

PAGE = Path(__file__).parent.parent.parent / "docs" / "keys.md"


def test_every_key_is_there_with_a_meaning() -> None:
    keys = all_run_keys()
    assert {key.key.replace("[]", "") for key in keys} == {*all_keys(RunConfig), "data.mixture", "data.resolutions"}
    assert not [key.key for key in keys if not key.meaning]
    assert not [key.key for key in keys if not key.meaning.endswith((".", ")"))]


def test_every_number_has_a_unit() -> None:
    numeric = {key.key for key in all_run_keys() if re.search(r"\b(integer|number|[0-9] or)\b", key.type)}
    assert not numeric - set(UNITS), "name their units in launch/run/keys.py"
    assert not set(UNITS) - numeric, "keys that are not there any more, or hold no numbers"


def test_types_bounds_and_defaults() -> None:
    by_name = {(key.key, key.of): key for key in all_run_keys()}
    keep = by_name["checkpoint.keep_last", ""]
    assert (keep.type, keep.default, keep.unit) == ("integer, ≥ 1", "3", "checkpoints")
    assert by_name["batch.micro", ""].type == 'integer or "auto"'
    assert by_name["data.mean", "images"].type == "list of 3: number"
    assert by_name["data.mean", "images"].default == "[0.485, 0.456, 0.406]"
    assert by_name["data.root", "tokens"].default == "required"
    assert by_name["schedule.epochs", ""].default == "none"
    assert by_name["data.mixture[].weight", "images"].type == "number, > 0"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == as_markdown(), "run make docs"


def test_names() -> None:
    assert [key.key for key in keys_named("optim.lr")] == ["optim.lr"]
    assert {key.key for key in keys_named("ema")} == {"ema.decay", "ema.warmup"}
    assert [key.key for key in keys_named("keep_last")] == ["checkpoint.keep_last"]
    assert [key.key for key in keys_named("data.mixture.weight")] == ["data.mixture[].weight"]
    assert len(keys_named("data.root")) == 2
    for name, said in (("optim.lrr", "did you mean optim.lr"), ("batch_size", "did you mean batch.global_size"),
                       ("learning-rate", "no key 'learning-rate'")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            keys_named(name)


def test_the_command() -> None:
    ended = setformer("config", "checkpoint.keep_last")
    assert ended.code == 0, ended.err
    assert "integer, ≥ 1; unit: checkpoints; default 3\n" in ended.out
    assert "Newest checkpoints that stay." in ended.out
    everything = json.loads(setformer("config", "--json").out)
    assert len(everything) == len(all_run_keys())
    assert set(everything[0]) == {"key", "of", "type", "default", "unit", "meaning"}
    wrong = setformer("config", "optim.lrr")
    assert (wrong.code, len(wrong.error_lines)) == (2, 1)

"""Every key of a run config is documented with type, default, unit and meaning, and docs/keys.md says the same."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from checkpoints.config import CheckpointConfig
from dataloaders.order.order import Cursor
from launch.run.config import RunConfig, load_run
from launch.run.keys import UNITS, all_run_keys, as_markdown, keys_named
from launch.testing.commands import setformer
from setformer_dist.core.config import all_keys
from setformer_dist.core.continuing import Agreed, Position, agreements, flatten, must_stay
from setformer_dist.core.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "keys.md"


def test_every_key_is_there_with_a_meaning() -> None:
    keys = all_run_keys()
    assert {key.key.replace("[]", "") for key in keys} == {*all_keys(RunConfig), "data.mixture", "data.resolutions"}
    assert not [key.key for key in keys if not key.meaning]
    assert not [key.key for key in keys if not key.meaning.endswith((".", ")"))]


def test_every_number_has_a_unit() -> None:
    numeric = {key.key for key in all_run_keys() if re.search(r"\b(integer|number|[0-9] or)\b", key.type)}
    assert not numeric - set(UNITS), "name their units in launch/run/keys.py"
    assert not set(UNITS) - numeric, "keys that are not there any more, or hold no numbers"


def test_every_key_and_every_part_of_the_position_in_the_data_has_a_rule_for_resuming() -> None:
    """One list of rules, beside the fields: what `must_stay` says is what the documentation says."""
    permits = typing.get_args(typing.get_args(CheckpointConfig.model_fields["allow_changes"].annotation)[0])
    rules = {(key.key, key.of): key.resume for key in all_run_keys()}
    assert set(rules.values()) == {"free", "fixed", *permits}
    config = load_run(ROOT / "configs" / "runs" / "demo.toml")
    leaves = flatten(config.model_dump(mode="json"))
    for permitted in ((), *((name,) for name in permits)):
        stays = must_stay(config, permitted)
        for (key, of), rule in rules.items():
            if key in leaves and of in ("", "images"):
                assert (key in stays) == (rule == "fixed" or rule not in ("free", *permitted)), key
    fields = {field.name for field in dataclasses.fields(Cursor)}
    agreed = agreements(Cursor)
    assert fields - set(agreed) == {"epoch", "samples_consumed"}  # marked as the position
    assert {rule.by for rule in agreed.values()} == {None, "global_batch", "data"} < {None, *permits}
    assert not [name for name, mark in typing.get_type_hints(Cursor, include_extras=True).items()
                if not {type(m) for m in mark.__metadata__} & {Agreed, Position}]  # fmt: skip


def test_types_bounds_and_defaults() -> None:
    by_name = {(key.key, key.of): key for key in all_run_keys()}
    keep = by_name["checkpoint.keep_last", ""]
    assert (keep.type, keep.default, keep.unit) == ("integer, ≥ 1", "3", "checkpoints")
    assert by_name["batch.micro", ""].type == 'integer or "auto"'
    assert by_name["data.mean", "images"].type == "list of number"
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
    assert "integer, ≥ 1; unit: checkpoints; default 3; when a run resumes: free\n" in ended.out
    assert "Number of newest checkpoints to keep." in ended.out
    everything = json.loads(setformer("config", "--json").out)
    assert len(everything) == len(all_run_keys())
    assert set(everything[0]) == {"key", "of", "type", "default", "unit", "resume", "meaning"}
    wrong = setformer("config", "optim.lrr")
    assert (wrong.code, len(wrong.error_lines)) == (2, 1)

"""What a run takes over from trainer.json and the manifest: all of the right form, or one error says what is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import DamagedError
from checkpoints.identity import Identity
from checkpoints.strictjson import parse
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.engine.config import GuardConfig
from setformer_dist.engine.guard import GUARD_FILE, Guard, Incident
from setformer_dist.engine.run_state import Best, RunState, check_trainer

GOOD = {
    "stream": {"seed": 0},
    "optimizer_steps": 7,
    "loss_scale": {"cur_scale": 65536.0, "cur_iter": 3},
    "run": RunState(
        7, Best("top1", "max", 0.5, 7), {"top1": 0.5, "loss": float("nan")}, pending_losses=[1.5]
    ).as_dict(),
    "guard": {"window": [1.0, 2.5]},
    "config": {"anything": "else"},
    "refresh": {"rows": {"stages.0.blocks.0.attn": 64}},
}
PLACE = Path("run/checkpoints/step-00000007")


def changed(path: str, *value: object) -> dict:
    """Return the good contents with one key changed, or dropped."""
    trainer = copy.deepcopy(GOOD)
    *above, key = path.split(".")
    table = trainer
    for name in above:
        table = table[name]
    table.pop(key, None)
    if value:
        table[key] = value[0]
    return trainer


def test_what_a_run_saves_is_taken():
    check_trainer(json.loads(json.dumps(GOOD)), PLACE)
    check_trainer(changed("guard"), PLACE)  # as runs before the guard wrote it
    check_trainer(changed("run.evaluation_owed"), PLACE)
    check_trainer(changed("refresh"), PLACE)
    check_trainer(changed("refresh.rows"), PLACE)


@pytest.mark.parametrize("key", ["stream", "optimizer_steps", "loss_scale", "run", "run.best", "run.best.step"])
def test_a_key_that_is_missing_is_named(key):
    with pytest.raises(CheckpointError, match=r"cannot resume from run/checkpoints/step-00000007") as caught:
        check_trainer(changed(key), PLACE)
    assert key.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stream", [1]),
        ("refresh", [1]),
        ("refresh.rows", [1]),
        ("refresh.rows", {"stages.0.blocks.0.attn": "64"}),
        ("refresh.pending", 5),
        ("refresh.pending", {"step": 5}),
        ("refresh.pending", {"step": "5", "rows": {}}),
        ("optimizer_steps", "7"),
        ("optimizer_steps", True),
        ("loss_scale", {"cur_scale": "x"}),
        ("run", None),
        ("run", []),
        ("run.more", 1),
        ("run.step", 3),
        ("run.best", 1),
        ("run.best.value", "good"),
        ("run.evaluation", [0.5]),
        ("run.substitutions", 1.5),
        ("run.seconds", None),
        ("run.pending_losses", ["x"]),
        ("run.evaluation_owed", 1),
        ("guard", []),
        ("guard.window", {"a": 1}),
    ],
)
def test_a_value_of_another_kind_is_refused(key, value):
    with pytest.raises(CheckpointError, match="only what a run of this program saved can be resumed"):
        check_trainer(changed(key, value), PLACE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    *GOOD,
    *(f"run.{name}" for name in GOOD["run"]),
    "run.best.metric",
    "run.best.value",
    "run.best.step",
    "guard.window",
]


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_anywhere_is_taken_or_refused_with_our_error(key, value):
    trainer = parse(json.dumps(changed(key, value)).encode(), "fuzz")
    try:
        check_trainer(trainer, PLACE)
    except CheckpointError:
        return
    best = Best("top1", "max", trainer["run"]["best"]["value"], trainer["run"]["best"]["step"])
    RunState(7, **{**trainer["run"], "best": best})  # what the trainer makes of it


@pytest.mark.parametrize("text", ["[" * 20_000, "nope", "{", '{"a": 1, "a": 2}'])
def test_crafted_model_arguments_are_an_error_of_ours(text):
    with pytest.raises(DamagedError, match="model_args"):
        Identity(model="m", model_args=text).check_same_model(Identity(model="m"))


def test_steps_that_are_counted_again_are_not_skipped(tmp_path, caplog):
    guard = Guard(GuardConfig(nonfinite="rollback"), tmp_path, Alone())
    guard.remember(Incident(12, 9.0, "spike", "rollback"))
    guard.forget()
    assert "[12]" in caplog.text
    assert not guard.passes_over(12)
    assert not (tmp_path / GUARD_FILE).exists()

"""What a run takes over from an imported checkpoint, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity, digest_shapes
from checkpoints.manager import CheckpointManager
from checkpoints.reader import Checkpoint, open_checkpoint
from launch.run.imported import is_imported, loadable, trainer_state
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot
from setformer_dist.engine.run_state import check_trainer

SHAPES = {"w": (4,)}
MINE = Identity(model="m", parameters=digest_shapes(SHAPES))


def imported(root: Path, *states: str) -> Checkpoint:
    fragments = [Fragment("w", state, 0, (4,), torch.full((4,), float(i))) for i, state in enumerate(states)]
    trainer = {"imported": {"stage": 2, "ranks": 8}, "optimizer_steps": 5, "loss_scale": {}}
    CheckpointManager(root, Alone(), CheckpointConfig()).save(Snapshot(5, fragments, trainer, {}), MINE)
    return open_checkpoint(root)


def state_of(
    checkpoint: Checkpoint, mine: Identity = MINE, total: int = 9, optimizer: str = "adamw"
) -> dict[str, object]:
    return trainer_state(checkpoint, mine, lambda step: {"step": step}, total, says=True, optimizer=optimizer)


def test_samples_continue_behind_the_steps_done_and_the_rest_begins(tmp_path, caplog):
    found = imported(tmp_path, "param", "exp_avg", "exp_avg_sq")
    assert is_imported(found)
    state = state_of(found)
    check_trainer(state, found.path)
    assert state["stream"] == {"step": 5}
    assert state["optimizer_steps"] == 5
    assert (
        "step 5 was imported from DeepSpeed (ZeRO stage 2, 8 ranks): weights and Adam's states continue" in caplog.text
    )
    average = Fragment("w", "ema", 1, (4,), torch.zeros(3))
    found.load_into(loadable(found, [average]))
    assert average.tensor.tolist() == [0.0, 0.0, 0.0]  # the weights
    held = Fragment("w", "exp_avg_sq", 0, (4,), torch.zeros(4))
    found.load_into(loadable(found, [held]))
    assert held.tensor.tolist() == [2.0] * 4


def test_the_optimizer_begins_again_where_adams_states_have_no_names(tmp_path, caplog):
    found = imported(tmp_path, "param")
    assert state_of(found)["optimizer_steps"] == 0
    assert "the optimizer starts fresh" in caplog.text
    trained = Fragment("w", "exp_avg", 0, (4,), torch.ones(4))
    assert loadable(found, [trained]) == []
    assert trained.tensor.tolist() == [0.0] * 4  # the guard may come back here later


def test_another_optimizer_does_not_take_adams_states_for_its_own(tmp_path, caplog):
    found = imported(tmp_path, "param", "exp_avg", "exp_avg_sq")
    assert state_of(found, optimizer="lion")["optimizer_steps"] == 0
    assert "the optimizer starts fresh" in caplog.text
    held, weights = (Fragment("w", state, 0, (4,), torch.ones(4)) for state in ("exp_avg", "param"))
    found.load_into(loadable(found, [held, weights], "lion"))
    assert held.tensor.tolist() == weights.tensor.tolist() == [0.0] * 4


def test_another_model_and_a_run_that_is_too_short_are_refused(tmp_path):
    found = imported(tmp_path, "param")
    other = MINE.model_copy(update={"parameters": digest_shapes({"w": (5,)})})
    with pytest.raises(CheckpointError, match="was imported from another model than m of this config"):
        state_of(found, other)
    with pytest.raises(CheckpointError, match=r"was imported as m, and this config has model\.name = 'n'"):
        state_of(found, MINE.model_copy(update={"model": "n"}))
    with pytest.raises(CheckpointError, match="was imported after 5 steps, and this run has 5: lengthen schedule"):
        state_of(found, total=5)

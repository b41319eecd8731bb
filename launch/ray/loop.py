"""A run as the training loop of Ray Train's TorchTrainer: for those whose cluster starts ranks that way.

TorchTrainer(launch.ray.train_loop, train_loop_config={"config": "demo", "overrides": ["data.root=/data/digits"]},
scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(failure_config=FailureConfig(3)))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.machine.doctor import check_package_origins
from launch.run.config import continued, load_run, shipped
from launch.run.session import log_to_file, session
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.deepspeed_engine import quiet_deepspeed


def train_loop(config: Mapping[str, Any]) -> None:
    """Train one rank to the end of the run, from its newest checkpoint.

    Ray has joined the ranks. It is given no checkpoint: those of the run's folder, which all nodes share, are found by
    their manifests, also by the workers that Ray starts after a failure.

    Args:
        config: `config`, the run's TOML config or the name of a shipped one, and `overrides`, a list of KEY=VALUE.

    Raises:
        SetformerError: a mistake that the user can repair.
    """
    ranks = RankInfo.from_env()
    quiet_deepspeed()
    check_package_origins()
    run = continued(load_run(shipped(Path(config["config"])), list(config.get("overrides", ()))))
    with session(run, ranks, supervised=False, stays=True) as begun:
        log_to_file(begun.run, ranks)
        begun.outcome = begun.trainer.run()

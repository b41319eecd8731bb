"""Metrics in Weights & Biases.

    runs/<run>/wandb.json   the id of the run there, so that a resumed run continues under it
    runs/<run>/wandb/       W&B's own files; in mode "offline" all there is, until `wandb sync`

The x axis of every figure is the optimizer step, under the name "step", so steps that are computed again after a crash
appear again and are not refused.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setformer_dist.callbacks.optional import require
from setformer_dist.core.callback import Callback, RunEnd, RunStart, scalars
from setformer_dist.core.files import read_state, write_state
from setformer_dist.core.logging_config import WandbConfig


class Wandb(Callback):
    """Sends the figures of a run to Weights & Biases.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "wandb"
    essential = False

    def __init__(self, config: WandbConfig) -> None:
        require("wandb", "logging.wandb", "wandb")
        self._config = config
        self._run: Any = None

    def on_run_start(self, run: RunStart) -> None:
        """Open the run there, a new one or that of this run's folder."""
        package = importlib.import_module("wandb")
        self._run = package.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            name=run.folder.name,
            id=_kept_id(run.folder / "wandb.json"),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=package.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_metrics(self, step: int, metrics: Mapping[str, object]) -> None:
        """Send the figures of training."""
        self._send("train", step, metrics)

    def on_evaluation_end(self, step: int, metrics: Mapping[str, object]) -> None:
        """Send the figures of an evaluation."""
        self._send("eval", step, metrics)

    def on_refresh(self, step: int, metrics: Mapping[str, object]) -> None:
        """Send what a refresh of the reference sets did."""
        self._send("refresh", step, metrics)

    def on_bad_step(self, step: int, values: Mapping[str, object]) -> None:
        """Send what the guard saw."""
        self._send("guard", step, values)

    def on_run_end(self, end: RunEnd) -> None:
        """Close the run there."""
        self._run.finish(exit_code=0)

    def on_exception(self, error: BaseException) -> None:
        """Close the run there as failed."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def _send(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in scalars(values)}})


def _kept_id(path: Path) -> str:
    """Return the id in a file, or a new one that is written there before it is used."""
    if path.exists():
        return str(read_state(path)[0]["id"])
    made = secrets.token_hex(8)
    write_state(path, {"id": made})
    return made

"""Metrics in MLflow.

runs/<run>/mlflow.json   the id of the run there, so that a resumed run continues under it
"""

from __future__ import annotations

import hashlib
import importlib
import json
import posixpath
import re
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from setformer_dist.callbacks.optional import require
from setformer_dist.core.callback import Callback, RunEnd, RunStart, scalars
from setformer_dist.core.files import read_state, write_state
from setformer_dist.core.logging_config import MlflowConfig

_PARAMETERS_AT_ONCE = 100  # MLflow's limits: of a batch, and of a value
_LONGEST_VALUE = 500
_LONGEST_NAME = 250
_ODD = re.compile(r"[^\w\-. :/]")  # what it refuses in the name of a metric, and with it all metrics of a batch


class Mlflow(Callback):
    """Sends the config and the figures of a run to MLflow.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "mlflow"
    essential = False

    def __init__(self, config: MlflowConfig) -> None:
        require("mlflow", "logging.mlflow", "mlflow")
        self._config = config
        self._package: ModuleType | None = None
        self._client: Any = None
        self._id = ""

    def on_run_start(self, run: RunStart) -> None:
        """Open the run there, a new one or that of this run's folder."""
        self._package = importlib.import_module("mlflow")
        self._client = self._package.MlflowClient(tracking_uri=self._config.tracking_uri)
        kept = run.folder / "mlflow.json"
        if kept.exists():
            self._id = str(read_state(kept)[0]["id"])
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(self._experiment(), run_name=run.folder.name).info.run_id
        write_state(kept, {"id": self._id})
        parameter = self._package.entities.Param
        found = [parameter(key, value[:_LONGEST_VALUE]) for key, value in _parameters(run.config)]
        for first in range(0, len(found), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=found[first : first + _PARAMETERS_AT_ONCE])

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
        self._client.set_terminated(self._id, "FINISHED" if end.signum is None else "KILLED")

    def on_exception(self, error: BaseException) -> None:
        """Close the run there as failed."""
        if self._id:
            self._client.set_terminated(self._id, "FAILED")

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._config.experiment)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(self._config.experiment))

    def _send(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        assert self._package is not None  # on_run_start came first
        now, metric = int(time.time() * 1000), self._package.entities.Metric
        found = [metric(_accepted(f"{kind}/{name}"), value, now, step) for name, value in scalars(values)]
        self._client.log_batch(self._id, metrics=found)


def _parameters(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of a config, dotted, with their values as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _parameters(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _accepted(name: str) -> str:
    """Return a name that MLflow takes: of an odd character its number, so that names of classes stay distinct."""

    def numbered(found: re.Match[str]) -> str:
        return f"_{ord(found[0]):x}_"

    name = _ODD.sub(numbered, name)
    if posixpath.normpath(name) != name:
        name = re.sub("/", numbered, name)
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 1 - len(digest)]} {digest}"

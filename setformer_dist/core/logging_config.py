"""The `[logging]` table of a run config."""

from __future__ import annotations

from typing import Literal

import pydantic

from setformer_dist.core.config import FrozenConfig


class WandbConfig(FrozenConfig):
    """Weights & Biases; needs the extra `wandb`.

    Attributes:
        project: project in which the run appears; without it, nothing is sent to Weights & Biases.
        entity: user or team; by default the account's.
        mode: "online" or "offline"; "offline" writes files in the run folder for `wandb sync`.
    """

    project: str | None = pydantic.Field(default=None, min_length=1)
    entity: str | None = pydantic.Field(default=None, min_length=1)
    mode: Literal["online", "offline"] = "online"


class MlflowConfig(FrozenConfig):
    """MLflow; needs the extra `mlflow`.

    Attributes:
        experiment: experiment in which the run appears; without it, nothing is sent to MLflow.
        tracking_uri: address of the server or store; by default MLFLOW_TRACKING_URI, or MLflow's own default.
    """

    experiment: str | None = pydantic.Field(default=None, min_length=1)
    tracking_uri: str | None = pydantic.Field(default=None, min_length=1)


FILE = "file"
LOOPBACK = "127.0.0.1"


def endpoint_of(where: int | str) -> tuple[str, int]:
    """Return address and port of `logging.prometheus`.

    Args:
        where: a port, or ADDRESS:PORT.

    Raises:
        ValueError: it is neither; the message ends a sentence that names the key.
    """
    address, _, port = str(where).rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError("give a port from 1 to 65535, ADDRESS:PORT, or 'file'")
    return address.strip("[]") or LOOPBACK, int(port)


class LoggingConfig(FrozenConfig):
    """Where figures go besides metrics.jsonl; an error of a logger costs a warning, and the run continues without it.

    Attributes:
        tensorboard: write event files to tensorboard/ in the run's folder.
        prometheus: figures for Prometheus: a port on 127.0.0.1, or "ADDRESS:PORT" on the interface of an address, or
            "file" for metrics.prom in the run's folder. They come from the supervisor of `setformer train`.
    """

    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    prometheus: int | str = ""

    @pydantic.field_validator("prometheus")
    @classmethod
    def _endpoint(cls, value: int | str) -> int | str:
        if value not in ("", FILE):
            endpoint_of(value)
        return value

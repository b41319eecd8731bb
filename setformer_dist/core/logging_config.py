"""The `[logging]` table of a run config."""

from __future__ import annotations

from typing import Literal

import pydantic

from setformer_dist.core.config import FrozenConfig


class WandbConfig(FrozenConfig):
    """Weights & Biases; needs the extra `wandb`.

    Attributes:
        project: where the run appears; None: nothing goes to Weights & Biases.
        entity: user or team; None: the account's default.
        mode: "online", or "offline": files below the run's folder, for `wandb sync`.
    """

    project: str | None = pydantic.Field(default=None, min_length=1)
    entity: str | None = pydantic.Field(default=None, min_length=1)
    mode: Literal["online", "offline"] = "online"


class MlflowConfig(FrozenConfig):
    """MLflow; needs the extra `mlflow`.

    Attributes:
        experiment: where the run appears; None: nothing goes to MLflow.
        tracking_uri: of the server or store; None: MLFLOW_TRACKING_URI, or MLflow's own default.
    """

    experiment: str | None = pydantic.Field(default=None, min_length=1)
    tracking_uri: str | None = pydantic.Field(default=None, min_length=1)


class LoggingConfig(FrozenConfig):
    """Where figures go besides metrics.jsonl; an error of a logger costs a warning, and the run continues without it.

    Attributes:
        tensorboard: write event files to tensorboard/ in the run's folder.
    """

    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()

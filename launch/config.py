"""The config of a run: one TOML page, and what follows from it once the ranks and the data are known.

page.toml + overrides -> RunConfig (frozen; what the user said)
RunConfig + ranks     -> DeepSpeed's JSON, batch plan
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from checkpoints.config import CheckpointConfig
from dataloaders.config import AnyDataConfig
from launch.restarts import RestartConfig
from setformer_dist.core import config as base
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import read_state
from setformer_dist.core.secrets import redacted_json
from setformer_dist.engine.batch_plan import BatchConfig, BatchPlan, solve
from setformer_dist.engine.ema import EmaConfig
from setformer_dist.engine.evaluate import EvalConfig
from setformer_dist.engine.guard import GuardConfig
from setformer_dist.engine.optim import OptimConfig, ScheduleConfig
from setformer_dist.engine.zero import PrecisionConfig, ZeroConfig, deepspeed_config
from setformer_dist.models import revisions
from setformer_dist.models.build import ModelConfig

log = logging.getLogger(__name__)


_LONGEST_NAME = 255  # bytes of a folder's name, on every file system that we know


class RunTable(FrozenConfig):
    """Who the run is.

    Attributes:
        name: its folder below `out`.
        out: folder of all runs.
        seed: of weights, order, augmentation and everything else that is drawn.
        log_every: optimizer steps between two lines of metrics.jsonl.
        threads: compute threads per rank; 0 shares the cores among this machine's ranks. On CPUs another number adds
            in another order, so losses then agree to rounding only.
        timeout_minutes: how long a rank waits for the others before it gives up.
        record_samples: write the sample ids of every optimizer step to samples.jsonl, as a proof of order.
    """

    name: str
    out: str = "runs"
    seed: int = pydantic.Field(default=0, ge=0)
    log_every: int = pydantic.Field(default=10, gt=0)
    threads: int = pydantic.Field(default=0, ge=0)
    timeout_minutes: float = pydantic.Field(default=10.0, gt=0)
    record_samples: bool = False

    @pydantic.field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}", value):
            raise ValueError(
                f"must be a folder name of at most {_LONGEST_NAME} letters, digits, dots, dashes and underscores"
            )
        return value

    @pydantic.field_validator("out")
    @classmethod
    def _path(cls, value: str) -> str:
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(value).parts):
            raise ValueError(f"must be the path of a folder; no name in it may exceed {_LONGEST_NAME} bytes")
        return value


class RunConfig(FrozenConfig):
    """One run, as its page says it."""

    SYNONYMS: ClassVar[Mapping[str, str]] = {
        "pretrained": "model.weights",
        "checkpoint_path": "model.weights",
        "init_from": "model.weights",
        "learning_rate": "optim.lr",
        "base_lr": "optim.lr",
        "lr_rate": "optim.lr",
        "wd": "optim.weight_decay",
        "img_size": "data.image_size",
        "input_size": "data.image_size",
        "resolution": "data.image_size",
        "batch_size": "batch.global_size",
        "global_batch_size": "batch.global_size",
        "train_batch_size": "batch.global_size",
        "micro_batch_size": "batch.micro",
        "train_micro_batch_size_per_gpu": "batch.micro",
        "num_epochs": "schedule.epochs",
        "max_epochs": "schedule.epochs",
        "max_steps": "schedule.steps",
        "num_workers": "data.workers",
        "data_path": "data.root",
        "data_dir": "data.root",
        "output_dir": "run.out",
        "save_dir": "run.out",
        "gradient_clipping": "optim.clip_norm",
        "clip_grad": "optim.clip_norm",
        "max_grad_norm": "optim.clip_norm",
        "label_smoothing": "data.augment.smoothing",
        "drop_path_rate": "model.drop_path",
        "grad_checkpointing": "model.activation_checkpointing",
        "model_ema_decay": "ema.decay",
        "zero_stage": "zero.stage",
        "save_interval": "checkpoint.every_steps",
        "resume": "run.name (the same command goes on by itself)",
    }

    run: RunTable
    model: ModelConfig
    data: AnyDataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    zero: ZeroConfig = ZeroConfig()
    ema: EmaConfig = EmaConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    restart: RestartConfig = RestartConfig()
    guard: GuardConfig = GuardConfig()
    deepspeed: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.ema.decay == 0 and self.checkpoint.best_metric.startswith("ema_"):
            raise ValueError(
                f"checkpoint.best_metric = {self.checkpoint.best_metric!r} needs averaged weights: set ema.decay"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.out) / self.run.name


# Keys that may change between a run and its continuation, because they do not change what is computed: the order of
# samples knows neither ranks nor micro batch, and any ZeRO stage reads what any other wrote. (Losses then agree to
# rounding; bit by bit where ranks, stage and threads stay the same.)
FREE_KEYS = (
    "run.name",
    "run.out",
    "run.log_every",
    "run.timeout_minutes",
    "run.record_samples",
    "run.threads",
    "batch.micro",
    "batch.max_micro",
    "zero",
    "resolved",
    "data.root",
    "data.train",
    "data.val",
    "data.workers",
    "data.threads",
    "data.access",
    "data.cache",
    "data.cache_gib",
    "data.read_timeout",
    "data.prefetch",
    "data.max_bad_share",
    "data.bad_validation",
    "data.skip_bad",
    "data.allow_empty_classes",
    "eval",
    "checkpoint",
    "restart",
)


# Keys that each of `checkpoint.allow_changes` lets differ besides.
_ALLOWED_KEYS = {"global_batch": "batch.global_size", "data": "data."}


@dataclass(frozen=True)
class ResolvedRun:
    """A run on a given number of ranks."""

    config: RunConfig
    plan: BatchPlan

    def deepspeed_json(self) -> dict[str, Any]:
        """Return DeepSpeed's own config."""
        c = self.config
        return deepspeed_config(c.precision, c.zero, self.plan, c.optim.clip_norm, c.deepspeed)

    def as_json(self) -> dict[str, Any]:
        """Return the whole config with every default and no secrets of URLs, and the solved batch arithmetic."""
        return {
            **redacted_json(self.config.model_dump(mode="json")),
            "resolved": {
                "world_size": self.plan.world_size,
                "micro_batch": self.plan.micro,
                "accumulation": self.plan.accumulation,
            },
        }

    def identity(self) -> dict[str, Any]:
        """Return the part of the config that a continuation must share."""
        return {key: value for key, value in flatten(self.as_json()).items() if not _is_free(key)}

    def identity_hash(self) -> str:
        """Return the hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_run(page: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a page and its overrides.

    Raises:
        ConfigError: naming the page, the key and the repair.
    """
    return base.load(RunConfig, page, overrides)


def continued(config: RunConfig) -> RunConfig:
    """Return the config with what an older version meant where its folder holds a run of that version.

    Args:
        config: of a run that begins or goes on.
    """
    try:
        there, _ = read_state(config.folder / "config.json")
        table = there["model"]
        old = revisions.scale_of(table) == revisions.OLD
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config  # no run is there, or a damaged one, of which `check_folder` speaks
    if not old or revisions.scale_of(config.model.model_dump()) != revisions.NEW:
        return config
    soft = {**config.model.args["soft"], "query_scale": revisions.OLD}
    log.warning(
        "the run in %s samples SOFT's landmarks from undivided queries, as versions before 2026-11-28 did, and goes on "
        "so (model.args.soft.query_scale = 'after'): a run of another name takes the authors' scale",
        config.folder,
    )
    model = config.model.model_copy(update={"args": {**config.model.args, "soft": soft}})
    return config.model_copy(update={"model": model})


def resolve(config: RunConfig, world_size: int) -> ResolvedRun:
    """Solve the batch arithmetic for a number of ranks.

    Raises:
        ConfigError: there is no solution.
    """
    return ResolvedRun(config, solve(config.batch, world_size, config.data.group))


def check_folder(run: ResolvedRun) -> None:
    """Refuse a run folder that holds a run of another config.

    Raises:
        ConfigError: naming the keys that differ.
    """
    path = run.config.folder / "config.json"
    if not os.path.lexists(path):
        return
    try:
        there, _ = read_state(path)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): move the folder away, or give this run another run.name"
        ) from None
    if isinstance(there, dict) and isinstance(there.get("model"), dict):
        there["model"] = revisions.as_trained(there["model"])
    theirs = {key: value for key, value in flatten(redacted_json(there)).items() if not _is_free(key)}
    ours = flatten(json.loads(json.dumps(run.identity())))
    allowed = tuple(_ALLOWED_KEYS[change] for change in run.config.checkpoint.allow_changes)
    differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    differing = [key for key in differing if not key.startswith(allowed)]
    if differing:
        shown = ", ".join(f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in differing[:4])
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ConfigError(
            f"run folder {run.config.folder} holds a run of another config ({shown}{more}): "
            "give this run another run.name, or move the folder away"
        )


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
